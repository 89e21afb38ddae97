from __future__ import annotations

import random
import zipfile
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from ldm.errors import UserError
from ldm.interchange.hints import Hints
from ldm.interchange.single_file import read_single_file
from ldm.interchange.single_file_writer import write_single_file
from ldm.pipeline import LatentDiffusionPipeline
from ldm.pipeline_folder import Components

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
