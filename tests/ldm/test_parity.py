"""diffusers' own pipelines draw the same images from the same weights and noise.

Tiny widths of the true architectures: four levels, f8, CLIP with quick_gelu or OpenCLIP's penultimate state.
"""

from __future__ import annotations

import copy
from dataclasses import dataclass
from functools import cache
from itertools import product
from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers import (
    AutoencoderKL,
    DiffusionPipeline,
    StableDiffusionImg2ImgPipeline,
    StableDiffusionInpaintPipeline,
    StableDiffusionPipeline,
    UNet2DConditionModel,
)
from diffusers.image_processor import VaeImageProcessor
from diffusers.models.autoencoders.vae import DiagonalGaussianDistribution
from open_clip.model import _build_text_tower
from PIL import Image, ImageChops
from torch import Tensor, nn
from transformers import CLIPTextConfig, CLIPTextModel

from conditioning.clip_tokenizer import clip_vocabulary_tokenizer
from conditioning.openclip import openclip_to_transformers
from conditioning.text import TextEncoder, without_last_block
from ldm.canvas import InpaintingOptions
from ldm.cli.main import main
from ldm.errors import UserError
from ldm.interchange.single_file import STANDARD_NOISE
from ldm.noise import NoiseConfig
from ldm.pipeline import LatentDiffusionPipeline
from ldm.sampling import SCHEDULERS, make_scheduler

V = NoiseConfig(schedule="scaled_linear", prediction="v_prediction", beta_start=0.00085, beta_end=0.012)
TOLERANCE = 1e-6
STEPS, STRENGTH = 3, 0.7
PROMPTS = ["a red square on a blue ground", "a photograph of a yellow dog, sharp focus"]
NEGATIVES = ["blurry, green", "text, low quality"]


@dataclass(frozen=True)
class Family:
    """What tells the published models apart, at tiny widths."""

    noise: NoiseConfig
    openclip: bool


FAMILIES = {
    "sd1": Family(STANDARD_NOISE, openclip=False),
    "sd2": Family(STANDARD_NOISE, openclip=True),
    "sd2-v": Family(V, openclip=True),
}
KINDS = {
    "text-to-image": StableDiffusionPipeline,
    "image-to-image": StableDiffusionImg2ImgPipeline,
    "inpainting, 4 channels": StableDiffusionInpaintPipeline,
    "inpainting, 9 channels": StableDiffusionInpaintPipeline,
}


def text_encoder(openclip: bool) -> TextEncoder:
    if openclip:  # Stable Diffusion 2: the penultimate state, plain gelu, "!" as padding
        tower = _build_text_tower(64, {"width": 64, "heads": 1, "layers": 4, "vocab_size": 49408}, False)
        for parameter in tower.parameters():
            nn.init.normal_(parameter, std=0.2)
        return TextEncoder(clip_vocabulary_tokenizer(pad_token="!"), openclip_to_transformers(tower))
    config = CLIPTextConfig(
        hidden_size=32, intermediate_size=128, num_hidden_layers=3, num_attention_heads=2, pad_token_id=49407
    )
    return TextEncoder(clip_vocabulary_tokenizer(), CLIPTextModel(config).eval())


@cache
def model(family: str, inpainting: bool = False) -> LatentDiffusionPipeline:
    """A random model whose pictures are no grey ones, and depend on the text. Shared: do not change it."""
    one = FAMILIES[family]
    sizes: dict[str, Any] = {"block_out_channels": (32, 64, 64, 64), "attention_head_dim": 8, "cross_attention_dim": 32}
    if one.openclip:  # heads of 64 channels, linear projections
        sizes = {"block_out_channels": (64, 128, 128, 128), "cross_attention_dim": 64, "use_linear_projection": True}
        sizes["attention_head_dim"] = (1, 2, 2, 2)
    with torch.random.fork_rng(devices=[]), torch.no_grad():
        torch.manual_seed(0)
        unet = UNet2DConditionModel(sample_size=8, layers_per_block=1, in_channels=9 if inpainting else 4, **sizes)
        vae = AutoencoderKL(
            block_out_channels=(32, 64, 64, 64),
            layers_per_block=1,
            down_block_types=("DownEncoderBlock2D",) * 4,
            up_block_types=("UpDecoderBlock2D",) * 4,
            sample_size=64,
        )
        # diffusers samples the posterior where we take its mean: with a variance of e^-30 they are one.
        vae.quant_conv.weight[4:] = 0
        vae.quant_conv.bias[4:] = -30
        for name, weight in unet.named_parameters():
            if "attn2.to_out.0.weight" in name:
                weight *= 8
        encoder = text_encoder(one.openclip)
        context = encoder(encoder.tokenize(PROMPTS))
        output = unet(torch.randn(2, unet.config.in_channels, 8, 8), torch.tensor([300, 800]), context).sample
        unet.conv_out.weight /= output.std()
        image = vae.decode(torch.randn(2, 4, 8, 8) / 0.18215).sample
        vae.decoder.conv_out.weight *= 0.5 / image.std()
    pipeline = LatentDiffusionPipeline(vae.eval(), encoder, unet.eval(), make_scheduler("ddim", one.noise))
    return pipeline.to("cpu", torch.float32)


@cache
def diffusers_pipeline(kind: str, family: str) -> DiffusionPipeline:
    ours = model(family, kind.endswith("9 channels"))
    assert ours.text_encoder is not None
    theirs = KINDS[kind](
        vae=ours.vae,
        unet=ours.unet,
        text_encoder=ours.text_encoder.model,
        tokenizer=ours.text_encoder.tokenizer,
        scheduler=ours.noise_scheduler,
        safety_checker=None,
        feature_extractor=None,
        requires_safety_checker=False,
    )
    theirs.set_progress_bar_config(disable=True)
    return theirs


def picture(seed: int) -> Image.Image:
    values = torch.rand(1, 3, 8, 8, generator=torch.Generator().manual_seed(seed))
    smooth = nn.functional.interpolate(values, (64, 64), mode="bilinear")[0]
    return Image.fromarray((smooth * 255).byte().permute(1, 2, 0).numpy())


def block_mask(seed: int) -> Image.Image:
    """Black and white in whole blocks of 8 x 8 pixels, of which nearest-neighbour and area averaging make the same."""
    blocks = torch.rand(8, 8, generator=torch.Generator().manual_seed(seed)) < 0.4
    blocks[3:6, 2:5] = True
    return Image.fromarray((blocks.to(torch.uint8) * 255).numpy()).resize((64, 64), Image.Resampling.NEAREST)


def draws_before_the_noise(kind: str, strength: float) -> tuple[int, int]:
    """How often diffusers draws before and after the noise itself, to sample posteriors that we take the mean of."""
    if kind == "image-to-image":
        return 1, 0
    if kind.endswith("9 channels"):
        return (0 if strength == 1 else 1), 1
    return (1, 1) if kind.startswith("inpainting") else (0, 0)


def generators(count: int) -> list[torch.Generator]:
    return [torch.Generator().manual_seed(7 + number) for number in range(count)]


def noise_and_rest(kind: str, strength: float, count: int) -> tuple[Tensor, list[torch.Generator]]:
    """The noise that diffusers draws from its generators, and those as its sampler then finds them."""
    before, after = draws_before_the_noise(kind, strength)
    noises, ours = [], generators(count)
    for generator in ours:
        drawn = [torch.randn(4, 8, 8, generator=generator) for _ in range(before + 1 + after)]
        noises.append(drawn[before])
    return torch.stack(noises), ours


def both(
    kind: str, family: str, scheduler: str, *, guidance_scale: float, strength: float = STRENGTH, **shared: Any
) -> tuple[Tensor, Tensor, LatentDiffusionPipeline]:
    """The latents of x_0 that we and diffusers end at."""
    ours, theirs = model(family, kind.endswith("9 channels")), diffusers_pipeline(kind, family)
    theirs.scheduler = make_scheduler(scheduler, FAMILIES[family].noise)
    inputs: dict[str, Any] = {}
    # One picture: diffusers encodes several one by one, which changes a last bit that a random network amplifies.
    count = 2 if kind == "text-to-image" else 1
    if kind != "text-to-image":
        inputs = {"image": [picture(1)], "strength": strength}
    if kind.startswith("inpainting"):
        inputs["mask_image"] = [block_mask(3)]
    shared |= {"num_inference_steps": STEPS, "guidance_scale": guidance_scale, "output_type": "latent", **inputs}
    prompts, negatives = PROMPTS[:count], NEGATIVES[:count]
    expected = theirs(prompts, negative_prompt=negatives, generator=generators(count), **shared).images
    noise, rest = noise_and_rest(kind, strength, count)
    found = ours(
        prompts,
        negatives,
        latents=noise,
        generator=rest,
        scheduler=make_scheduler(scheduler, FAMILIES[family].noise),
        inpainting=InpaintingOptions(blend=False),  # what diffusers does with 9 channels
        **shared,
    ).images
    return found, expected, ours


def assert_same_pictures(
    found: Tensor, expected: Tensor, ours: LatentDiffusionPipeline, tolerance: float = TOLERANCE
) -> float:
    """Compare in [0, 1], ours decoded by us, theirs as diffusers' pipelines do; returns the largest difference."""
    images = (ours.decode_latents(found) / 2 + 0.5).clamp(0, 1)
    with torch.no_grad():
        decoded = ours.vae.decode(expected / ours.vae.config.scaling_factor, return_dict=False)[0]
    references = VaeImageProcessor().postprocess(decoded, output_type="pt")
    error = (images - references).abs().max().item()
    assert error <= tolerance
    assert references.std() > 0.1  # not a grey picture, of which anything would be true
    return error


@pytest.fixture
def posterior_means(monkeypatch: pytest.MonkeyPatch) -> None:
    """diffusers samples the posterior of a picture, we take its mean: here it draws all the same, but adds nothing.

    Without this the noise of the smallest posterior that there is, e^-15, is all that differs.
    """
    sample = DiagonalGaussianDistribution.sample

    def mean(posterior: DiagonalGaussianDistribution, generator: torch.Generator | None = None) -> Tensor:
        sample(posterior, generator)
        return posterior.mean

    monkeypatch.setattr(DiagonalGaussianDistribution, "sample", mean)


MATRIX = list(product(KINDS, SCHEDULERS, FAMILIES, (5.0, 1.0)))


def is_slow(kind: str, name: str, family: str, scale: float) -> bool:
    """Each pipeline runs with each scheduler in the fast tests; of the rest of the matrix one in six, in turn."""
    place = list(KINDS).index(kind) + list(SCHEDULERS).index(name)
    return (place % 3, place // 3 % 2) != (list(FAMILIES).index(family), int(scale == 1))


@pytest.mark.usefixtures("posterior_means")
@pytest.mark.parametrize(
    ("kind", "name", "family", "scale"),
    [pytest.param(*case, marks=pytest.mark.slow if is_slow(*case) else ()) for case in MATRIX],
)
def test_diffusers_draws_the_same_image(kind: str, name: str, family: str, scale: float) -> None:
    error = assert_same_pictures(*both(kind, family, name, guidance_scale=scale))
    print(f"PARITY {kind} | {name} | {family} | {scale:g} | {error:.1e}")


@pytest.mark.usefixtures("posterior_means")
@pytest.mark.parametrize("kind", [kind for kind in KINDS if kind.startswith("inpainting")])
def test_inpainting_at_full_strength(kind: str) -> None:
    error = assert_same_pictures(*both(kind, "sd1", "ddpm", guidance_scale=5.0, strength=1.0))
    print(f"PARITY {kind}, strength 1 | ddpm | sd1 | 5 | {error:.1e}")


@pytest.mark.parametrize("kind", [kind for kind in KINDS if kind != "text-to-image"])
def test_nothing_but_the_smallest_posteriors_noise_differs(kind: str) -> None:
    error = assert_same_pictures(*both(kind, "sd1", "unipc", guidance_scale=5.0), tolerance=1e-4)
    print(f"PARITY {kind}, diffusers' posterior sampled | unipc | sd1 | 5 | {error:.1e}")


@pytest.mark.parametrize(
    ("kind", "family"),
    [
        ("inpainting, 9 channels", "sd1"),
        ("text-to-image", "sd2-v"),
        pytest.param("text-to-image", "sd1", marks=pytest.mark.slow),
        pytest.param("inpainting, 9 channels", "sd2", marks=pytest.mark.slow),
    ],
)
def test_a_saved_folder_draws_the_same_in_diffusers(kind: str, family: str, tmp_path: Path) -> None:
    """Both sides through the files."""
    model(family, kind.endswith("9 channels")).save_pretrained(tmp_path)
    theirs = DiffusionPipeline.from_pretrained(tmp_path, local_files_only=True)
    assert type(theirs) is KINDS[kind]
    theirs.set_progress_bar_config(disable=True)
    ours = LatentDiffusionPipeline.from_pretrained(tmp_path, dtype="fp32", device="cpu")
    shared: dict[str, Any] = {"num_inference_steps": 2, "guidance_scale": 3.0, "output_type": "latent"}
    if kind != "text-to-image":
        shared |= {"image": [picture(1)], "mask_image": [block_mask(3)]}
    noise = torch.randn(1, 4, 8, 8, generator=torch.Generator().manual_seed(0))
    generator = torch.Generator().manual_seed(1)  # the default scheduler draws nothing
    expected = theirs(PROMPTS[:1], latents=noise, generator=generator, **shared).images
    found = ours(PROMPTS[:1], latents=noise, seed=0, inpainting=InpaintingOptions(blend=False), **shared).images
    assert_same_pictures(found, expected, ours, tolerance=1e-4)


# clip_skip


@pytest.mark.parametrize("openclip", [False, True])
def test_clip_skip_is_the_state_before_the_last_blocks(openclip: bool) -> None:
    """Against a model that never had those blocks."""
    encoder = text_encoder(openclip)
    tokens = encoder.tokenize(PROMPTS)
    shorter = copy.deepcopy(encoder.model)
    with torch.no_grad():
        whole = encoder(tokens)
        for skip in range(1, encoder.blocks):
            shorter = without_last_block(shorter)
            assert torch.equal(encoder(tokens, skip), shorter(input_ids=tokens).last_hidden_state)
            assert (encoder(tokens, skip) - whole).abs().max() > 0.01


def test_clip_skip_draws_what_diffusers_draws_of_states_computed_by_hand() -> None:
    ours, theirs = model("sd1"), diffusers_pipeline("text-to-image", "sd1")
    assert ours.text_encoder is not None
    with torch.no_grad():
        text, tokens = ours.text_encoder.model, ours.text_encoder.tokenize(PROMPTS)
        states = text(input_ids=tokens, output_hidden_states=True).hidden_states
        penultimate = text.final_layer_norm(states[-2])
    shared: dict[str, Any] = {"num_inference_steps": STEPS, "guidance_scale": 5.0, "output_type": "latent"}
    theirs.scheduler = make_scheduler("dpm++", STANDARD_NOISE)
    noise = torch.randn(2, 4, 8, 8, generator=torch.Generator().manual_seed(0))
    negatives = text(input_ids=ours.text_encoder.tokenize(NEGATIVES)).last_hidden_state
    expected = theirs(prompt_embeds=penultimate, negative_prompt_embeds=negatives, latents=noise, **shared).images
    shared |= {"latents": noise, "scheduler": "dpm++"}
    assert_same_pictures(ours(PROMPTS, NEGATIVES, clip_skip=1, **shared).images, expected, ours)
    unskipped = ours(PROMPTS, NEGATIVES, clip_skip=0, **shared).images
    assert torch.equal(unskipped, ours(PROMPTS, NEGATIVES, **shared).images)
    assert (unskipped - expected).abs().max() > 0.1


@pytest.mark.usefixtures("posterior_means")
@pytest.mark.parametrize("kind", KINDS)
def test_clip_skip_is_diffusers_own(kind: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """It asks for `text_encoder.text_model`, which transformers 5.6 took away; given that, it works as ours."""
    if not hasattr(model("sd1").text_encoder.model, "text_model"):
        monkeypatch.setattr(CLIPTextModel, "text_model", property(lambda self: self), raising=False)
    error = assert_same_pictures(*both(kind, "sd1", "euler", guidance_scale=5.0, clip_skip=2))
    print(f"PARITY {kind}, clip_skip 2 | euler | sd1 | 5 | {error:.1e}")


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"clip_skip": 3}, "clip_skip: found 3; allowed is 0 to 2"),
        ({"clip_skip": -1}, "clip_skip: found -1; allowed is 0 to 2"),
        ({"clip_skip": 1, "prompt_embeds": torch.zeros(1, 77, 32)}, "together with prompt_embeds"),
    ],
)
def test_an_impossible_clip_skip_is_named(arguments: dict[str, Any], message: str) -> None:
    with pytest.raises(UserError, match=message):
        model("sd1")("" if "prompt_embeds" in arguments else "a cat", num_inference_steps=1, **arguments)


# Half precision


def test_bfloat16_stays_as_near_to_float32_as_diffusers_does() -> None:
    """Its 8 bits are 0.4 % of a number; we keep the latents between the steps in float32, diffusers does not."""
    shared: dict[str, Any] = {"num_inference_steps": 2, "guidance_scale": 2.0, "output_type": "pt"}
    noise = torch.randn(1, 4, 8, 8, generator=torch.Generator().manual_seed(0)).bfloat16()
    images = {}
    for dtype in (torch.float32, torch.bfloat16):
        ours = copy.deepcopy(model("sd1")).to("cpu", dtype)
        assert ours.text_encoder is not None
        theirs = StableDiffusionPipeline(
            ours.vae,
            ours.text_encoder.model,
            ours.text_encoder.tokenizer,
            ours.unet,
            make_scheduler("ddim", STANDARD_NOISE),
            safety_checker=None,
            feature_extractor=None,
            requires_safety_checker=False,
        )
        theirs.set_progress_bar_config(disable=True)
        images["ours", dtype] = ours(PROMPTS[:1], latents=noise.float(), **shared).images
        images["theirs", dtype] = theirs(PROMPTS[:1], latents=noise.to(dtype), **shared).images.float()
    reference = images["ours", torch.float32]
    assert (images["theirs", torch.float32] - reference).abs().max() <= TOLERANCE
    errors = {who: (images[who, torch.bfloat16] - reference).abs() for who in ("ours", "theirs")}
    told = {who: (error.max().item(), error.mean().item()) for who, error in errors.items()}
    print(f"PARITY bf16 {told}")
    assert errors["ours"].max() <= 0.1
    assert errors["ours"].mean() <= min(0.01, 1.5 * errors["theirs"].mean().item())


def test_the_command_takes_clip_skip_and_writes_a1111s_number(
    tmp_path: Path, capfd: pytest.CaptureFixture[str], models_open_once: None
) -> None:
    folder, out = tmp_path / "model", tmp_path / "out"
    model("sd1").save_pretrained(folder)
    words = ["generate", "--model", str(folder), "--prompt", "a cat", "--steps", "1", "--seed", "3", "--dtype", "fp32"]
    assert main([*words, "--out", str(out), "--clip-skip", "1"]) == 0
    [path] = sorted(out.glob("0*.png"))
    with Image.open(path) as drawn:
        assert "Clip skip: 2" in drawn.info["parameters"]
        [expected] = model("sd1")("a cat", num_inference_steps=1, seed=3, clip_skip=1).images
        assert ImageChops.difference(drawn.convert("RGB"), expected).getextrema() == ((0, 0),) * 3
    capfd.readouterr()
    assert main([*words, "--out", str(tmp_path / "not"), "--clip-skip", "3"]) == 2
    assert "clip_skip: found 3; allowed is 0 to 2" in capfd.readouterr().err
    assert not (tmp_path / "not").exists()
