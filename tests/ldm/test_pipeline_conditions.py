"""The pipeline with masks, maps and labels: what is kept, what each condition does, what is refused."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

from conditioning.inpainting import mask_to_latents
from ldm.canvas import InpaintingOptions
from ldm.data.images import to_tensor
from ldm.errors import UserError
from ldm.guidance import GuidanceOptions
from ldm.noise import NoiseConfig, NoiseSchedule
from ldm.pipeline import LatentDiffusionPipeline
from ldm.sampling import FLOW_SCHEDULERS, SCHEDULERS, Known, make_scheduler, noised, sample, set_timesteps

MAP = torch.ones(32, 32).long()
FAST = {"num_inference_steps": 2, "scheduler": "ddim", "seed": 3}


def picture(width: int = 32, height: int = 32, seed: int = 0) -> Image.Image:
    return Image.fromarray(np.random.RandomState(seed).randint(0, 256, (height, width, 3), dtype=np.uint8))


def box_mask(width: int = 32, height: int = 32) -> Image.Image:
    mask = Image.new("L", (width, height))
    mask.paste(255, (width // 4, height // 4, 3 * width // 4, 3 * height // 4))
    return mask


class CountedRows:
    """Counts calls of the U-Net and the rows of each."""

    def __init__(self, pipeline: LatentDiffusionPipeline) -> None:
        self.rows: list[int] = []
        self.handle = pipeline.unet.register_forward_pre_hook(lambda _, inputs: self.rows.append(len(inputs[0])))

    def __enter__(self) -> CountedRows:
        return self

    def __exit__(self, *_: object) -> None:
        self.handle.remove()


@settings(max_examples=40, deadline=None)
@given(data=st.data())
@pytest.mark.parametrize("trained_with_masks", [True, False])
def test_pixels_outside_the_mask_come_back_byte_for_byte(conditioned_pipeline, tiny_pipeline, trained_with_masks, data):
    pipeline = conditioned_pipeline if trained_with_masks else tiny_pipeline
    width, height = data.draw(st.integers(3, 41)), data.draw(st.integers(3, 41))
    numbers = np.random.RandomState(data.draw(st.integers(0, 1000)))
    soft = data.draw(st.booleans())
    mask = (numbers.rand(height, width) < data.draw(st.floats(0.02, 0.9))) * (
        numbers.rand(height, width) if soft else 1
    )
    mask = (mask * 255).astype(np.uint8)
    image = picture(width, height, seed=1)
    options = InpaintingOptions(
        feather=data.draw(st.integers(0, 5)),
        crop_padding=data.draw(st.none() | st.integers(0, 8)),
        fill=data.draw(st.sampled_from(["original", "blur", "grey", "noise"])),
        blend=data.draw(st.booleans()),
    )
    blends = options.blend or not trained_with_masks
    output_type = data.draw(st.sampled_from(["pil", "np", "pt"]))
    result = pipeline(
        data.draw(st.sampled_from(["", "a circle"])),
        image=image,
        mask_image=Image.fromarray(mask),
        inpainting=options,
        strength=data.draw(st.sampled_from([0.5, 1.0])),
        output_type=output_type,
        **FAST,
    )
    ways = [way for way, taken in (("mask channels", trained_with_masks), ("latent blending", blends)) if taken]
    assert result.inpainting == " and ".join(ways)
    found = result.images[0]
    if output_type == "pt":
        found = found.permute(1, 2, 0).numpy()
    pixels = np.asarray(found) if output_type == "pil" else (found * 255).round().astype(np.uint8)
    assert pixels.shape == (height, width, 3)
    assert np.array_equal(pixels[mask == 0], np.asarray(image)[mask == 0])


@pytest.mark.parametrize("blend", [True, False])
def test_latents_outside_the_mask_are_held_if_wished(conditioned_pipeline, blend):
    options = {"mask_image": box_mask(), "output_type": "latent", "inpainting": InpaintingOptions(blend=blend)}
    found = conditioned_pipeline("a circle", image=picture(), **options, **FAST).images
    known = conditioned_pipeline.encode_images(to_tensor(picture())[None])
    mask = to_tensor(box_mask().convert("RGB"))[None, :1] / 2 + 0.5  # [1, 1, H, W] in [0, 1]
    outside = (mask_to_latents(mask, *known.shape[-2:]) == 0).expand_as(known)
    assert outside.any() and torch.allclose(found[outside], known[outside], atol=1e-5) == blend


def test_the_hole_is_drawn_anew_in_both_ways(conditioned_pipeline, tiny_pipeline):
    inside = np.asarray(box_mask()) == 255
    for pipeline in (conditioned_pipeline, tiny_pipeline):
        result = pipeline("a circle", image=picture(), mask_image=box_mask(), **FAST).images[0]
        difference = np.abs(np.asarray(result).astype(int) - np.asarray(picture()))[inside]
        assert difference.mean() > 10


@pytest.mark.parametrize("name", SCHEDULERS)
def test_noised_is_the_forward_process_in_the_schedulers_own_scaling(name):
    config = NoiseConfig(schedule="scaled_linear", prediction="epsilon")
    x_0, noise = torch.randn(2, 4, 3, 3), torch.randn(2, 4, 3, 3)
    for index in (4, 8):
        scheduler = make_scheduler(name, config)
        timesteps = set_timesteps(scheduler, 10)
        if hasattr(scheduler, "set_begin_index"):
            scheduler.set_begin_index(index)
        t = timesteps[index]
        x_t = noised(scheduler, x_0, noise, timesteps[index : index + 1])
        scaled = scheduler.scale_model_input(x_t, t) if hasattr(scheduler, "scale_model_input") else x_t
        expected = NoiseSchedule.from_config(config).add_noise(x_0, noise, t.long().expand(2))
        assert torch.allclose(scaled, expected, atol=2e-3)


@pytest.mark.parametrize("strength", [0.3, 0.7, 1.0])
@pytest.mark.parametrize(("name", "flow"), [*((n, False) for n in SCHEDULERS), *((n, True) for n in FLOW_SCHEDULERS)])
def test_blending_ends_at_the_known_latents_outside_and_a_perfect_denoiser_finds_x_0_inside(name, flow, strength):
    config = NoiseConfig(schedule="flow", prediction="flow") if flow else NoiseConfig(schedule="scaled_linear")
    scheduler, schedule = make_scheduler(name, config), NoiseSchedule.from_config(config)
    known, wanted, noise = torch.randn(3, 1, 4, 6, 6).unbind()
    mask = (torch.rand(1, 1, 6, 6) < 0.5).float()

    def perfect(latents: torch.Tensor, timesteps: torch.Tensor, _: object) -> torch.Tensor:
        """Says that x_0 is `wanted`, whatever it is shown."""
        levels = schedule.levels(timesteps if flow else timesteps.long())
        guess = (latents - levels.alpha * wanted) / levels.sigma
        return guess - wanted if flow else levels.alpha * guess - levels.sigma * wanted

    generators = [torch.Generator().manual_seed(0)]
    found = sample(perfect, scheduler, noise, None, 10, generators, None, Known(known, strength, mask))
    hole = mask.expand_as(found) > 0
    assert torch.equal(found[~hole], known[~hole])
    if name != "ddpm":  # which adds noise at every step but the last
        assert torch.allclose(found[hole], wanted[hole], atol=0.05)


def test_less_strength_keeps_more_of_the_image(tiny_pipeline):
    image = tiny_pipeline("a circle", **FAST).images[0]  # one that the autoencoder can make
    settings = {"image": image, "scheduler": "ddim", "num_inference_steps": 10, "seed": 9, "output_type": "latent"}
    start = tiny_pipeline.encode_images(to_tensor(image)[None])
    changes = [
        (tiny_pipeline("a square", strength=strength, **settings).images - start).square().mean().item()
        for strength in (0.1, 0.4, 1.0)
    ]
    assert changes == sorted(changes)
    assert changes[0] < 0.5 * changes[-1]


def test_strength_1_is_drawing_from_noise(tiny_pipeline):
    alone = tiny_pipeline("a circle", height=32, width=32, output_type="latent", **FAST).images
    from_image = tiny_pipeline("a circle", image=picture(), strength=1.0, output_type="latent", **FAST).images
    assert torch.equal(alone, from_image)


@pytest.mark.parametrize(
    ("arguments", "scale", "evaluations"),
    [
        ({}, 5, 1),
        ({"prompt": "a"}, 1, 1),
        ({"prompt": "a"}, 5, 2),
        ({"prompt": "a", "label": "cat"}, 5, 2),  # equal scales are one step
        ({"prompt": "a", "label": 1}, {"text": 5, "label": 2}, 3),
        (
            {"prompt": "a", "semantic_map": torch.ones(32, 32).long(), "label": 1},
            {"text": 3, "label": 2, "semantic": 4},
            4,
        ),
        ({"prompt": "a", "semantic_map": torch.ones(32, 32).long()}, {"text": 3}, 2),  # the map stays in both halves
        ({"prompt": "a", "image": picture(), "mask_image": box_mask()}, 4, 2),
        ({"prompt": "a", "image": picture(), "mask_image": box_mask()}, {"text": 4, "inpainting": 2}, 3),
        ({"label": "cat", "image": picture(), "mask_image": box_mask()}, 1, 1),
    ],
)
def test_the_network_is_evaluated_as_few_times_as_can_be(conditioned_pipeline, arguments, scale, evaluations):
    with CountedRows(conditioned_pipeline) as counted:
        result = conditioned_pipeline(guidance_scale=scale, **arguments, **FAST)
    assert counted.rows == [evaluations] * FAST["num_inference_steps"]  # type: ignore[operator]
    assert result.evaluations_per_step == evaluations


def test_outside_the_interval_there_is_one_evaluation(conditioned_pipeline):
    with CountedRows(conditioned_pipeline) as counted:
        conditioned_pipeline(
            "a",
            guidance_scale=5,
            guidance=GuidanceOptions(interval=(0.4, 0.8)),
            num_inference_steps=5,
            scheduler="ddim",
        )
    assert counted.rows == [1, 2, 2, 1, 1]  # timesteps 999, 799, 599, 399, 199


@pytest.mark.parametrize(
    "change",
    [
        {"prompt": "another"},
        {"label": 0},
        {"semantic_map": torch.full((32, 32), 2)},
        {"image": picture(seed=5), "mask_image": box_mask()},
    ],
)
def test_every_condition_reaches_the_network(conditioned_pipeline, change):
    given = {
        "prompt": "a",
        "label": 1,
        "semantic_map": torch.ones(32, 32).long(),
        "image": picture(),
        "mask_image": box_mask(),
    }
    settings = {"output_type": "latent", "guidance_scale": 1, **FAST}
    before = conditioned_pipeline(**given, **settings).images
    assert torch.equal(conditioned_pipeline(**given, **settings).images, before)
    assert not torch.allclose(conditioned_pipeline(**(given | change), **settings).images, before, atol=1e-4)


def test_what_is_left_out_is_told_as_in_training(conditioned_pipeline):
    # A map of 255, a label of -1 and a full mask say the same as leaving them out.
    settings = {"output_type": "latent", "guidance_scale": 1, **FAST}
    nothing = conditioned_pipeline("a", **settings).images
    unknown = conditioned_pipeline("a", semantic_map=torch.full((32, 32), 255), label=[None], **settings).images
    full = conditioned_pipeline("a", image=picture(), mask_image=Image.new("L", (32, 32), 255), **settings).images
    assert torch.equal(unknown, nothing)
    assert torch.allclose(full, nothing, atol=1e-5)


def test_a_map_of_any_size_of_the_same_shape(conditioned_pipeline):
    large = torch.zeros(64, 64).long()
    large[:32] = 1
    small = large[::8, ::8]
    settings = {"output_type": "latent", **FAST}
    assert torch.equal(
        conditioned_pipeline(semantic_map=large, **settings).images,
        conditioned_pipeline(semantic_map=Image.fromarray(small.numpy().astype(np.uint8)), **settings).images,
    )


def test_alone_and_in_a_batch_an_image_is_the_same_with_its_conditions(conditioned_pipeline):
    maps = [torch.full((32, 32), number) for number in (0, 1, 2)]
    images = [picture(seed=number) for number in (7, 8, 9)]
    settings = {"output_type": "latent", "mask_image": box_mask(), "num_inference_steps": 2, "scheduler": "ddim"}
    together = conditioned_pipeline(
        ["a", "b", "c"], semantic_map=maps, image=images, label=[0, None, 1], seed=5, **settings
    ).images
    alone = conditioned_pipeline("b", semantic_map=maps[1], image=images[1], label=[None], seed=6, **settings).images
    assert torch.allclose(together[1:2], alone, atol=1e-4)
    in_parts = conditioned_pipeline(
        ["a", "b", "c"], semantic_map=maps, image=images, label=[0, None, 1], seed=5, batch_size=2, **settings
    ).images
    assert torch.allclose(together, in_parts, atol=1e-4)


def test_prompt_embeds_are_the_prompts_encoding(tiny_pipeline):
    embeds = tiny_pipeline.encode_prompts(["a circle"]).context
    settings = {"output_type": "latent", **FAST}
    assert torch.equal(
        tiny_pipeline(prompt_embeds=embeds, **settings).images, tiny_pipeline("a circle", **settings).images
    )


def test_a_saved_pipeline_draws_the_same(conditioned_pipeline, tmp_path):
    conditioned_pipeline.save_pretrained(tmp_path / "model")
    opened = LatentDiffusionPipeline.from_pretrained(tmp_path / "model", dtype="fp32")
    assert opened.conditions == ("inpainting", "semantic", "label", "text")
    given = {"prompt": "a", "label": "dog", "semantic_map": torch.ones(32, 32).long()}
    settings = {"output_type": "latent", **FAST}
    assert torch.equal(opened(**given, **settings).images, conditioned_pipeline(**given, **settings).images)


def test_text_and_masks_are_saved_as_diffusers_inpainting_pipeline(make_pipeline, tmp_path):
    from diffusers import StableDiffusionInpaintPipeline

    ours = make_pipeline(NoiseConfig(schedule="scaled_linear"), scheduler="ddim", inpainting=True)
    ours.save_pretrained(tmp_path / "model")
    theirs = StableDiffusionInpaintPipeline.from_pretrained(tmp_path / "model")
    theirs.set_progress_bar_config(disable=True)
    drawn = theirs("a", image=picture(), mask_image=box_mask(), num_inference_steps=2, height=32, width=32)
    assert drawn.images[0].size == (32, 32)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"mask_image": box_mask()}, "mask_image: found a mask without an image"),
        ({"image": picture(), "mask_image": box_mask(16, 32)}, "16"),
        ({"image": "a.png"}, "image: found a str; allowed is a PIL picture"),
        ({"strength": 0.5}, "strength: found 0.5 without an image"),
        ({"image": picture(), "strength": 1.5}, "strength: found 1.5; allowed is above 0 up to 1"),
        ({"image": picture(), "strength": 0.1}, "which leaves none"),
        ({"image": picture(), "mask_image": box_mask(), "height": 64}, "found a size with a mask"),
        ({"semantic_map": torch.full((32, 32), 3)}, "semantic map: found class 3; allowed is 0 to 2, or 255"),
        ({"semantic_map": torch.zeros(32, 16).long()}, "16 x 32 pixels for a picture of 32 x 32"),
        ({"label": 2}, "label: found 2"),
        ({"label": "dug"}, "dog"),
        ({"label": [0, 1, 1], "prompt": ["a", "b"]}, "label: found 3"),
        ({"guidance_scale": {"semantic": 2}, "prompt": "a"}, "semantic, a condition that is not given"),
        ({"prompt_embeds": torch.zeros(4, 4)}, "prompt_embeds: found shape [4, 4]"),
    ],
)
def test_bad_conditions_are_named(conditioned_pipeline, arguments, message):
    with pytest.raises(UserError) as error:
        conditioned_pipeline(**({"num_inference_steps": 2} | arguments))
    assert message in str(error.value)
    assert "\n" not in str(error.value)


def test_conditions_that_a_model_lacks_are_refused(tiny_pipeline):
    with pytest.raises(UserError, match="semantic_map: found a map; this model takes none"):
        tiny_pipeline("a", semantic_map=torch.zeros(32, 32).long())
    with pytest.raises(UserError, match="label: found one; this model takes none"):
        tiny_pipeline("a", label=1)


def test_a_stroke_of_one_pixel_still_counts():
    mask = torch.zeros(1, 1, 64, 64)
    mask[..., 20, :] = 1
    assert (mask_to_latents(mask, 8, 8)[0, 0, 2] == 1 / 8).all()
