"""LoRA files: round trips to the bit, diffusers reads ours and we read diffusers', wrong files are one line."""

from __future__ import annotations

import json
import re
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from diffusers import StableDiffusionPipeline
from diffusers.utils import (
    convert_state_dict_to_diffusers,
    convert_state_dict_to_peft,
    convert_unet_state_dict_to_peft,
)
from hypothesis import given, settings
from hypothesis import strategies as st
from peft import get_peft_model_state_dict
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from torch import Tensor

from ldm.adapter_layers import adapter_names, lora_layers, plain_layers, remove
from ldm.adapters import LoraConfig, add_lora, attach_lora, load_lora, lora_state
from ldm.errors import UserError
from ldm.lora_files import Lora, LoraInfo, LoraKind, LoraLayer, save_lora
from ldm.lora_reading import read_lora
from ldm.noise import NoiseConfig
from ldm.pipeline import LatentDiffusionPipeline

CONFIG = LoraConfig(rank=4, alpha=3.0, target=("all-linear+conv",), text_encoder=True)
INFO = LoraInfo(title="Glimmer", base_model="scenes", trigger_words=("glimmer", "a lamp"), architecture="x/lora")
KINDS: tuple[LoraKind, ...] = ("diffusers", "kohya")


@pytest.fixture(scope="module")
def model(make_pipeline: Callable[..., LatentDiffusionPipeline]) -> LatentDiffusionPipeline:
    """Each test takes its LoRAs out again."""
    return make_pipeline(NoiseConfig(schedule="scaled_linear", prediction="epsilon"), "ddim")


@pytest.fixture(scope="module")
def folder(model: LatentDiffusionPipeline, tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("saved") / "model"
    model.save_pretrained(path)
    return path


@pytest.fixture(scope="module")
def trained(model: LatentDiffusionPipeline) -> Lora:
    """As after training: up matrices that are no longer zero."""
    networks = parts(model)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        add_lora(*networks, CONFIG)
        for network in networks:
            for layer in lora_layers(network).values():
                layer.lora_B["default"].weight.data.normal_(std=0.3)
    lora = lora_state(*networks, info=INFO)
    remove(*networks)
    return lora


@pytest.fixture(scope="module")
def mixed(trained: Lora) -> Lora:
    """A LoRA whose layers differ in rank and alpha, as kohya's options make them."""
    unet = dict(trained.unet)
    for number, (name, layer) in enumerate(trained.unet.items()):
        if number % 3 == 0:
            unet[name] = LoraLayer(layer.down[:2].contiguous(), layer.up[:, :2].contiguous(), 5.0)
    return replace(trained, unet=unet)


@pytest.fixture(scope="module")
def mixed_ranks(mixed: Lora) -> Lora:
    """The same with one alpha for all."""
    return replace(mixed, unet={name: replace(layer, alpha=3.0) for name, layer in mixed.unet.items()})


def parts(pipeline: LatentDiffusionPipeline) -> tuple[Any, Any]:
    assert pipeline.text_encoder is not None
    return pipeline.unet, pipeline.text_encoder.model


def names(pipeline: LatentDiffusionPipeline) -> tuple[list[str], list[str]]:
    unet, text = parts(pipeline)
    return list(plain_layers(unet)), list(plain_layers(text))


def draw(pipeline: Any) -> np.ndarray:
    latents = torch.randn(1, 4, 16, 16, generator=torch.Generator().manual_seed(0))
    call: dict[str, Any] = {"num_inference_steps": 4, "guidance_scale": 3.0, "output_type": "np"}
    return pipeline(["a red square"], latents=latents, **call).images


def draw_with(pipeline: LatentDiffusionPipeline, path: Path, weight: float = 1.0) -> np.ndarray:
    load_lora(*parts(pipeline), path, weight, name="one")
    try:
        return draw(pipeline)
    finally:
        remove(*parts(pipeline))


def diffusers_draws(folder: Path, path: Path | dict[str, Tensor], weight: float = 1.0) -> np.ndarray:
    theirs = StableDiffusionPipeline.from_pretrained(folder, local_files_only=True)
    theirs.set_progress_bar_config(disable=True)
    theirs.load_lora_weights(path, adapter_name="one")
    theirs.set_adapters("one", weight)
    return draw(theirs)


def assert_same(found: Lora, expected: Lora) -> None:
    for ours, theirs in ((found.unet, expected.unet), (found.text_encoder, expected.text_encoder)):
        assert set(ours) == set(theirs)
        for name, layer in ours.items():
            assert layer.alpha == theirs[name].alpha
            for one, two in ((layer.down, theirs[name].down), (layer.up, theirs[name].up)):
                assert one.dtype == two.dtype
                assert torch.equal(one, two)


@pytest.mark.parametrize(
    # diffusers loses the alpha of projections in a kohya file whose alphas differ: there only ranks may.
    ("which", "kind"),
    [("trained", "diffusers"), ("trained", "kohya"), ("mixed", "diffusers"), ("mixed_ranks", "kohya")],
)
def test_diffusers_draws_the_same_picture_from_our_file(
    model: LatentDiffusionPipeline,
    folder: Path,
    which: str,
    kind: LoraKind,
    request: pytest.FixtureRequest,
    tmp_path: Path,
) -> None:
    path = tmp_path / "lora.safetensors"
    save_lora(path, request.getfixturevalue(which), kind=kind)
    ours, theirs = draw_with(model, path, 0.8), diffusers_draws(folder, path, 0.8)
    assert np.abs(ours - draw(model)).max() > 0.05
    error = np.abs(ours - theirs).max()
    print(f"{which} {kind} {error:.1e}")
    assert error < 1e-5


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16], ids=str)
def test_round_trips_keep_every_bit(
    model: LatentDiffusionPipeline, mixed: Lora, dtype: torch.dtype, tmp_path: Path
) -> None:
    start = tmp_path / "start.safetensors"
    save_lora(start, mixed, dtype=dtype)
    first = read_lora(start, *names(model))
    assert first.unet.keys() == mixed.unet.keys()
    assert {layer.up.dtype for layer in first.unet.values()} == {dtype}
    lora = first
    for number, kind in enumerate(("kohya", "diffusers", "diffusers", "kohya", "kohya")):
        path = tmp_path / f"{number}.safetensors"
        save_lora(path, lora, kind=kind)
        lora = read_lora(path, *names(model))
        assert_same(lora, first)
        assert lora.info == INFO
    if dtype == torch.float32:
        assert_same(first, mixed)


def test_through_the_networks_every_bit_stays_too(
    model: LatentDiffusionPipeline, trained: Lora, tmp_path: Path
) -> None:
    save_lora(tmp_path / "my.lora.safetensors", trained, kind="kohya")
    name = load_lora(*parts(model), tmp_path / "my.lora.safetensors", 0.3)
    assert adapter_names(*parts(model)) == (name,) == ("my_lora",)
    assert_same(lora_state(*parts(model), name=name), trained)
    remove(*parts(model))


def test_the_text_models_keys_are_those_that_others_read(trained: Lora, tmp_path: Path) -> None:
    for kind in KINDS:
        save_lora(tmp_path / f"{kind}.safetensors", trained, kind=kind)
    theirs, kohyas = (load_file(tmp_path / f"{kind}.safetensors") for kind in KINDS)
    assert "text_encoder.text_model.encoder.layers.0.self_attn.q_proj.lora_A.weight" in theirs
    assert "unet.mid_block.attentions.0.transformer_blocks.0.attn2.to_k.lora_B.weight" in theirs
    stem = "lora_te_text_model_encoder_layers_0_mlp_fc1"
    assert {f"{stem}.lora_down.weight", f"{stem}.lora_up.weight", f"{stem}.alpha"} <= kohyas.keys()
    assert kohyas[f"{stem}.alpha"].item() == 3.0
    assert kohyas["lora_unet_mid_block_resnets_0_conv1.lora_down.weight"].shape == (4, 32, 3, 3)


def test_the_header_tells_rank_alpha_base_and_trigger_words(trained: Lora, tmp_path: Path) -> None:
    headers = {}
    for kind in KINDS:
        save_lora(tmp_path / f"{kind}.safetensors", trained, kind=kind)
        with safe_open(tmp_path / f"{kind}.safetensors", framework="pt") as file:
            headers[kind] = file.metadata()
        assert headers[kind]["modelspec.trigger_phrase"] == "glimmer, a lamp"
        assert headers[kind]["base_model"] == "scenes"
    said = json.loads(headers["diffusers"]["lora_adapter_metadata"])
    assert (said["unet.r"], said["unet.lora_alpha"], said["text_encoder.r"]) == (4, 3.0, 4)
    kohya = headers["kohya"]
    assert (kohya["ss_network_dim"], kohya["ss_network_alpha"], kohya["ss_network_module"]) == (
        "4",
        "3.0",
        "networks.lora",
    )


def test_diffusers_own_converter_takes_the_kohya_file_back_to_our_tensors(trained: Lora, tmp_path: Path) -> None:
    for kind in KINDS:
        save_lora(tmp_path / f"{kind}.safetensors", trained, kind=kind)
    state, alphas = StableDiffusionPipeline.lora_state_dict(tmp_path / "kohya.safetensors", local_files_only=True)
    assert set(alphas.values()) == {3.0}
    unet = convert_unet_state_dict_to_peft({key: x for key, x in state.items() if key.startswith("unet.")})
    text = convert_state_dict_to_peft({key: x for key, x in state.items() if key.startswith("text_encoder.")})
    expected = load_file(tmp_path / "diffusers.safetensors")
    assert (unet | text).keys() == expected.keys()
    assert all(torch.equal(tensor, expected[key]) for key, tensor in (unet | text).items())


@pytest.mark.parametrize("prefix", ["lora_te_text_model_", "lora_te1_text_model_", "lora_te_"])
def test_kohyas_text_keys_are_read_with_every_prefix(
    model: LatentDiffusionPipeline, trained: Lora, prefix: str, tmp_path: Path
) -> None:
    path = tmp_path / "lora.safetensors"
    save_lora(path, trained, kind="kohya")
    tensors = {key.replace("lora_te_text_model_", prefix): tensor for key, tensor in load_file(path).items()}
    save_file(tensors, path)
    assert_same(read_lora(path, *names(model)), trained)


@pytest.mark.parametrize("text_prefix", [True, False])
@pytest.mark.parametrize("older", [True, False])
def test_files_that_diffusers_saves_are_read(
    model: LatentDiffusionPipeline, folder: Path, trained: Lora, older: bool, text_prefix: bool, tmp_path: Path
) -> None:
    if older:  # diffusers reads its own older names for the projections only
        trained = Lora(
            *(
                {key: x for key, x in layers.items() if re.search(r"\.to_|_proj$", key) and "_emb_" not in key}
                for layers in (trained.unet, trained.text_encoder)
            )
        )
    theirs = StableDiffusionPipeline.from_pretrained(folder, local_files_only=True)
    attach_lora(theirs.unet, theirs.text_encoder, trained, name="one")
    states = [get_peft_model_state_dict(network, adapter_name="one") for network in (theirs.unet, theirs.text_encoder)]
    described = [network.peft_config["one"].to_dict() for network in (theirs.unet, theirs.text_encoder)]
    if older:  # the names of diffusers' training scripts; without the header alpha is the rank
        states, described = [convert_state_dict_to_diffusers(state) for state in states], [None, None]
    if text_prefix:
        states[1] = {f"text_model.{key}": tensor for key, tensor in states[1].items()}
    StableDiffusionPipeline.save_lora_weights(
        tmp_path, *states, unet_lora_adapter_metadata=described[0], text_encoder_lora_adapter_metadata=described[1]
    )
    found = read_lora(tmp_path, *names(model))
    expected = [
        {name: replace(layer, alpha=4.0 if older else 3.0) for name, layer in layers.items()}
        for layers in (trained.unet, trained.text_encoder)
    ]
    assert_same(found, Lora(*expected))
    path = tmp_path / "pytorch_lora_weights.safetensors"
    assert np.abs(draw_with(model, path) - diffusers_draws(folder, path)).max() < 1e-5


def test_files_of_one_network_are_read(
    model: LatentDiffusionPipeline, folder: Path, trained: Lora, tmp_path: Path
) -> None:
    """`UNet2DConditionModel.save_lora_adapter` writes no prefixes; a U-Net alone needs no text model."""
    theirs = StableDiffusionPipeline.from_pretrained(folder, local_files_only=True)
    attach_lora(theirs.unet, None, trained, name="one")
    theirs.unet.save_lora_adapter(tmp_path, adapter_name="one")
    found = read_lora(tmp_path, names(model)[0])
    assert_same(found, Lora(trained.unet))
    text_alone = Lora({}, trained.text_encoder)
    save_lora(tmp_path / "text.safetensors", text_alone)
    assert_same(read_lora(tmp_path / "text.safetensors", *names(model)), text_alone)


def test_rank_stabilised_files_are_scaled_by_the_root_of_the_rank(
    model: LatentDiffusionPipeline, trained: Lora, tmp_path: Path
) -> None:
    path = tmp_path / "lora.safetensors"
    save_lora(path, trained)
    said = {"unet.lora_alpha": 3.0, "unet.use_rslora": True, "unet.alpha_pattern": {"mid_block.resnets.0.conv1": 8}}
    save_file(load_file(path), path, metadata={"lora_adapter_metadata": json.dumps(said)})
    found = read_lora(path, *names(model))
    assert found.unet["mid_block.resnets.0.conv1"].alpha == 16.0
    assert found.unet["mid_block.resnets.0.conv2"].alpha == 6.0
    assert {layer.alpha for layer in found.text_encoder.values()} == {4.0}  # no word of it: the rank


DOWN, UP, BIAS = torch.ones(2, 32), torch.ones(32, 2), torch.ones(32)
QUERY = "mid_block.attentions.0.transformer_blocks.0.attn1.to_q"
GOOD = {f"unet.{QUERY}.lora_A.weight": DOWN, f"unet.{QUERY}.lora_B.weight": UP}
KOHYA = "lora_unet_" + QUERY.replace(".", "_")
WRONG = {
    "whole model": ({"conv_in.weight": DOWN}, "found conv_in.weight, which no plain LoRA has"),
    "other model": ({"unet.mid_block.x.lora_A.weight": DOWN}, r"found unet.mid_block.x.lora_A.weight, a layer that"),
    "SDXL": ({f"{KOHYA}.lora_down.weight": DOWN, "lora_te2_x.alpha": UP}, "found lora_te2_x.alpha, a layer that"),
    "LoHa": ({f"{KOHYA}.hada_w1_a": DOWN}, f"found {KOHYA}.hada_w1_a, which no plain LoRA has"),
    "DoRA": (GOOD | {f"unet.{QUERY}.lora_magnitude_vector": BIAS}, "lora_magnitude_vector, which no plain LoRA has"),
    "biases": (GOOD | {f"unet.{QUERY}.lora_B.bias": BIAS}, "lora_B.bias, which no plain LoRA has"),
    "half": ({f"unet.{QUERY}.lora_B.weight": UP}, "without its other half"),
    "whole numbers": ({key: tensor.int() for key, tensor in GOOD.items()}, "lora_A.weight of shape"),
    "ranks": (GOOD | {f"unet.{QUERY}.lora_B.weight": torch.ones(32, 3)}, "lora_A.weight of shape"),
    "widths": (GOOD | {f"unet.{QUERY}.lora_A.weight": torch.ones(2, 48)}, "this model's layer takes"),
    "convolution": (
        {key: tensor[..., None, None] for key, tensor in GOOD.items()},
        r"lora_A.weight of shape \[2, 32, 1, 1\]",
    ),
    "alpha": (
        {f"{KOHYA}.lora_down.weight": DOWN, f"{KOHYA}.lora_up.weight": UP, f"{KOHYA}.alpha": BIAS},
        f"alpha of {KOHYA}",
    ),
    "nothing": ({}, "found no tensors"),
}


@pytest.mark.parametrize(("tensors", "message"), WRONG.values(), ids=WRONG)
def test_a_wrong_file_is_one_line_and_changes_nothing(
    model: LatentDiffusionPipeline, tensors: dict[str, Tensor], message: str, tmp_path: Path
) -> None:
    path = tmp_path / "wrong.safetensors"
    save_file(tensors, path)
    with pytest.raises(UserError, match=message) as caught:
        load_lora(*parts(model), path)
    assert "\n" not in str(caught.value)
    assert str(caught.value).startswith(f"{path}: ")
    assert adapter_names(*parts(model)) == ()


@pytest.mark.parametrize(
    "said",
    ["{", "[1]", '{"unet.lora_alpha": "x"}', '{"unet.alpha_pattern": {"(a+)+$": 1}}', '{"unet.alpha_pattern": 3}'],
)
def test_a_wrong_header_is_one_line(model: LatentDiffusionPipeline, said: str, tmp_path: Path) -> None:
    save_file(GOOD, tmp_path / "wrong.safetensors", metadata={"lora_adapter_metadata": said})
    with pytest.raises(UserError):
        load_lora(*parts(model), tmp_path / "wrong.safetensors")
    assert adapter_names(*parts(model)) == ()


def test_what_is_no_safetensors_file_is_one_line(model: LatentDiffusionPipeline, tmp_path: Path) -> None:
    for name, content in {"text": b"hello", "zip.bin": b"PK\x03\x04" + bytes(100), "empty": b""}.items():
        (tmp_path / name).write_bytes(content)
    for name in ("text", "zip.bin", "empty", "missing.safetensors", "."):
        with pytest.raises(UserError, match=r"no such file|found no (safetensors file|lora.safetensors)"):
            load_lora(*parts(model), tmp_path / name)


@settings(max_examples=150, deadline=None)
@given(data=st.data())
def test_a_damaged_file_loads_or_is_one_line(data: st.DataObject, tmp_path_factory: pytest.TempPathFactory) -> None:
    path = tmp_path_factory.getbasetemp() / "damaged.safetensors"
    save_file(GOOD, path, metadata={"lora_adapter_metadata": '{"unet.r": 2, "unet.lora_alpha": 2}'})
    content = bytearray(path.read_bytes())
    header = 8 + int.from_bytes(content[:8], "little")
    for place in data.draw(st.lists(st.integers(0, header), max_size=4)):
        content[place] = data.draw(st.integers(0, 255))
    path.write_bytes(content[: data.draw(st.integers(0, len(content)))])
    try:
        read_lora(path, [QUERY])
    except UserError as error:
        assert "\n" not in str(error)


def test_saving_is_whole_or_not_at_all(trained: Lora, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "lora.safetensors"
    path.write_bytes(b"the former one")

    def full(*arguments: Any, **options: Any) -> None:
        Path(arguments[1]).write_bytes(b"half")
        raise OSError("No space left on device")

    with monkeypatch.context() as patch:
        patch.setattr("ldm.lora_files.save_file", full)
        with pytest.raises(UserError, match="cannot be written: No space left"):
            save_lora(path, trained)
    assert path.read_bytes() == b"the former one"
    assert [file.name for file in tmp_path.iterdir()] == ["lora.safetensors"]
    for wrong in (tmp_path / "lora.bin", tmp_path / "no" / "such.safetensors"):
        with pytest.raises(UserError, match=str(wrong)):
            save_lora(wrong, trained)
    with pytest.raises(UserError, match="without layers"):
        save_lora(path, Lora({}))
