from __future__ import annotations

import json
import logging
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from diffusers import PNDMScheduler, StableDiffusionPipeline
from PIL import Image
from torch import Tensor

from ldm.errors import UserError
from ldm.noise import NoiseConfig
from ldm.pipeline import LatentDiffusionPipeline
from ldm.sampling import FLOW_SCHEDULERS, SCHEDULERS, make_scheduler, scheduler_name

MakePipeline = Callable[..., LatentDiffusionPipeline]
SD = NoiseConfig(schedule="scaled_linear", prediction="epsilon")
FLOW = NoiseConfig(schedule="flow", prediction="flow")
PROMPTS = ["a red square on blue", "a yellow circle"]
NEGATIVES = ["green", "a dog on the left"]


@pytest.fixture(scope="session")
def folder(tiny_pipeline: LatentDiffusionPipeline, tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("saved") / "model"
    tiny_pipeline.save_pretrained(path)
    return path


@pytest.fixture(scope="session")
def stable_diffusion(folder: Path) -> StableDiffusionPipeline:
    """diffusers' own pipeline on our folder; tests give it the scheduler."""
    return open_in_diffusers(folder)


def open_in_diffusers(folder: Path) -> StableDiffusionPipeline:
    pipeline = StableDiffusionPipeline.from_pretrained(folder, local_files_only=True)
    pipeline.set_progress_bar_config(disable=True)
    return pipeline


def generators(*seeds: int) -> list[torch.Generator]:
    return [torch.Generator().manual_seed(seed) for seed in seeds]


def noise(count: int, seed: int = 0) -> Tensor:
    return torch.randn(count, 4, 16, 16, generator=torch.Generator().manual_seed(seed))


@pytest.mark.parametrize("guidance_scale", [1.0, 5.0])
@pytest.mark.parametrize("config", [NoiseConfig(), SD], ids=["cosine-v", "scaled_linear-epsilon"])
@pytest.mark.parametrize("name", SCHEDULERS)
def test_diffusers_draws_the_same_image(
    tiny_pipeline: LatentDiffusionPipeline,
    stable_diffusion: StableDiffusionPipeline,
    name: str,
    config: NoiseConfig,
    guidance_scale: float,
) -> None:
    stable_diffusion.scheduler = make_scheduler(name, config)
    shared: dict[str, Any] = {"num_inference_steps": 6, "guidance_scale": guidance_scale, "output_type": "np"}
    theirs = stable_diffusion(
        PROMPTS, negative_prompt=NEGATIVES, latents=noise(2), generator=generators(7, 8), **shared
    ).images
    ours = tiny_pipeline(
        PROMPTS, NEGATIVES, latents=noise(2), seed=7, scheduler=make_scheduler(name, config), **shared
    ).images
    # Euler starts the cosine schedule at sigma 20,000, where float32 has no more digits to give (see `sample`).
    assert np.abs(ours - theirs).max() < (2e-4 if (name, config.schedule) == ("euler", "cosine") else 2e-5)
    assert theirs.std() > 0.15  # not a grey picture, of which anything would be true


def test_diffusers_opens_the_saved_folder_with_its_scheduler_and_draws_our_seeds(
    tiny_pipeline: LatentDiffusionPipeline, folder: Path, stable_diffusion: StableDiffusionPipeline
) -> None:
    fresh = open_in_diffusers(folder)
    assert scheduler_name(fresh.scheduler) == "dpm++"
    theirs = fresh(PROMPTS[0], num_inference_steps=5, guidance_scale=3.0, generator=generators(11), output_type="np")
    ours = tiny_pipeline(PROMPTS[0], num_inference_steps=5, guidance_scale=3.0, seed=11, output_type="np")
    assert np.abs(ours.images - theirs.images).max() < 1e-4


def test_one_generator_for_all_images_means_what_it_means_in_diffusers(
    tiny_pipeline: LatentDiffusionPipeline, stable_diffusion: StableDiffusionPipeline
) -> None:
    stable_diffusion.scheduler = make_scheduler("ddpm", NoiseConfig())
    shared: dict[str, Any] = {"num_inference_steps": 4, "guidance_scale": 2.0, "output_type": "np"}
    theirs = stable_diffusion(PROMPTS, generator=generators(3)[0], **shared).images
    ours = tiny_pipeline(PROMPTS, generator=generators(3)[0], scheduler="ddpm", **shared).images
    assert np.abs(ours - theirs).max() < 1e-4


@pytest.mark.parametrize("name", FLOW_SCHEDULERS)
def test_a_flow_model_is_saved_with_a_scheduler_that_diffusers_runs(
    make_pipeline: MakePipeline, tmp_path: Path, name: str
) -> None:
    config = NoiseConfig(schedule="flow", prediction="flow", flow_shift=2.0)
    pipeline = make_pipeline(config, name)
    pipeline.save_pretrained(tmp_path / "flow")
    theirs = open_in_diffusers(tmp_path / "flow")
    saved = scheduler_name(theirs.scheduler)
    assert saved == (name if name == "unipc" else "dpm++")
    call: dict[str, Any] = {"num_inference_steps": 5, "guidance_scale": 3.0, "output_type": "np"}
    expected = theirs(PROMPTS, latents=noise(2), **call).images
    ours = pipeline(PROMPTS, latents=noise(2), scheduler=saved, **call).images
    assert np.abs(ours - expected).max() < 1e-4
    assert pipeline(PROMPTS, latents=noise(2), **call).images.std() > 0.1  # its own scheduler runs too


@pytest.mark.parametrize("scheduler", ["dpm++", "ddpm"])
def test_the_image_of_a_seed_is_the_same_alone_and_in_a_batch_of_eight(
    tiny_pipeline: LatentDiffusionPipeline, scheduler: str
) -> None:
    call: dict[str, Any] = {
        "num_inference_steps": 5,
        "guidance_scale": 3.0,
        "scheduler": scheduler,
        "output_type": "np",
    }
    prompts = [f"picture {i}" for i in range(8)]
    together = tiny_pipeline(prompts, seed=20, **call)
    assert together.seeds == tuple(range(20, 28))
    for batch_size in (1, 3):
        parts = tiny_pipeline(prompts, seed=20, batch_size=batch_size, **call).images
        assert np.abs(parts - together.images).max() < 1e-5
    alone = tiny_pipeline(prompts[5], seed=25, **call).images
    assert np.abs(alone[0] - together.images[5]).max() < 1e-5
    assert np.abs(alone[0] - together.images[4]).max() > 1e-2


def test_images_of_one_prompt_stand_together_with_seeds_counting_up(tiny_pipeline: LatentDiffusionPipeline) -> None:
    call: dict[str, Any] = {"num_inference_steps": 3, "output_type": "np"}
    result = tiny_pipeline(PROMPTS, num_images_per_prompt=2, seed=4, **call)
    single = tiny_pipeline([PROMPTS[0], PROMPTS[0], PROMPTS[1], PROMPTS[1]], seed=[4, 5, 6, 7], **call)
    assert result.seeds == single.seeds == (4, 5, 6, 7)
    assert np.array_equal(result.images, single.images)


def test_a_random_seed_is_told_and_repeats_the_image(tiny_pipeline: LatentDiffusionPipeline) -> None:
    first, other = (tiny_pipeline("a", num_inference_steps=2, output_type="np") for _ in range(2))
    assert first.seeds is not None and first.seeds != other.seeds
    again = tiny_pipeline("a", num_inference_steps=2, output_type="np", seed=first.seeds[0])
    assert np.array_equal(again.images, first.images)
    assert tiny_pipeline("a", num_inference_steps=2, generator=generators(1)).seeds is None


def test_prompt_negative_prompt_and_guidance_change_the_image(tiny_pipeline: LatentDiffusionPipeline) -> None:
    def draw(prompt: str, negative: str | None, scale: float) -> Tensor:
        call: dict[str, Any] = {"num_inference_steps": 4, "seed": 0, "output_type": "latent"}
        images = tiny_pipeline(prompt, negative, guidance_scale=scale, **call).images
        assert isinstance(images, Tensor)
        return images

    base = draw("a red square", None, 5.0)
    assert torch.equal(draw("a red square", "", 5.0), base)
    for other in (draw("a cat", None, 5.0), draw("a red square", "a cat", 5.0), draw("a red square", None, 2.0)):
        assert (other - base).abs().max() > 1e-3
    assert torch.equal(draw("a red square", "a cat", 1.0), draw("a red square", None, 1.0))


@pytest.mark.parametrize(("guidance_scale", "sizes"), [(1.0, [2, 2, 2]), (4.0, [4, 4, 4])])
def test_the_fewest_evaluations_are_made(
    tiny_pipeline: LatentDiffusionPipeline, guidance_scale: float, sizes: list[int]
) -> None:
    seen: list[int] = []
    hook = tiny_pipeline.unet.register_forward_pre_hook(lambda module, inputs: seen.append(len(inputs[0])))
    try:
        tiny_pipeline(PROMPTS, num_inference_steps=3, guidance_scale=guidance_scale, seed=0)
    finally:
        hook.remove()
    assert seen == sizes


def test_output_types_agree(tiny_pipeline: LatentDiffusionPipeline) -> None:
    call: dict[str, Any] = {"num_inference_steps": 2, "seed": 3, "height": 24, "width": 40}
    pil = tiny_pipeline("a", **call).images
    array = tiny_pipeline("a", output_type="np", **call).images
    tensor = tiny_pipeline("a", output_type="pt", **call).images
    latents = tiny_pipeline("a", output_type="latent", **call).images
    assert isinstance(pil[0], Image.Image) and pil[0].size == (40, 24) and pil[0].mode == "RGB"
    assert array.shape == (1, 24, 40, 3) and tensor.shape == (1, 3, 24, 40) and latents.shape == (1, 4, 12, 20)
    assert np.array_equal(np.asarray(pil[0]), (array[0] * 255).round().astype(np.uint8))
    assert np.array_equal(tensor.permute(0, 2, 3, 1).numpy(), array)
    decoded = tiny_pipeline.decode_latents(latents)
    torch.testing.assert_close((decoded / 2 + 0.5).clamp(0, 1), tensor)


def test_the_callback_is_diffusers_own_and_may_change_the_latents(tiny_pipeline: LatentDiffusionPipeline) -> None:
    seen: list[tuple[int, int, tuple[int, ...]]] = []

    def callback(pipeline: object, step: int, t: Tensor, tensors: dict[str, Tensor]) -> dict[str, Tensor]:
        assert pipeline is tiny_pipeline
        seen.append((step, int(t), tuple(tensors["latents"].shape)))
        return {"latents": torch.zeros_like(tensors["latents"])}

    call: dict[str, Any] = {"num_inference_steps": 2, "seed": 0, "output_type": "latent", "scheduler": "ddim"}
    result = tiny_pipeline(["a"] * 3, batch_size=2, callback_on_step_end=callback, **call)
    assert seen == [
        (0, 999, (2, 4, 16, 16)),
        (1, 499, (2, 4, 16, 16)),
        (0, 999, (1, 4, 16, 16)),
        (1, 499, (1, 4, 16, 16)),
    ]
    assert not result.images.any()


def test_a_trainer_finds_its_networks_and_random_numbers_as_they_were(make_pipeline: MakePipeline) -> None:
    pipeline = make_pipeline(NoiseConfig())
    pipeline.unet.train()
    pipeline.unet.mid_block.eval()
    modes = [module.training for module in pipeline.unet.modules()]
    state = torch.get_rng_state()
    images = pipeline("a", num_inference_steps=2, seed=0, scheduler="ddpm", output_type="latent").images
    assert [module.training for module in pipeline.unet.modules()] == modes
    assert torch.equal(torch.get_rng_state(), state)
    assert not images.requires_grad and all(p.requires_grad for p in pipeline.unet.parameters())


def test_saving_and_opening_keeps_every_bit(tiny_pipeline: LatentDiffusionPipeline, folder: Path) -> None:
    opened = LatentDiffusionPipeline.from_pretrained(folder, dtype="fp32", device="cpu")
    assert opened.name == "model"
    for part in ("vae", "unet", "text_encoder"):
        before, after = getattr(tiny_pipeline, part).state_dict(), getattr(opened, part).state_dict()
        assert before.keys() == after.keys() and all(torch.equal(before[key], after[key]) for key in before)
    call: dict[str, Any] = {"num_inference_steps": 3, "seed": 0, "output_type": "np"}
    assert np.array_equal(opened("a cat", **call).images, tiny_pipeline("a cat", **call).images)
    assert not [path for path in folder.rglob("*") if path.suffix in (".bin", ".pt", ".ckpt")]


def test_a_stable_diffusion_folder_with_a_scheduler_beyond_ours(folder: Path, tmp_path: Path) -> None:
    """As published ones are: PNDM, a safety checker named in the index, which is not opened."""
    copy = tmp_path / "sd"
    shutil.copytree(folder, copy)
    edit_index(copy, scheduler=["diffusers", "PNDMScheduler"])
    PNDMScheduler(beta_schedule="scaled_linear", skip_prk_steps=True, steps_offset=1).save_pretrained(
        copy / "scheduler"
    )
    theirs = open_in_diffusers(copy)
    edit_index(copy, safety_checker=["stable_diffusion", "StableDiffusionSafetyChecker"])
    ours = LatentDiffusionPipeline.from_pretrained(copy, dtype="fp32", device="cpu")
    call: dict[str, Any] = {"num_inference_steps": 5, "guidance_scale": 3.0, "output_type": "np"}
    expected = theirs(PROMPTS, latents=noise(2), **call).images
    assert np.abs(ours(PROMPTS, latents=noise(2), **call).images - expected).max() < 1e-4
    assert scheduler_name(ours.noise_scheduler) == "PNDMScheduler"
    assert ours.make_scheduler("euler").config.beta_schedule == "scaled_linear"


def test_a_vq_autoencoder_and_a_model_without_text_come_back_too(make_pipeline: MakePipeline, tmp_path: Path) -> None:
    pipeline = make_pipeline(NoiseConfig(), "ddim", kind="vq", text=False)
    pipeline.save_pretrained(tmp_path / "vq")
    assert json.loads((tmp_path / "vq/model_index.json").read_text())["_class_name"] == "LatentDiffusionPipeline"
    opened = LatentDiffusionPipeline.from_pretrained(tmp_path / "vq", dtype="fp32", device="cpu")
    assert opened.text_encoder is None and type(opened.vae).__name__ == "VQModel"
    call: dict[str, Any] = {"num_inference_steps": 3, "seed": 0, "output_type": "np"}
    assert np.array_equal(opened(["", ""], **call).images, pipeline(["", ""], **call).images)
    with pytest.raises(UserError, match="no text encoder"):
        opened("a cat", **call)


def test_a_folder_in_half_precision_is_cast(folder: Path) -> None:
    pipeline = LatentDiffusionPipeline.from_pretrained(folder, dtype=torch.bfloat16, device="cpu")
    assert {p.dtype for net in (pipeline.unet, pipeline.vae, pipeline.text_encoder) for p in net.parameters()} == {  # type: ignore[union-attr]
        torch.bfloat16
    }
    images = pipeline("a", num_inference_steps=1, seed=0, height=8, width=8, output_type="latent").images
    assert images.dtype == torch.float32 and images.isfinite().all()  # type: ignore[union-attr]


def test_an_older_model_is_replaced_and_other_folders_are_left_alone(
    tiny_pipeline: LatentDiffusionPipeline, folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    target = tmp_path / "model"
    shutil.copytree(folder, target)
    (target / "vae" / "stale.txt").write_text("old")
    tiny_pipeline.save_pretrained(target)
    assert not (target / "vae" / "stale.txt").exists()

    def full_disk(*_: object, **__: object) -> None:
        raise OSError(28, "No space left on device")

    (target / "marker").write_text("still here")
    with monkeypatch.context() as patch:
        patch.setattr(type(tiny_pipeline.unet), "save_pretrained", full_disk)
        with pytest.raises(UserError, match="cannot be written"):
            tiny_pipeline.save_pretrained(target)
    assert (target / "marker").exists() and (target / "unet/config.json").exists()
    (tmp_path / "photos").mkdir()
    (tmp_path / "photos/holiday.jpg").write_text("x")
    with pytest.raises(UserError, match="something that is not a pipeline"):
        tiny_pipeline.save_pretrained(tmp_path / "photos")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["model", "photos"]


def test_a_long_prompt_is_cut_with_a_warning_that_says_what(
    tiny_pipeline: LatentDiffusionPipeline, caplog: pytest.LogCaptureFixture
) -> None:
    words = " ".join(["one two three four five six seven"] * 2)
    with caplog.at_level(logging.WARNING):
        tiny_pipeline([words, words + " eight nine"], num_inference_steps=1, seed=0, output_type="latent")
    assert [record.getMessage() for record in caplog.records] == [
        "prompt longer than the text window of 16 tokens; cut off: 'eight nine'"
    ]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"height": 31}, "height: found 31; allowed is a multiple of 2; the nearest are 30 and 32"),
        ({"width": 0}, "width: found 0; .* nearest are 2 and 4"),
        ({"num_images_per_prompt": 0}, "num_images_per_prompt: found 0"),
        ({"batch_size": 0}, "batch_size: found 0"),
        ({"num_inference_steps": 0}, "num_inference_steps: found 0; allowed is 1 to 1000"),
        ({"guidance_scale": -1}, "guidance_scale: found -1"),
        ({"scheduler": "dmp++"}, r"did you mean dpm\+\+"),
        ({"output_type": "jpg"}, "output_type: found 'jpg'; allowed is pil, np, pt, latent"),
        ({"seed": -1}, "seed: found -1"),
        ({"seed": [1, 2]}, "seed: found 2 for 1 images"),
        ({"generator": [torch.Generator()] * 3}, "generator: found 3 for 1 images"),
        ({"generator": torch.Generator(), "seed": 1}, "seed: found together with generator"),
        ({"negative_prompt": ["a", "b"]}, "negative_prompt: found 2 for 1 prompts"),
        ({"latents": torch.zeros(2, 4, 16, 16)}, r"latents: found shape \[2, 4, 16, 16\]; allowed is \[1, 4, 16, 16\]"),
        ({"latents": torch.zeros(1, 4, 16, 16), "height": 16}, r"allowed is \[1, 4, 8, 16\]"),
        ({"prompt": []}, "prompt: found none"),
    ],
)
def test_bad_arguments_are_named(tiny_pipeline: LatentDiffusionPipeline, arguments: Any, message: str) -> None:
    with pytest.raises(UserError, match=message):
        tiny_pipeline(**({"prompt": "a"} | arguments))


def edit_index(folder: Path, **changes: object) -> None:
    path = folder / "model_index.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (lambda f: shutil.rmtree(f), "no such folder"),
        (lambda f: (f / "model_index.json").unlink(), "found no model_index.json"),
        (lambda f: (f / "model_index.json").write_text("{"), "model_index.json"),
        (lambda f: edit_index(f, _class_name="FluxPipeline"), "found a FluxPipeline; allowed is StableDiffusion"),
        (lambda f: edit_index(f, text_encoder=["transformers", "T5EncoderModel"]), "text encoder T5EncoderModel"),
        (lambda f: shutil.rmtree(f / "vae"), "vae"),
        (lambda f: shutil.rmtree(f / "tokenizer"), "no tokenizer folder"),
        (lambda f: (f / "unet/diffusion_pytorch_model.safetensors").unlink(), "diffusion_pytorch_model.safetensors"),
        (lambda f: (f / "unet/diffusion_pytorch_model.safetensors").write_bytes(b"broken"), "model"),
        (lambda f: (f / "scheduler/scheduler_config.json").write_text('{"_class_name": "UNet2DModel"}'), "UNet2DModel"),
    ],
)
def test_a_folder_that_cannot_be_opened_is_one_line(
    folder: Path, tmp_path: Path, damage: Callable[[Path], object], message: str
) -> None:
    copy = tmp_path / "model"
    shutil.copytree(folder, copy)
    damage(copy)
    with pytest.raises(UserError, match=message):
        LatentDiffusionPipeline.from_pretrained(copy, dtype="fp32", device="cpu")


def test_a_mistyped_path_is_not_looked_for_on_the_hub(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "runs").mkdir()
    monkeypatch.chdir(tmp_path)
    for path in ("runs/dmeo", "no/such/folder", "model", str(tmp_path / "absent")):
        with pytest.raises(UserError, match="no such folder; give the folder of a pipeline, or a Hugging Face hub id"):
            LatentDiffusionPipeline.from_pretrained(path)


def test_a_hub_id_is_fetched_without_pickles(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[Any] = []

    def snapshot_download(name: str, **options: Any) -> str:
        asked.append((name, options))
        return str(folder)

    monkeypatch.setattr("huggingface_hub.snapshot_download", snapshot_download)
    pipeline = LatentDiffusionPipeline.from_pretrained("someone/their-model", dtype="fp32", device="cpu")
    assert pipeline.name == "someone/their-model"
    [(name, options)] = asked
    assert name == "someone/their-model" and "*.bin" in options["ignore_patterns"]


def test_a_folder_of_half_precision_files_alone_opens(tiny_pipeline, tmp_path):
    tiny_pipeline.save_pretrained(tmp_path / "whole")
    opened = LatentDiffusionPipeline.from_pretrained(tmp_path / "whole")
    for part, name in (
        ("vae", "diffusion_pytorch_model"),
        ("unet", "diffusion_pytorch_model"),
        ("text_encoder", "model"),
    ):
        file = tmp_path / "whole" / part / f"{name}.safetensors"
        file.rename(file.with_name(f"{name}.fp16.safetensors"))
    renamed = LatentDiffusionPipeline.from_pretrained(tmp_path / "whole")
    settings = {"num_inference_steps": 2, "seed": 0, "output_type": "latent"}
    assert torch.equal(renamed("a circle", **settings).images, opened("a circle", **settings).images)
