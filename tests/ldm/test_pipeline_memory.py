"""Drawing with less memory: the same pictures, and less memory indeed (every storage of the tensors is counted)."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from ldm.attention import attention_kernel, set_attention
from ldm.cli.main import main
from ldm.errors import UserError
from ldm.noise import NoiseConfig
from ldm.picture import read_parameters
from ldm.pipeline import LatentDiffusionPipeline
from ldm.training.plan_ledger import Ledger

MakePipeline = Callable[..., LatentDiffusionPipeline]
DRAWING: dict[str, Any] = {"num_inference_steps": 2, "guidance_scale": 3.0, "seed": 5, "output_type": "pt"}


@pytest.fixture
def pipeline(make_pipeline: MakePipeline) -> LatentDiffusionPipeline:
    """One of its own for each test: all of them change it."""
    return make_pipeline(NoiseConfig())


def draw(pipeline: LatentDiffusionPipeline, **options: Any) -> torch.Tensor:
    return pipeline(["a red square", "a dog", ""], **DRAWING, **options).images


def peak(work: Callable[[], object]) -> int:
    ledger = Ledger()
    with ledger, torch.no_grad():
        work()
    return ledger.peak


def test_slices_of_a_batch_are_the_same_pictures_with_less_memory(pipeline: LatentDiffusionPipeline) -> None:
    latents = torch.randn(6, 4, 16, 16, generator=torch.Generator().manual_seed(0))
    images = torch.rand(6, 3, 32, 32, generator=torch.Generator().manual_seed(1)) * 2 - 1
    whole, moments, drawn = pipeline.decode_latents(latents), pipeline.encode_images(images), draw(pipeline)
    at_once = peak(lambda: pipeline.decode_latents(latents))
    pipeline.enable_vae_slicing()
    torch.testing.assert_close(pipeline.decode_latents(latents), whole, rtol=0, atol=1e-5)
    torch.testing.assert_close(pipeline.encode_images(images), moments, rtol=0, atol=1e-5)
    torch.testing.assert_close(draw(pipeline), drawn, rtol=0, atol=1e-5)
    assert peak(lambda: pipeline.decode_latents(latents)) < 0.4 * at_once
    pipeline.disable_vae_slicing()
    assert torch.equal(pipeline.decode_latents(latents), whole)


def test_tiles_are_nearly_the_same_picture_with_less_memory(pipeline: LatentDiffusionPipeline) -> None:
    """Smooth latents, as trained models have them; where tiles do not matter, the tolerance is that of slices."""
    latents = torch.nn.functional.interpolate(
        torch.randn(1, 4, 4, 4, generator=torch.Generator().manual_seed(0)), size=(64, 64), mode="bicubic"
    )
    whole = pipeline.decode_latents(latents)
    at_once = peak(lambda: pipeline.decode_latents(latents))
    pipeline.enable_vae_tiling(64)
    tiled = pipeline.decode_latents(latents)
    assert tiled.shape == whole.shape
    error = (tiled - whole).abs() / whole.std()
    assert 1e-4 < error.mean() < 0.5
    assert peak(lambda: pipeline.decode_latents(latents)) < 0.5 * at_once
    small = latents[..., :32, :32]  # one tile is all of it
    tiled_small = pipeline.decode_latents(small)
    pipeline.disable_vae_tiling()
    torch.testing.assert_close(tiled_small, pipeline.decode_latents(small), rtol=0, atol=1e-5)


def test_the_size_of_tiles_by_default_is_the_autoencoders_own(pipeline: LatentDiffusionPipeline) -> None:
    pipeline.enable_vae_tiling()
    assert (pipeline.vae.use_tiling, pipeline.vae.tile_sample_min_size) == (True, pipeline.vae.config.sample_size)
    for wrong in (8, 20):
        with pytest.raises(UserError, match=f"tile: found {wrong}; allowed is 16 or more, in steps of 8"):
            pipeline.enable_vae_tiling(wrong)


@pytest.mark.parametrize("slice_size", ["auto", 1])
def test_slices_of_attention_are_the_same_pictures_with_less_memory(
    pipeline: LatentDiffusionPipeline, slice_size: str | int
) -> None:
    drawn = draw(pipeline)
    set_attention(pipeline.unet, "math")
    explicit = peak(lambda: draw(pipeline, height=96, width=96))
    pipeline.enable_attention_slicing(slice_size)
    assert attention_kernel(pipeline.unet) == "slices"
    torch.testing.assert_close(draw(pipeline), drawn, rtol=0, atol=1e-5)
    assert peak(lambda: draw(pipeline, height=96, width=96)) < 0.8 * explicit
    pipeline.disable_attention_slicing()
    assert attention_kernel(pipeline.unet) == "sdpa"
    with pytest.raises(UserError, match=r"slice_size: found 99 .*; allowed is auto, max or a number"):
        pipeline.enable_attention_slicing(99)


def test_offloading_brings_each_part_when_it_works_and_takes_the_one_before_it_away(
    make_pipeline: MakePipeline, monkeypatch: pytest.MonkeyPatch
) -> None:
    """To cpu:0, which accelerate tells from cpu, though torch does not: so without a GPU one sees when parts are sent.

    What is taken away is read from accelerate's hooks: it takes nothing off a device that is the CPU.
    """
    pipeline = make_pipeline(NoiseConfig(), semantic=True)
    drawn = draw(pipeline, batch_size=2)
    parts = {"text": pipeline.text_encoder, "unet": pipeline.unet, "vae": pipeline.vae}
    names = {id(part): name for name, part in parts.items()}
    log: list[str] = []
    move = torch.nn.Module.to

    def noted(module: torch.nn.Module, *where: Any, **options: Any) -> torch.nn.Module:
        if id(module) in names and where == (torch.device("cpu:0"),) and names[id(module)] not in log[-1:]:
            log.append(names[id(module)])
        return move(module, *where, **options)

    monkeypatch.setattr(torch.nn.Module, "to", noted)
    pipeline.enable_model_cpu_offload("cpu:0")
    assert pipeline.device == torch.device("cpu:0")
    assert torch.equal(draw(pipeline, batch_size=2), drawn)
    assert log == ["text", "unet", "vae"] * 2  # three pictures, two batches
    taken_away = {name: names[id(part._hf_hook.prev_module_hook.model)] for name, part in parts.items()}
    assert taken_away == {"text": "vae", "unet": "text", "vae": "unet"}


def test_a_vq_autoencoder_has_neither_tiles_nor_slices(make_pipeline: MakePipeline) -> None:
    pipeline = make_pipeline(NoiseConfig(), kind="vq")
    for what, method in (("tiles", pipeline.enable_vae_tiling), ("slices", pipeline.enable_vae_slicing)):
        with pytest.raises(UserError, match=f"vae: found a VQModel, which diffusers cannot run in {what}; allowed is"):
            method()


def generate(model: Path, out: Path, *words: str) -> int:
    shared = ["--steps", "2", "--seed", "1", "--device", "cpu", "--dtype", "fp32", "--out", str(out)]
    return main(["generate", "--model", str(model), "--prompt", "a dog", *shared, *words])


def test_the_options_of_the_commands(tiny_folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    options = ["--vae-slicing", "--vae-tiling", "16", "--verbose"]
    assert generate(tiny_folder, tmp_path / "math", *options, "--attention", "math") == 0
    assert "attention: math (explicit products)\n" in capsys.readouterr().err
    assert generate(tiny_folder, tmp_path / "slices", "--attention-slicing", "--verbose") == 0
    assert "attention: slices (explicit products)\n" in capsys.readouterr().err
    tiled, whole = (tmp_path / name / "00000-1.png" for name in ("math", "slices"))
    assert "VAE tiling: 16" in read_parameters(tiled)
    assert "VAE tiling" not in read_parameters(whole)


@pytest.mark.parametrize(
    ("words", "says"),
    [
        (
            ["--offload"],
            "--offload: found no GPU to send parts of the model to; leave it out",
        ),
        (["--vae-tiling", "10"], "tile: found 10; allowed is 16 or more, in steps of 8"),
        (
            ["--attention-slicing", "--attention", "math"],
            "--attention-slicing: found with --attention math; it is a kernel of its own; give one",
        ),
    ],
)
def test_options_that_cannot_be_are_one_line(
    words: list[str], says: str, tiny_folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert generate(tiny_folder, tmp_path / "out", *words) == 2
    assert capsys.readouterr().err == f"ldm generate: {says}\n"
    assert not (tmp_path / "out").exists()
