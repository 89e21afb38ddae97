from __future__ import annotations

import io
import json
import random
import shutil
import zipfile
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from ldm.cli.main import main
from ldm.errors import UserError
from ldm.interchange.hints import Hints
from ldm.interchange.single_file import read_single_file
from ldm.interchange.single_file_writer import write_single_file
from ldm.noise import NoiseConfig
from ldm.pipeline import LatentDiffusionPipeline
from ldm.pipeline_folder import Components, read_components

CONV_IN = "model.diffusion_model.input_blocks.0.0.weight"
HINTS = Hints(heads=(2, 2), norm_groups=8, vae_norm_groups=4, text_heads=2)
Tensors = dict[str, Tensor]


@pytest.fixture(scope="module")
def components(tiny_pipeline: LatentDiffusionPipeline) -> Components:
    pipe = tiny_pipeline
    return Components(pipe.vae, pipe.unet, pipe.noise_scheduler, pipe.text_encoder)


@pytest.fixture(scope="module")
def path(components: Components, tmp_path_factory: pytest.TempPathFactory) -> Path:
    file = tmp_path_factory.mktemp("file") / "model.safetensors"
    write_single_file(components, file)
    return file


@pytest.fixture(scope="module")
def tensors(path: Path) -> Tensors:
    return load_file(path)


def refusal(path: Path, *, allow_pickle: bool = False, hints: Hints = HINTS) -> str:
    with pytest.raises(UserError) as error:
        read_single_file(path, allow_pickle=allow_pickle, hints=hints)
    message = str(error.value)
    assert "\n" not in message
    assert str(path) in message
    return message


def without(*keys: str) -> Callable[[Tensors], Tensors]:
    return lambda tensors: {key: value for key, value in tensors.items() if key not in keys}


def with_(key: str, tensor: Tensor) -> Callable[[Tensors], Tensors]:
    return lambda tensors: tensors | {key: tensor}


def only(prefix: str) -> Callable[[Tensors], Tensors]:
    return lambda tensors: {key: value for key, value in tensors.items() if key.startswith(prefix)}


TOKENS = "cond_stage_model.transformer.text_model.embeddings.token_embedding.weight"
NORM = "model.diffusion_model.input_blocks.1.0.in_layers.0.weight"
CHANGES: list[tuple[str, Callable[[Tensors], Tensors], str]] = [
    ("one missing", without(NORM), f"missing are 1 tensors ({NORM})"),
    (
        "five missing",
        lambda tensors: {
            key: value
            for key, value in tensors.items()
            if "decoder.mid.block_1.n" not in key and key != "first_stage_model.decoder.norm_out.bias"
        },
        "missing are 5 tensors (first_stage_model.",
    ),
    ("first missing", without(CONV_IN), "found input_blocks.0.0.weight missing"),
    ("wrong shape", with_(NORM, torch.ones(17)), f"found {NORM} [17]; allowed beside the others is [16]"),
    ("whole numbers", with_(NORM, torch.ones(16, dtype=torch.int32)), "of whole numbers"),
    (
        "labels",
        with_("model.diffusion_model.label_emb.0.0.weight", torch.ones(4, 4)),
        "unexpected are 1 tensors (model.diffusion_model.label_emb.0.0.weight)",
    ),
    ("vq", with_("first_stage_model.quantize.embedding.weight", torch.ones(4, 4)), "VQ autoencoder"),
    (
        "no text",
        lambda tensors: only("model.")(tensors) | only("first_")(tensors),
        "no text encoder (cond_stage_model.*)",
    ),
    ("autoencoder alone", only("first_stage_model."), "no U-Net (model.diffusion_model.*) and text encoder"),
    ("sdxl", with_("conditioner.embedders.0.x", torch.ones(1)), "Stable Diffusion XL"),
    ("a lora", lambda _: {"lora_unet_x.lora_down.weight": torch.ones(4, 4)}, "among its 1 tensors (lora_unet_x"),
    ("another vocabulary", lambda t: t | {TOKENS: torch.ones(100, 16)}, "found a vocabulary of 100 tokens"),
    ("empty", with_("x", torch.ones(0, 1 << 40)), "allowed is no empty tensor"),
    ("no scale", with_("scale_factor", torch.tensor(float("nan"))), "found scale_factor nan"),
    ("other input", with_(CONV_IN, torch.ones(16, 8, 3, 3)), "found a U-Net of 8 input and 4 output channels"),
    ("gap", with_("model.diffusion_model.input_blocks.1.0.op.weight", torch.ones(1)), "residual blocks on its levels"),
]


@pytest.mark.parametrize(("change", "expected"), [case[1:] for case in CHANGES], ids=[case[0] for case in CHANGES])
def test_a_checkpoint_that_is_none_is_named(
    tensors: Tensors, change: Callable[[Tensors], Tensors], expected: str, tmp_path: Path
) -> None:
    save_file({key: value.clone() for key, value in change(tensors).items()}, tmp_path / "file.safetensors")
    assert expected in refusal(tmp_path / "file.safetensors")


@pytest.mark.parametrize(
    ("hints", "expected"),
    [
        (Hints(), "norm_groups: found 32"),
        (Hints(norm_groups=8), "vae_norm_groups: found 32"),
        (Hints(norm_groups=8, heads=(2,)), "heads: found 1 numbers"),
        (Hints(norm_groups=8, heads=(5, 5)), "heads: found 5"),
        (Hints(norm_groups=8, vae_norm_groups=4, text_heads=3), "text_heads: found 3"),
        (Hints(norm_groups=8, vae_norm_groups=4, text_length=99), "found 99 tokens"),
    ],
)
def test_what_the_rules_get_wrong_names_the_hint(tensors: Tensors, hints: Hints, expected: str, tmp_path: Path) -> None:
    save_file(tensors, tmp_path / "file.safetensors")
    assert expected in refusal(tmp_path / "file.safetensors", hints=hints)


@pytest.mark.parametrize("text", ["{", "[]", '{"heads": "x"}', '{"noise": 3}', '{"other": 1}', "[" * 100_000])
def test_a_header_that_says_nonsense(tensors: Tensors, text: str, tmp_path: Path) -> None:
    save_file(tensors, tmp_path / "file.safetensors", metadata={"ldm.hints": text})
    with pytest.raises(UserError, match=r"ldm\.hints cannot be used") as error:
        read_single_file(tmp_path / "file.safetensors")
    assert "\n" not in str(error.value)


def test_files_that_are_no_safetensors(path: Path, tmp_path: Path) -> None:
    whole = path.read_bytes()
    cases = {
        "empty": b"",
        "short": b"\x05",
        "text": b"<!DOCTYPE html><html>not found</html>",
        "truncated": whole[: len(whole) // 2],
        "header alone": whole[: 8 + int.from_bytes(whole[:8], "little")],
        "longer": whole + b"x",
        "huge header": b"\xff\xff\xff\xff\xff\xff\xff\x7f" + whole[8:],
        "no json": whole[:8] + b"x" + whole[9:],
    }
    for name, content in cases.items():
        file = tmp_path / f"{name}.safetensors"
        file.write_bytes(content)
        assert "no whole safetensors file" in refusal(file), name
    assert "No such file" in refusal(tmp_path / "nothing.safetensors")
    assert "Is a directory" in refusal(tmp_path)


def test_a_fuzzed_header_is_read_or_refused(path: Path, tmp_path: Path) -> None:
    whole, generator = path.read_bytes(), random.Random(0)
    end, refused = 8 + int.from_bytes(whole[:8], "little"), 0
    for number in range(60):
        content = bytearray(whole)
        for _ in range(generator.choice((1, 2, 8))):
            content[generator.randrange(end)] = generator.choice(b'0123456789"{}[]:,.aFI\x00\xff')
        file = tmp_path / f"{number}.safetensors"
        file.write_bytes(content)
        try:
            read_single_file(file)
        except UserError as error:
            assert "\n" not in str(error)
            refused += 1
        file.unlink()
    assert refused > 30


# Pickles


def test_a_ckpt_is_opened_only_when_allowed(components: Components, tensors: Tensors, tmp_path: Path) -> None:
    file = tmp_path / "model.ckpt"
    torch.save({"state_dict": tensors, "global_step": 7}, file)
    assert "allow it with allow_pickle" in refusal(file)
    mislabelled = tmp_path / "model.safetensors"
    mislabelled.write_bytes(file.read_bytes())
    assert "found a pickle" in refusal(mislabelled)
    again = read_single_file(file, allow_pickle=True, hints=HINTS)
    for name, weight in components.unet.state_dict().items():
        assert torch.equal(again.unet.state_dict()[name], weight)


def test_a_pickle_runs_nothing(tensors: Tensors, tmp_path: Path) -> None:
    witness = tmp_path / "witness"

    class Touch:
        def __reduce__(self) -> tuple[object, tuple[object, ...]]:
            return Path.touch, (witness,)

    file = tmp_path / "model.ckpt"
    torch.save({"state_dict": tensors, "callback": Touch()}, file)
    assert "no checkpoint of tensors alone" in refusal(file, allow_pickle=True)
    torch.save({"state_dict": tensors, "callback": Touch()}, file, _use_new_zipfile_serialization=False)
    assert "no checkpoint of tensors alone" in refusal(file, allow_pickle=True)
    assert not witness.exists()


def test_a_pickle_cannot_grow(tensors: Tensors, tmp_path: Path) -> None:
    plain, packed = tmp_path / "plain.ckpt", tmp_path / "packed.ckpt"
    torch.save({"state_dict": tensors}, plain)
    with zipfile.ZipFile(plain) as archive, zipfile.ZipFile(packed, "w", zipfile.ZIP_DEFLATED) as out:
        for name in archive.namelist():
            out.writestr(name, archive.read(name))
    assert "compressed records" in refusal(packed, allow_pickle=True)
    repeated = tmp_path / "repeated.ckpt"
    torch.save({CONV_IN: torch.zeros(1).expand(1 << 20, 1 << 20)}, repeated)
    assert "not opened" in refusal(repeated, allow_pickle=True)
    truncated = tmp_path / "truncated.ckpt"
    truncated.write_bytes(plain.read_bytes()[:10_000])
    assert "no checkpoint of tensors alone" in refusal(truncated, allow_pickle=True)
    other = tmp_path / "other.ckpt"
    torch.save([1, 2], other)
    assert "among its 0 tensors" in refusal(other, allow_pickle=True)


# Folders


UNET, VAE, TEXT = "unet/diffusion_pytorch_model", "vae/diffusion_pytorch_model", "text_encoder/model"


@pytest.fixture
def folder(tiny_folder: Path) -> Path:
    return tiny_folder


@pytest.fixture
def copy(folder: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(folder, tmp_path / "model"))


def as_pickle(content: object) -> bytes:
    buffer = io.BytesIO()
    torch.save(content, buffer)
    return buffer.getvalue()


Damage = Callable[[Path], object]


def weights(name: str, change: Callable[[bytes], bytes]) -> Damage:
    def damage(folder: Path) -> None:
        path = folder / f"{name}.safetensors"
        path.write_bytes(change(path.read_bytes()))

    return damage


def tensors_of(name: str, change: Callable[[Tensors], Tensors]) -> Damage:
    def damage(folder: Path) -> None:
        path = folder / f"{name}.safetensors"
        save_file(change({key: value.clone() for key, value in load_file(path).items()}), path)

    return damage


def setting(name: str, **changes: object) -> Damage:
    def damage(folder: Path) -> None:
        path = folder / name
        path.write_text(json.dumps(json.loads(path.read_text()) | changes))

    return damage


def text_of(name: str, content: bytes) -> Damage:
    return lambda folder: (folder / name).write_bytes(content)


def only_a_pickle(folder: Path) -> None:
    (folder / f"{UNET}.safetensors").rename(folder / f"{UNET}.bin")


LFS = b"version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 3\n"
MODEL = b'{"version": "1.0", "added_tokens": [], "model": {"type": "BPE", "vocab": {"a": 0}, "merges": [["b", "c"]]}}'
FOLDERS: dict[str, tuple[Damage, str]] = {
    "truncated U-Net": (weights(UNET, lambda data: data[:-100]), "unet.*found no whole safetensors file"),
    "truncated autoencoder": (weights(VAE, lambda data: data[:1000]), "vae.*found no whole safetensors file"),
    "truncated text encoder": (weights(TEXT, lambda data: data[:-1]), "text_encoder.*found no whole safetensors file"),
    "wrong header": (weights(UNET, lambda data: b"\xff" * 8 + data[8:]), "found no whole safetensors file"),
    "pickle": (weights(UNET, lambda data: as_pickle({"conv_in.bias": torch.ones(1)})), "found no whole safetensors"),
    "pickle alone": (only_a_pickle, "found diffusion_pytorch_model.bin, a pickle"),
    "pointer": (weights(VAE, lambda data: LFS), "run git lfs pull"),
    "mislabelled": (
        lambda folder: shutil.copy(folder / f"{TEXT}.safetensors", folder / f"{UNET}.safetensors"),
        r"unet: missing are \d+ weights \(conv_in.bias, conv_in.weight, ",
    ),
    "missing": (tensors_of(UNET, without("conv_in.bias")), r"missing are 1 weights \(conv_in.bias\)"),
    "missing in the autoencoder": (tensors_of(VAE, without("quant_conv.bias")), "quant_conv.bias"),
    "missing in the text encoder": (
        tensors_of(TEXT, without("text_model.final_layer_norm.bias")),
        "final_layer_norm.bias",
    ),
    "shape": (tensors_of(UNET, with_("conv_in.bias", torch.ones(17))), "conv_in.bias"),
    "shape in the autoencoder": (tensors_of(VAE, with_("quant_conv.bias", torch.ones(3))), "quant_conv.bias"),
    "shape in the text encoder": (
        tensors_of(TEXT, with_("text_model.final_layer_norm.bias", torch.ones(3))),
        "final_layer_norm.bias",
    ),
    "config": (text_of("unet/config.json", b"{"), "unet/config.json"),
    "config of another kind": (text_of("vae/config.json", b"[]"), "found no table of settings"),
    "endless blocks": (setting("unet/config.json", layers_per_block=10**9), "found layers_per_block 1000000000"),
    "endless text": (setting("text_encoder/config.json", num_hidden_layers=10**9), "found num_hidden_layers"),
    "endless noise": (setting("scheduler/scheduler_config.json", num_train_timesteps=10**12), "num_train_timesteps"),
    "quantised": (setting("unet/config.json", quantization_config={"quant_method": "x"}), "quantization_config"),
    "no groups": (setting("unet/config.json", norm_num_groups=0), "zero"),
    "no scale": (setting("vae/config.json", scaling_factor=0), "found scaling_factor 0"),
    "prediction": (setting("scheduler/scheduler_config.json", prediction_type=5), "found prediction_type 5"),
    "tokenizer": (text_of("tokenizer/tokenizer.json", MODEL), "found a broken tokenizer"),
    "no tokenizer": (text_of("tokenizer/tokenizer.json", b"{"), "model"),
    "text of another width": (setting("text_encoder/config.json", hidden_size=32), "another shape"),
    "index": (text_of("model_index.json", b"[]"), "model_index.json: found no table"),
    "odd index": (setting("model_index.json", text_encoder=5), "model_index.json"),
}


@pytest.mark.parametrize(("damage", "expected"), FOLDERS.values(), ids=FOLDERS)
def test_a_damaged_folder_is_named(
    copy: Path, damage: Damage, expected: str, capfd: pytest.CaptureFixture[str]
) -> None:
    damage(copy)
    with pytest.raises(UserError, match=expected) as error:
        read_components(copy)
    assert "\n" not in str(error.value)
    assert capfd.readouterr().err == ""  # the libraries' own reports have many lines


def test_left_over_weights_are_named(copy: Path, caplog: pytest.LogCaptureFixture) -> None:
    tensors_of(UNET, with_("strange.weight", torch.ones(2)))(copy)
    tensors_of(TEXT, with_("text_model.strange.weight", torch.ones(2)))(copy)
    tensors_of(TEXT, with_("text_model.embeddings.position_ids", torch.arange(16)[None]))(copy)  # as SD 1.5's
    read_components(copy)
    assert [record.getMessage() for record in caplog.records] == [
        f"{copy / 'unet'}: not read are 1 weights (strange.weight), unexpected there",
        f"{copy}: not read are 1 weights that no text model has, such as strange.weight",
    ]


def test_fuzzed_folders_are_read_or_refused(make_pipeline: Callable[..., LatentDiffusionPipeline], tmp_path: Path):
    """Headers of weights, and configs; a model without text, whose tokenizer would take seconds each time."""
    whole, generator, refused = tmp_path / "whole", random.Random(1), 0
    make_pipeline(NoiseConfig(schedule="scaled_linear"), "ddim", text=False).save_pretrained(whole)
    files = [path.relative_to(whole) for path in sorted(whole.rglob("*.*")) if path.is_file()]
    assert len(files) == 6
    for number in range(60):
        name = files[number % len(files)]
        content = bytearray((whole / name).read_bytes())
        end = 8 + int.from_bytes(content[:8], "little") if name.suffix == ".safetensors" else len(content)
        for _ in range(generator.choice((1, 2, 8))):
            content[generator.randrange(end)] = generator.choice(b'0123456789"{}[]:,.aFI\x00\xff')
        folder = Path(shutil.copytree(whole, tmp_path / "fuzzed"))
        (folder / name).write_bytes(content)
        try:
            read_components(folder)
        except UserError as error:
            assert "\n" not in str(error)
            refused += 1
        shutil.rmtree(folder)
    assert refused > 20


# As a user meets them


LORA_KEY = "unet.mid_block.attentions.0.transformer_blocks.0.attn1.to_q"
GOOD_LORA = {f"{LORA_KEY}.lora_A.weight": torch.ones(2, 32), f"{LORA_KEY}.lora_B.weight": torch.ones(32, 2)}


def hostile_model(kind: str, path: Path, folder: Path, to: Path) -> list[str]:
    """Options of `ldm generate` that name something damaged."""
    file = to / "model.safetensors"
    if kind == "truncated file":
        file.write_bytes(path.read_bytes()[:-10])
    elif kind == "wrong header":
        file.write_bytes(b"\xff" * 8 + path.read_bytes()[8:])
    elif kind == "pickle in disguise":
        file.write_bytes(as_pickle({CONV_IN: torch.ones(1)}))
    elif kind == "pickle":
        file = to / "model.ckpt"
        file.write_bytes(as_pickle({CONV_IN: torch.ones(1)}))
    elif kind == "wrong shapes":
        save_file(load_file(path) | {NORM: torch.ones(17)}, file)
    elif kind == "zip bomb":
        file = to / "model.ckpt"
        with zipfile.ZipFile(file, "w", zipfile.ZIP_DEFLATED) as archive:
            archive.writestr("archive/data.pkl", bytes(1 << 24))
        return ["--model", str(file), "--allow-pickle"]
    elif kind == "truncated folder":
        file = Path(shutil.copytree(folder, to / "model"))
        weights(UNET, lambda data: data[:-10])(file)
    elif kind == "autoencoder alone":
        save_file(only("first_stage_model.")(load_file(path)), file)
    else:
        lora = to / "lora.safetensors"
        save_file(
            GOOD_LORA if kind != "LoRA of another shape" else {k: v.T.contiguous() for k, v in GOOD_LORA.items()}, lora
        )
        if kind == "truncated LoRA":
            lora.write_bytes(lora.read_bytes()[:-4])
        elif kind == "pickled LoRA":
            lora.write_bytes(as_pickle(GOOD_LORA))
        return ["--model", str(folder), "--lora", str(lora)]
    return ["--model", str(file)]


@pytest.mark.parametrize(
    "kind",
    [
        *("truncated file", "wrong header", "wrong shapes", "pickle in disguise", "pickle", "zip bomb"),
        *("autoencoder alone", "truncated folder", "truncated LoRA", "pickled LoRA", "LoRA of another shape"),
    ],
)
def test_generate_says_one_line_and_writes_nothing(
    kind: str, path: Path, folder: Path, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    given = hostile_model(kind, path, folder, tmp_path)
    before = sorted(tmp_path.iterdir())
    capfd.readouterr()
    assert main(["generate", *given, "--prompt", "a cat", "--steps", "1", "--out", str(tmp_path / "out")]) == 2
    told = capfd.readouterr()
    assert told.err.count("\n") == 1, told.err
    assert told.err.startswith("ldm generate: ")
    assert "Traceback" not in told.err
    assert told.out == ""
    assert sorted(tmp_path.iterdir()) == before
