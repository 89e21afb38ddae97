from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import open_clip
import pytest
import torch
from accelerate import init_empty_weights
from diffusers import AutoencoderKL, PNDMScheduler, StableDiffusionPipeline, UNet2DConditionModel
from diffusers.loaders import single_file_utils as theirs
from open_clip.model import _build_text_tower
from PIL import Image
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from transformers import CLIPTextConfig, CLIPTextModel

from conditioning.clip_tokenizer import clip_vocabulary_tokenizer
from conditioning.openclip import openclip_to_transformers
from conditioning.text import TextEncoder
from ldm.interchange.export import with_standard_scale
from ldm.interchange.hints import Hints
from ldm.interchange.parts import Part, text_part, unet_part, vae_part
from ldm.interchange.single_file import STANDARD_NOISE, guess_from, read_single_file
from ldm.interchange.single_file_writer import _clip_rest, _openclip_rest, write_single_file
from ldm.noise import NoiseConfig
from ldm.pipeline import LatentDiffusionPipeline
from ldm.pipeline_folder import Components, read_components, write_components
from ldm.sampling import make_scheduler

Written = Callable[[str], tuple[Components, Path]]
SD2_V = NoiseConfig(schedule="scaled_linear", prediction="v_prediction")
ODD_NOISE = NoiseConfig(schedule="cosine", prediction="v_prediction", zero_terminal_snr=True)


@dataclass(frozen=True)
class Recipe:
    """A tiny model of a true architecture."""

    unet: Mapping[str, Any]
    vae: Mapping[str, Any]
    text: str
    noise: NoiseConfig
    scheduler: str = "dpm++"


SD1_UNET: dict[str, Any] = {
    "sample_size": 8,
    "block_out_channels": (32, 64, 64, 64),
    "cross_attention_dim": 32,
    "attention_head_dim": 8,
}
SD2_UNET: dict[str, Any] = {
    "sample_size": 8,
    "block_out_channels": (64, 128, 128, 128),
    "cross_attention_dim": 64,
    "attention_head_dim": (1, 2, 2, 2),
    "use_linear_projection": True,
}
VAE: dict[str, Any] = {
    "block_out_channels": (32, 64, 64, 64),
    "layers_per_block": 2,
    "down_block_types": ("DownEncoderBlock2D",) * 4,
    "up_block_types": ("UpDecoderBlock2D",) * 4,
    "sample_size": 64,
}
ODD_UNET: dict[str, Any] = {
    "sample_size": (12, 8),
    "in_channels": 3,
    "out_channels": 3,
    "block_out_channels": (24, 48, 72),
    "down_block_types": ("DownBlock2D", "CrossAttnDownBlock2D", "CrossAttnDownBlock2D"),
    "up_block_types": ("CrossAttnUpBlock2D", "CrossAttnUpBlock2D", "UpBlock2D"),
    "layers_per_block": 1,
    "transformer_layers_per_block": (1, 2, 1),
    "cross_attention_dim": 48,
    "attention_head_dim": (2, 4, 6),
    "norm_num_groups": 12,
    "use_linear_projection": True,
}
ODD_VAE: dict[str, Any] = {
    "block_out_channels": (8, 24),
    "layers_per_block": 1,
    "down_block_types": ("DownEncoderBlock2D",) * 2,
    "up_block_types": ("UpDecoderBlock2D",) * 2,
    "latent_channels": 3,
    "norm_num_groups": 4,
    "mid_block_add_attention": False,
    "scaling_factor": 1.0,
}
SHORT = {"layers_per_block": 1}
RECIPES = {
    "sd1": Recipe(SD1_UNET, VAE, "clip", STANDARD_NOISE),
    "sd1-inpainting": Recipe(SD1_UNET | {"in_channels": 9} | SHORT, VAE | SHORT, "clip", STANDARD_NOISE, "ddim"),
    "sd2-v": Recipe(SD2_UNET | SHORT, VAE | SHORT, "openclip", SD2_V),
    "sd2-inpainting": Recipe(SD2_UNET | {"in_channels": 9} | SHORT, VAE | SHORT, "openclip", STANDARD_NOISE),
    "odd": Recipe(ODD_UNET, ODD_VAE, "odd", ODD_NOISE, "unipc"),
}


def text_encoder(kind: str) -> TextEncoder:
    if kind == "openclip":
        tower = _build_text_tower(64, {"width": 64, "heads": 1, "layers": 3, "vocab_size": 49408}, False)
        for parameter in tower.parameters():
            nn.init.normal_(parameter, std=0.2)
        return TextEncoder(clip_vocabulary_tokenizer(pad_token="!"), openclip_to_transformers(tower))
    width, layers, heads, length = (32, 2, 1, 77) if kind == "clip" else (48, 5, 3, 16)
    config = CLIPTextConfig(
        vocab_size=49408,
        hidden_size=width,
        intermediate_size=4 * width,
        num_hidden_layers=layers,
        num_attention_heads=heads,
        max_position_embeddings=length,
        bos_token_id=49406,
        eos_token_id=49407,
        pad_token_id=49407,
    )
    return TextEncoder(clip_vocabulary_tokenizer(length), CLIPTextModel(config).eval())


def build(recipe: Recipe) -> Components:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        unet, vae = UNet2DConditionModel(**recipe.unet), AutoencoderKL(**recipe.vae)
        encoder = text_encoder(recipe.text)
    with torch.no_grad():  # make the text count, and the picture no grey one
        for name, weight in unet.named_parameters():
            if "attn2.to_out.0.weight" in name or name == "conv_out.weight":
                weight *= 8
        vae.decoder.conv_out.weight *= 4
    return Components(vae.eval(), unet.eval(), make_scheduler(recipe.scheduler, recipe.noise), encoder)


@pytest.fixture(scope="session")
def written(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], tuple[Components, Path]]:
    """The model of a recipe and the file that we wrote of it, made once."""
    folder = tmp_path_factory.mktemp("files")

    @cache
    def write(name: str) -> tuple[Components, Path]:
        model = build(RECIPES[name])
        write_single_file(model, folder / f"{name}.safetensors")
        return model, folder / f"{name}.safetensors"

    return write


@pytest.fixture(params=RECIPES)
def pair(request: pytest.FixtureRequest, written: Written) -> tuple[Components, Path]:
    return written(request.param)


def networks(components: Components) -> dict[str, nn.Module]:
    assert components.text_encoder is not None
    return {"unet": components.unet, "vae": components.vae, "text": components.text_encoder.model}


def assert_same(found: Mapping[str, Tensor], expected: Mapping[str, Tensor]) -> None:
    assert found.keys() == expected.keys()
    for name, weight in expected.items():
        assert found[name].dtype == weight.dtype
        assert torch.equal(found[name], weight), name


def assert_same_model(found: Components, expected: Components) -> None:
    for (name, network), other in zip(networks(found).items(), networks(expected).values(), strict=True):
        assert_same(network.state_dict(), other.state_dict())
        assert not network.training, name


def pipeline(components: Components) -> LatentDiffusionPipeline:
    return LatentDiffusionPipeline(components.vae, components.text_encoder, components.unet, components.noise_scheduler)


def draw(components: Components) -> np.ndarray:
    call: dict[str, Any] = {"num_inference_steps": 2, "guidance_scale": 3.0, "seed": 5, "output_type": "np"}
    if components.unet.config.in_channels == 9:
        call |= {"image": Image.new("RGB", (64, 64), "blue"), "mask_image": Image.new("L", (64, 64), 255)}
    return pipeline(components)("a red square, café!!", **call).images


def stored(path: Path) -> dict[str, Tensor]:
    return load_file(path)


def bare(path: Path, to: Path, change: Callable[[dict[str, Tensor]], object] | None = None) -> Path:
    """The same tensors with no header, as other programs write them."""
    tensors = load_file(path)
    if change is not None:
        change(tensors)
    save_file(tensors, to)
    return to


# Round trips


def test_a_file_gives_back_every_bit_and_draws_the_same_image(pair: tuple[Components, Path]) -> None:
    model, path = pair
    again = read_single_file(path)
    assert_same_model(again, model)
    image = draw(again)
    assert np.array_equal(image, draw(model))
    assert image.std() > 0.02
    assert again.vae.config.scaling_factor == model.vae.config.scaling_factor
    assert tuple(np.atleast_1d(again.unet.config.sample_size)) == tuple(np.atleast_1d(model.unet.config.sample_size))
    assert type(again.noise_scheduler) is type(model.noise_scheduler)
    assert again.noise_scheduler.config == model.noise_scheduler.config


@pytest.mark.parametrize("name", ["sd1-inpainting", "sd2-inpainting"])
def test_folder_to_file_to_folder(written: Written, name: str, tmp_path: Path) -> None:
    model, _ = written(name)
    write_components(model, tmp_path / "one")
    write_single_file(read_components(tmp_path / "one"), tmp_path / "model.safetensors")
    write_components(read_single_file(tmp_path / "model.safetensors"), tmp_path / "two")
    names = sorted(path.relative_to(tmp_path / "one") for path in (tmp_path / "one").rglob("*.safetensors"))
    assert len(names) == 3
    for file in names:
        assert_same(load_file(tmp_path / "two" / file), load_file(tmp_path / "one" / file))
    index = "model_index.json"
    assert (tmp_path / "two" / index).read_text() == (tmp_path / "one" / index).read_text()


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_precision_is_read_into_float32(written: Written, dtype: torch.dtype, tmp_path: Path) -> None:
    stable_diffusion_2, _ = written("sd2-inpainting")
    write_single_file(stable_diffusion_2, tmp_path / "model.safetensors", dtype=dtype)
    kinds = {tensor.dtype for tensor in stored(tmp_path / "model.safetensors").values()}
    assert kinds == {dtype}
    again = read_single_file(tmp_path / "model.safetensors")
    for (_, ours), network in zip(networks(again).items(), networks(stable_diffusion_2).values(), strict=True):
        assert_same(ours.state_dict(), {key: value.to(dtype).float() for key, value in network.state_dict().items()})


def test_the_text_of_an_openclip_tower_survives(written: Written, tmp_path: Path) -> None:
    torch.manual_seed(3)
    tower = _build_text_tower(64, {"width": 64, "heads": 1, "layers": 3, "vocab_size": 49408}, False).eval()
    components, _ = written("sd2-inpainting")
    encoder = TextEncoder(clip_vocabulary_tokenizer(pad_token="!"), openclip_to_transformers(tower))
    write_single_file(replace(components, text_encoder=encoder), tmp_path / "model.safetensors")
    again = read_single_file(tmp_path / "model.safetensors").text_encoder
    prompts = ["a cat!!!", "", "caf\u00e9 \U0001f600 " * 40]
    tokens = open_clip.tokenize(prompts)
    assert again is not None
    assert torch.equal(again.tokenize(prompts), tokens)
    hidden = tower.token_embedding(tokens) + tower.positional_embedding
    for block in list(tower.transformer.resblocks)[:-1]:
        hidden = block(hidden, attn_mask=tower.attn_mask)
    assert torch.allclose(again(tokens), tower.ln_final(hidden), atol=1e-5)
    # open_clip's own names, its own tensors: the file's blocks are the tower's.
    names = dict(tower.named_parameters())
    for key, tensor in stored(tmp_path / "model.safetensors").items():
        name = key.removeprefix("cond_stage_model.model.")
        if name in names and ".2." not in name and name not in ("text_projection", "logit_scale"):
            assert torch.equal(tensor, names[name]), name


# diffusers' own converters, which read the published checkpoints


def converted(checkpoint: dict[str, Tensor], components: Components) -> dict[str, dict[str, Tensor]]:
    parts = networks(components)
    blocks = components.text_encoder.model.config.num_hidden_layers  # type: ignore[union-attr]
    last = f"cond_stage_model.model.transformer.resblocks.{blocks}."
    if "cond_stage_model.model.ln_final.weight" in checkpoint:
        # diffusers drops the last block of Stable Diffusion 2 only where it is number 23.
        kept = {key: value for key, value in checkpoint.items() if not key.startswith(last)}
        text = theirs.convert_open_clip_checkpoint(parts["text"], kept)
        text.pop("text_projection.weight", None)
    else:
        text = theirs.convert_ldm_clip_checkpoint(checkpoint)
        text.pop("text_model.embeddings.position_ids")
    return {
        "unet": theirs.convert_ldm_unet_checkpoint(checkpoint, dict(components.unet.config)),
        "vae": theirs.convert_ldm_vae_checkpoint(checkpoint, dict(components.vae.config)),
        "text": {key.removeprefix("text_model."): value for key, value in text.items()},
    }


def test_diffusers_converters_read_the_file_as_the_model(pair: tuple[Components, Path]) -> None:
    model, path = pair
    parts = converted(stored(path), model)
    for name, network in networks(model).items():
        assert_same(parts[name], network.state_dict())


def test_diffusers_loads_the_file_and_draws_the_same_image(written: Written, tmp_path: Path) -> None:
    model, path = written("sd1")
    write_components(model, tmp_path / "folder")
    pipe = StableDiffusionPipeline.from_single_file(
        str(path), config=str(tmp_path / "folder"), local_files_only=True, safety_checker=None
    )
    pipe.set_progress_bar_config(disable=True)
    generator = torch.Generator().manual_seed(5)
    call: dict[str, Any] = {"num_inference_steps": 2, "guidance_scale": 3.0, "output_type": "np"}
    expected = pipe("a red square", generator=generator, **call).images
    # Its weights may lie unaligned in memory, which changes the last bits of sums.
    assert np.abs(pipeline(model)("a red square", seed=5, **call).images - expected).max() < 1e-4


FULL_SD1 = {"cross_attention_dim": 768, "attention_head_dim": 8}
FULL_SD2 = {"cross_attention_dim": 1024, "attention_head_dim": (5, 10, 20, 20), "use_linear_projection": True}
FULL_VAE = VAE | {"block_out_channels": (128, 256, 512, 512)}


@pytest.mark.parametrize("inpainting", [False, True])
@pytest.mark.parametrize("family", ["v1", "v2"])
def test_the_key_names_at_full_width_are_the_published_ones(family: str, inpainting: bool) -> None:
    width, blocks, heads = (768, 12, 12) if family == "v1" else (1024, 23, 16)
    config = CLIPTextConfig(
        hidden_size=width, intermediate_size=4 * width, num_hidden_layers=blocks, num_attention_heads=heads
    )
    with init_empty_weights(include_buffers=False):
        options: dict[str, Any] = (FULL_SD1 if family == "v1" else FULL_SD2) | {"in_channels": 9 if inpainting else 4}
        unet, vae, text = UNet2DConditionModel(**options), AutoencoderKL(**FULL_VAE), CLIPTextModel(config)
    layout: Any = "transformers" if family == "v1" else "openclip"
    parts: list[Part] = [unet_part(unet), vae_part(vae), text_part(text, layout)]
    checkpoint: dict[str, Any] = {}
    for part in parts:
        checkpoint |= {key: torch.empty(shape, device="meta") for key, shape in part.stored.items()}
    assert len(checkpoint) == 686 + 248 + (196 if family == "v1" else 23 * 12 + 4)
    checkpoint |= _clip_rest(config) if family == "v1" else _openclip_rest(checkpoint, config, torch.float32)
    # What diffusers tells the published files apart by.
    kind = theirs.infer_diffusers_model_type(checkpoint)
    assert kind == {"v1": ("v1", "inpainting"), "v2": ("v2", "inpainting_v2")}[family][inpainting]
    if family == "v2":
        assert set(theirs.SD_2_TEXT_ENCODER_KEYS_TO_IGNORE) <= checkpoint.keys()
    components = Components(vae, unet, PNDMScheduler(), TextEncoder(clip_vocabulary_tokenizer(), text))
    for name, weights in converted(checkpoint, components).items():
        expected = {key: weight.shape for key, weight in networks(components)[name].state_dict().items()}
        assert {key: weight.shape for key, weight in weights.items()} == expected


def test_published_key_names_by_heart(written: Written) -> None:
    """From Stable Diffusion 1.5's file; a tiny model of as many levels has the same names."""
    shapes = {key: tuple(tensor.shape) for key, tensor in stored(written("sd1")[1]).items()}
    for key in (
        "model.diffusion_model.time_embed.0.weight",
        "model.diffusion_model.input_blocks.1.1.transformer_blocks.0.attn2.to_k.weight",
        "model.diffusion_model.input_blocks.3.0.op.weight",
        "model.diffusion_model.input_blocks.4.0.skip_connection.weight",
        "model.diffusion_model.input_blocks.11.0.out_layers.3.bias",
        "model.diffusion_model.middle_block.1.proj_in.weight",
        "model.diffusion_model.output_blocks.2.1.conv.weight",
        "model.diffusion_model.output_blocks.5.2.conv.weight",
        "model.diffusion_model.output_blocks.11.1.transformer_blocks.0.ff.net.0.proj.weight",
        "model.diffusion_model.out.2.bias",
        "first_stage_model.encoder.down.0.downsample.conv.weight",
        "first_stage_model.encoder.mid.attn_1.q.weight",
        "first_stage_model.decoder.up.3.upsample.conv.weight",
        "first_stage_model.decoder.up.0.block.0.nin_shortcut.weight",
        "first_stage_model.post_quant_conv.bias",
        "cond_stage_model.transformer.text_model.encoder.layers.1.self_attn.q_proj.weight",
        "cond_stage_model.transformer.text_model.embeddings.position_ids",
    ):
        assert key in shapes
    assert shapes["first_stage_model.encoder.mid.attn_1.q.weight"] == (64, 64, 1, 1)
    assert shapes["model.diffusion_model.middle_block.1.proj_in.weight"] == (64, 64, 1, 1)


# Files that others wrote: no header of ours


@pytest.mark.parametrize("name", ["sd1-inpainting", "sd2-inpainting"])
def test_the_rules_suffice_for_stable_diffusion(written: Written, name: str, tmp_path: Path) -> None:
    model, path = written(name)
    again = read_single_file(bare(path, tmp_path / "bare.safetensors"))
    assert_same_model(again, model)
    assert again.unet.config.attention_head_dim in (model.unet.config.attention_head_dim, (8, 8, 8, 8))
    assert again.noise_scheduler.config.prediction_type == "epsilon"
    assert again.noise_scheduler.config.beta_schedule == "scaled_linear"
    assert again.unet.config.sample_size == 512 // 8
    assert again.text_encoder is not None
    assert again.text_encoder.tokenizer.pad_token_id == (0 if name.startswith("sd2") else 49407)


ODD_HINTS = Hints(
    noise=ODD_NOISE,
    scheduler="unipc",
    heads=(2, 4, 6),
    norm_groups=12,
    vae_norm_groups=4,
    text_heads=3,
    scaling_factor=1.0,
    sample_size=(12, 8),
)


def test_what_a_bare_file_does_not_tell_comes_from_hints(written: Written, tmp_path: Path) -> None:
    model, path = written("odd")
    again = read_single_file(bare(path, tmp_path / "bare.safetensors"), hints=ODD_HINTS)
    assert_same_model(again, model)
    assert np.array_equal(draw(again), draw(model))


@pytest.mark.parametrize(
    ("metadata", "said", "expected"),
    [
        (None, None, "epsilon"),
        (None, "v_prediction", "v_prediction"),
        ({"modelspec.prediction_type": "v"}, None, "v_prediction"),
        ({"modelspec.architecture": "stable-diffusion-v2-768-v"}, None, "v_prediction"),
        ({"modelspec.prediction_type": "v"}, "epsilon", "epsilon"),
    ],
)
def test_prediction_by_override_then_header_then_epsilon(
    written: Written, metadata: dict[str, str] | None, said: Any, expected: str, tmp_path: Path
) -> None:
    save_file(stored(written("odd")[1]), tmp_path / "file.safetensors", metadata=metadata)
    hints = replace(ODD_HINTS, noise=None, prediction=said)
    components = read_single_file(tmp_path / "file.safetensors", hints=hints)
    assert components.noise_scheduler.config.prediction_type == expected


def test_published_extras_are_passed_over_and_strange_ones_named(
    written: Written, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    model, path = written("sd1-inpainting")

    def add(tensors: dict[str, Tensor]) -> None:
        tensors["model_ema.decay"], tensors["alphas_cumprod"] = torch.ones(1), torch.ones(1000)
        tensors["model_ema.diffusion_modelinput_blocks00weight"] = torch.ones(3)
        tensors["scale_factor"] = torch.tensor(0.25)
        tensors["cond_stage_model.transformer.vision_model.x"] = torch.ones(1)

    again = read_single_file(bare(path, tmp_path / "file.safetensors", add))
    assert_same_model(again, model)
    assert again.vae.config.scaling_factor == 0.25
    strange = "1 unexpected tensors (cond_stage_model.transformer.vision_model.x)"
    assert caplog.messages == [f"{tmp_path / 'file.safetensors'}: not read are {strange}"]


def test_attention_matrices_without_their_kernel_and_text_without_its_prefix(written: Written, tmp_path: Path) -> None:
    model, path = written("sd1-inpainting")

    def change(tensors: dict[str, Tensor]) -> None:
        for key in list(tensors):
            if ".mid.attn_1." in key and key.endswith("weight") and tensors[key].ndim == 4:
                tensors[key] = tensors[key][:, :, 0, 0].clone()
            if "text_model." in key:
                tensors[key.replace("text_model.", "")] = tensors.pop(key)

    assert_same_model(read_single_file(bare(path, tmp_path / "file.safetensors", change)), model)


def test_the_standard_scale_keeps_the_image(written: Written) -> None:
    model, _ = written("odd")
    scaled = with_standard_scale(model)
    assert scaled.vae.config.scaling_factor == 0.18215
    assert np.abs(draw(scaled) - draw(model)).max() < 1e-4
    assert not torch.equal(scaled.vae.quant_conv.weight, model.vae.quant_conv.weight)


def test_comfys_rule_for_stable_diffusion_2() -> None:
    with init_empty_weights(include_buffers=False):
        part = unet_part(UNet2DConditionModel(**FULL_SD2))
        inpainting = unet_part(UNet2DConditionModel(**FULL_SD2, in_channels=9))
        first = unet_part(UNet2DConditionModel(**FULL_SD1))
    wide, narrow = torch.linspace(-1, 1, 320), torch.linspace(-0.1, 0.1, 320)
    assert "model.diffusion_model.output_blocks.11.1.transformer_blocks.0.norm1.bias" in part.stored
    assert guess_from(part, lambda key: wide if key.endswith("11.1.transformer_blocks.0.norm1.bias") else None) == (
        "v_prediction"
    )
    assert guess_from(part, lambda key: narrow) == "epsilon"
    assert guess_from(part, lambda key: None) is None
    assert guess_from(inpainting, lambda key: wide) is None
    assert guess_from(first, lambda key: wide) is None
