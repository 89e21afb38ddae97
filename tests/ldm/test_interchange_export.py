from __future__ import annotations

import hashlib
import json
import shutil
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from accelerate import init_empty_weights
from diffusers import AutoencoderKL, StableDiffusionPipeline, UNet2DConditionModel
from safetensors import safe_open
from safetensors.torch import load_file
from transformers import CLIPTextConfig, CLIPTextModel

from ldm.errors import UserError
from ldm.interchange.export import export
from ldm.interchange.model_card import write_model_card
from ldm.interchange.recognised import architecture_id, sizes_of, warnings_for
from ldm.interchange.single_file import STANDARD_NOISE, read_single_file
from ldm.interchange.single_file_writer import write_single_file
from ldm.noise import NoiseConfig
from ldm.pipeline import LatentDiffusionPipeline
from ldm.pipeline_folder import Components, read_components

MakePipeline = Callable[..., LatentDiffusionPipeline]


@pytest.fixture(scope="module")
def folder(tiny_pipeline: LatentDiffusionPipeline, tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("saved") / "model"
    tiny_pipeline.save_pretrained(path)
    return path


def header(path: Path) -> dict[str, str]:
    with safe_open(path, "pt") as file:
        return file.metadata()


def components_of(pipe: LatentDiffusionPipeline) -> Components:
    return Components(
        pipe.vae, pipe.unet, pipe.noise_scheduler, pipe.text_encoder, pipe.semantic_encoder, pipe.label_encoder
    )


def test_there_and_back_again(folder: Path, tmp_path: Path) -> None:
    warnings = export(folder, tmp_path / "model.safetensors", "single-file")
    assert len(warnings) == 1
    assert "found text of width 16" in warnings[0]
    assert export(tmp_path / "model.safetensors", tmp_path / "again", "diffusers") == []
    for path in folder.rglob("*.safetensors"):
        ours, theirs = load_file(tmp_path / "again" / path.relative_to(folder)), load_file(path)
        assert ours.keys() == theirs.keys()
        assert all(torch.equal(ours[name], theirs[name]) for name in ours)
    pipe = StableDiffusionPipeline.from_pretrained(tmp_path / "again", local_files_only=True)
    assert pipe.unet.config.sample_size == 16
    assert (tmp_path / "again" / "README.md").is_file()


@pytest.mark.parametrize(("name", "dtype"), [("fp16", torch.float16), ("bf16", torch.bfloat16)])
def test_a_folder_in_half_precision(folder: Path, name: str, dtype: torch.dtype, tmp_path: Path) -> None:
    export(folder, tmp_path / "half", "diffusers", name)
    files = list((tmp_path / "half").rglob("*.safetensors"))
    assert len(files) == 3
    for path in files:
        assert {tensor.dtype for tensor in load_file(path).values()} == {dtype}
    again, whole = read_components(tmp_path / "half"), read_components(folder)
    for ours, theirs in zip(again.unet.parameters(), whole.unet.parameters(), strict=True):
        assert torch.equal(ours, theirs.to(dtype).float())


def test_the_header_follows_modelspec(tiny_pipeline: LatentDiffusionPipeline, tmp_path: Path) -> None:
    path = tmp_path / "cats.safetensors"
    write_single_file(components_of(tiny_pipeline), path, metadata={"author": "me", "other.key": "1"})
    found = header(path)
    content = path.read_bytes()
    data = content[8 + int.from_bytes(content[:8], "little") :]
    assert found["modelspec.hash_sha256"] == f"0x{hashlib.sha256(data).hexdigest()}"
    assert found["modelspec.sai_model_spec"] == "1.0.0"
    assert found["modelspec.title"] == "cats"
    assert found["modelspec.author"] == "me"
    assert found["other.key"] == "1"
    assert found["modelspec.resolution"] == "32x32"
    assert found["modelspec.prediction_type"] == "v"
    assert found["modelspec.architecture"] == "latent-diffusion"
    with pytest.raises(UserError, match="hash_sha256, which is computed"):
        write_single_file(components_of(tiny_pipeline), path, metadata={"hash_sha256": "0x0"})


def test_what_the_layout_cannot_hold(make_pipeline: MakePipeline, tmp_path: Path) -> None:
    path = tmp_path / "model.safetensors"
    for options, expected in (
        ({"semantic": True}, "found a model that takes a semantic map"),
        ({"label": True}, "found a model that takes labels"),
        ({"kind": "vq"}, "found a VQModel"),
        ({"text": False}, "found a model without text"),
    ):
        with pytest.raises(UserError, match=expected):
            write_single_file(components_of(make_pipeline(NoiseConfig(), **options)), path)  # type: ignore[arg-type]
    assert list(tmp_path.iterdir()) == []


def test_networks_that_the_layout_cannot_hold(make_pipeline: MakePipeline, tmp_path: Path) -> None:
    components = components_of(make_pipeline(NoiseConfig()))
    sizes: dict[str, Any] = {"block_out_channels": (16, 32), "norm_num_groups": 8, "cross_attention_dim": 16}
    blocks: dict[str, Any] = {
        "down_block_types": ("CrossAttnDownBlock2D",) * 2,
        "up_block_types": ("CrossAttnUpBlock2D",) * 2,
        "attention_head_dim": 2,
    }
    for change, expected in (
        ({"only_cross_attention": (True, True)}, "found only_cross_attention"),
        ({"act_fn": "gelu"}, "found act_fn gelu; allowed is silu"),
        ({"layers_per_block": (1, 2)}, r"found layers_per_block \(1, 2\)"),
        ({"num_class_embeds": 3}, "found weight class_embedding.weight"),
        ({"time_embedding_type": "fourier"}, "found weight time_proj.weight|found time_embedding_type"),
    ):
        unet = UNet2DConditionModel(**(sizes | blocks | {"layers_per_block": 1} | change))
        with pytest.raises(UserError, match=expected):
            write_single_file(replace(components, unet=unet), tmp_path / "model.safetensors")
    vae = AutoencoderKL(block_out_channels=(8,), norm_num_groups=4, shift_factor=0.1)
    with pytest.raises(UserError, match="found shift_factor"):
        write_single_file(replace(components, vae=vae), tmp_path / "model.safetensors")
    assert components.text_encoder is not None
    components.text_encoder.tokenizer.add_tokens(["<mine>"])
    with pytest.raises(UserError, match="found a tokenizer of 49409 tokens"):
        write_single_file(components, tmp_path / "model.safetensors")


def test_a_file_is_written_whole_or_not_at_all(make_pipeline: MakePipeline, tmp_path: Path) -> None:
    components = components_of(make_pipeline(NoiseConfig()))
    path = tmp_path / "model.safetensors"
    path.write_text("as it was")
    with torch.no_grad():
        components.unet.conv_in.weight[0] = 1e6
    with pytest.raises(UserError, match="beyond float16's range; allowed is bf16 or fp32"):
        write_single_file(components, path, dtype=torch.float16)
    assert path.read_text() == "as it was"
    assert list(tmp_path.iterdir()) == [path]
    for wrong, expected in (
        (tmp_path / "model.ckpt", "found the ending .ckpt; allowed is .safetensors"),
        (path / "below.safetensors", "cannot be written"),
    ):
        with pytest.raises(UserError, match=expected):
            write_single_file(components, wrong)
    write_single_file(components, path)
    assert torch.equal(read_single_file(path).unet.conv_in.weight, components.unet.conv_in.weight)


def test_arguments(folder: Path, tmp_path: Path) -> None:
    with pytest.raises(UserError, match="dtype: found int8; allowed is"):
        export(folder, tmp_path / "x", "diffusers", "int8")
    with pytest.raises(UserError, match="kind: found 'lora'"):
        export(folder, tmp_path / "x", "lora")  # type: ignore[arg-type]
    with pytest.raises(UserError, match="no such folder"):
        export(tmp_path / "nothing", tmp_path / "x", "diffusers")


# What ComfyUI and A1111 recognise


def full(family: str, **changes: Any) -> dict[str, Any]:
    one = family == "1"
    options: dict[str, Any] = {"cross_attention_dim": 768 if one else 1024, "use_linear_projection": not one}
    options |= {"attention_head_dim": 8 if one else (5, 10, 20, 20)} | changes
    text = {"num_hidden_layers": 12, "num_attention_heads": 12, "hidden_act": "quick_gelu", "hidden_size": 768}
    if not one:
        text = {"num_hidden_layers": 23, "num_attention_heads": 16, "hidden_act": "gelu", "hidden_size": 1024}
    levels: dict[str, Any] = {
        "down_block_types": ("DownEncoderBlock2D",) * 4,
        "up_block_types": ("UpDecoderBlock2D",) * 4,
    }
    with init_empty_weights():
        unet = UNet2DConditionModel(**options)
        vae = AutoencoderKL(block_out_channels=(128, 256, 512, 512), layers_per_block=2, **levels)
        model = CLIPTextModel(CLIPTextConfig(**text))
    return sizes_of(unet, vae, model, "transformers" if one else "openclip", 77)


def test_the_sizes_of_stable_diffusion_give_no_warning() -> None:
    v = NoiseConfig(schedule="scaled_linear", prediction="v_prediction")
    one, two = full("1"), full("2")
    assert warnings_for(one, STANDARD_NOISE, 0.18215, False) == []
    assert warnings_for(full("1", in_channels=9), STANDARD_NOISE, 0.18215, False) == []
    assert warnings_for(two, STANDARD_NOISE, 0.18215, False) == []
    assert warnings_for(two, v, 0.18215, True) == []
    assert architecture_id(one, STANDARD_NOISE, inpainting=False) == "stable-diffusion-v1"
    assert architecture_id(two, STANDARD_NOISE, inpainting=False) == "stable-diffusion-v2-512"
    assert architecture_id(two, v, inpainting=False) == "stable-diffusion-v2-768-v"
    assert architecture_id(two, STANDARD_NOISE, inpainting=True) == "stable-diffusion-v2-inpainting"


def test_each_deviation_is_named() -> None:
    one, cosine = full("1"), NoiseConfig(zero_terminal_snr=True)
    (line,) = warnings_for(full("1", block_out_channels=(160, 320, 640, 640)), STANDARD_NOISE, 0.18215, False)
    assert "channels (160, 320, 640, 640) (theirs (320, 640, 1280, 1280))" in line
    (line,) = warnings_for(one, STANDARD_NOISE, 1.0, False)
    assert "scale latents by 0.18215, found 1" in line
    lines = warnings_for(one, cosine, 0.18215, False)
    assert [word in line for word, line in zip(("schedule", "v_prediction", "terminal"), lines, strict=True)] == [
        True
    ] * 3
    (line,) = warnings_for(full("2"), STANDARD_NOISE, 0.18215, True)
    assert "takes the file to predict v, found epsilon" in line


# Folders of others


def test_sharded_folders_are_read(folder: Path, tiny_pipeline: LatentDiffusionPipeline, tmp_path: Path) -> None:
    shutil.copytree(folder, tmp_path / "model")
    for part, network in (("unet", tiny_pipeline.unet), ("vae", tiny_pipeline.vae)):
        (tmp_path / "model" / part / "diffusion_pytorch_model.safetensors").unlink()
        network.save_pretrained(tmp_path / "model" / part, max_shard_size="100KB")
    shards = sorted((tmp_path / "model" / "unet").glob("*-of-*.safetensors"))
    assert len(shards) > 2
    again = read_components(tmp_path / "model")
    for name, weight in tiny_pipeline.unet.state_dict().items():
        assert torch.equal(again.unet.state_dict()[name], weight)
    shards[1].unlink()
    with pytest.raises(UserError, match=shards[1].name) as error:
        read_components(tmp_path / "model")
    assert "\n" not in str(error.value)


def test_half_precision_folders_are_read_into_float32(folder: Path, tmp_path: Path) -> None:
    export(folder, tmp_path / "half", "diffusers", "fp16")
    again = read_components(tmp_path / "half")
    assert again.text_encoder is not None
    assert {again.unet.dtype, again.vae.dtype, again.text_encoder.model.dtype} == {torch.float32}


# The model card


@pytest.fixture
def run(folder: Path, tmp_path: Path) -> Path:
    """A run's folder as training leaves it."""
    shutil.copytree(folder, tmp_path / "cats" / "pipeline")
    (tmp_path / "vae").mkdir()
    (tmp_path / "vae" / "report.json").write_text(json.dumps({"psnr": 28.5, "measured_on": "validation_data"}))
    config = {
        "autoencoder": str(tmp_path / "vae" / "autoencoder"),
        "data": {"source": "folder", "root": "/home/somebody/cats", "resolution": 32},
        "training": {"steps": 2000, "batch_size": 32, "accumulation": 1},
        "seed": 3,
    }
    (tmp_path / "cats" / "config.yaml").write_text(yaml.safe_dump(config))
    lines = ['{"step": 9, "loss": 0.5, "timing": {"x": 1}}', '{"step": 10, "validation/loss": 0.25}', '{"step": 1']
    (tmp_path / "cats" / "metrics.jsonl").write_text("\n".join(lines))
    return tmp_path / "cats"


def test_the_card_tells_data_config_and_measures(run: Path, tmp_path: Path) -> None:
    text = write_model_card(run / "pipeline", license="mit").read_text()
    _, matter, body = text.split("---\n", 2)
    assert yaml.safe_load(matter) == {
        "library_name": "diffusers",
        "pipeline_tag": "text-to-image",
        "tags": ["latent-diffusion", "diffusers"],
        "license": "mit",
    }
    for line in (
        "# cats",
        'pipe = StableDiffusionPipeline.from_pretrained("pipeline")',
        "- Data: folder, `cats`, at 32 pixels",
        "- Steps: 2000",
        "- Seed: 3",
        "| validation/loss | 0.25 |",
        "| autoencoder/psnr | 28.5 |",
    ):
        assert line in body.splitlines()
    assert "in_channels 4; block_out_channels [16, 32]" in body
    assert "somebody" not in text
    export(run, tmp_path / "out", "diffusers")
    assert "| validation/loss | 0.25 |" in (tmp_path / "out" / "README.md").read_text()


def test_the_card_of_a_model_alone(folder: Path, make_pipeline: MakePipeline, tmp_path: Path) -> None:
    text = write_model_card(folder, title="Mine").read_text()
    assert "# Mine" in text
    assert "## Training" not in text
    make_pipeline(NoiseConfig(), semantic=True).save_pretrained(tmp_path / "ours")
    assert "library_name: ldm" in write_model_card(tmp_path / "ours").read_text()
    (tmp_path / "config.yaml").write_text("{")
    with pytest.raises(UserError, match=r"config\.yaml"):
        write_model_card(tmp_path / "ours")
    with pytest.raises(UserError, match=r"model_index\.json"):
        write_model_card(tmp_path / "nothing")
