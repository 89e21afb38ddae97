"""An autoencoder that overflows in half precision is run again in fp32, image by image, and says so in one line."""

from __future__ import annotations

import logging
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from torch import Tensor

from autoencoder.latents import decode, from_unet
from ldm.cli.main import main
from ldm.errors import UserError
from ldm.noise import NoiseConfig
from ldm.pipeline import LatentDiffusionPipeline
from ldm.pipeline_model import NotFinitePicture

MakePipeline = Callable[..., LatentDiffusionPipeline]


@pytest.fixture
def overflowing(make_pipeline: MakePipeline) -> LatentDiffusionPipeline:
    """In fp16, with weights that latents of size 10 take above 65,504 in the first layer; group norm mends that."""
    pipeline = make_pipeline(NoiseConfig())
    with torch.no_grad():
        pipeline.vae.decoder.conv_in.weight.mul_(2e3 / pipeline.vae.decoder.conv_in.weight.abs().max())
    return pipeline.to(dtype=torch.float16)


def latents(*sizes: float) -> Tensor:
    noise = torch.randn(1, 4, 16, 16, generator=torch.Generator().manual_seed(0))
    return torch.cat([size * noise for size in sizes])


def test_only_what_overflowed_is_decoded_again(
    overflowing: LatentDiffusionPipeline, caplog: pytest.LogCaptureFixture
) -> None:
    small, large = latents(0.1), latents(10)
    with torch.no_grad():
        assert not decode(overflowing.vae, from_unet(overflowing.vae, large.half())).isfinite().all()
    with caplog.at_level(logging.WARNING):
        beside_another = overflowing.decode_latents(torch.cat([small, small]))  # two as below: so many round alike
        assert caplog.messages == []
        both = overflowing.decode_latents(torch.cat([small, large]))
    assert caplog.messages == [
        "the autoencoder overflowed in half precision; 1 of 2 images are decoded in fp32 instead"
    ]
    assert overflowing.vae.dtype == torch.float16
    assert torch.equal(both[:1], beside_another[:1])  # the image that overflows changes nothing
    with torch.no_grad():
        exact = decode(overflowing.vae.float(), from_unet(overflowing.vae, large))
    assert torch.equal(both[1:], exact) and exact.isfinite().all() and exact.std() > 0.01


def test_the_weights_are_as_before(overflowing: LatentDiffusionPipeline) -> None:
    before = {name: value.clone() for name, value in overflowing.vae.state_dict().items()}
    overflowing.decode_latents(latents(10))
    assert all(torch.equal(before[name], value) for name, value in overflowing.vae.state_dict().items())


def test_under_autocast_too(make_pipeline: MakePipeline, monkeypatch: pytest.MonkeyPatch) -> None:
    """As a preview is drawn while a bf16 training runs: the weights are fp32, the arithmetic is not."""
    pipeline = make_pipeline(NoiseConfig())
    plain = pipeline.decode_latents(latents(1))
    real = decode

    def broken_in_bf16(vae: torch.nn.Module, raw: Tensor) -> Tensor:
        images = real(vae, raw)  # type: ignore[arg-type]
        return images if images.dtype == torch.float32 else images * torch.inf

    monkeypatch.setattr("ldm.pipeline_model.decode", broken_in_bf16)
    with torch.autocast("cpu", torch.bfloat16):
        assert torch.equal(pipeline.decode_latents(latents(1)), plain)


def test_what_fp32_cannot_mend_is_one_line(overflowing: LatentDiffusionPipeline) -> None:
    with pytest.raises(NotFinitePicture, match="the U-Net's latents are so; lower the guidance scale"):
        overflowing.decode_latents(latents(torch.nan))
    with torch.no_grad():
        overflowing.vae.decoder.conv_out.bias.fill_(torch.inf)
    with pytest.raises(NotFinitePicture, match="in fp32 too; look at its weights") as error:
        overflowing.decode_latents(latents(1))
    assert isinstance(error.value, UserError) and "\n" not in str(error.value)
    assert overflowing.vae.dtype == torch.float16


@pytest.mark.slow
def test_the_command_draws_it_and_says_so_once(
    overflowing: LatentDiffusionPipeline, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    with torch.no_grad():
        overflowing.vae.decoder.conv_in.weight.mul_(65000 / overflowing.vae.decoder.conv_in.weight.abs().max())
    overflowing.save_pretrained(tmp_path / "model")
    words = ["--prompt", "a", "--device", "cpu", "--dtype", "fp16", "--steps", "1", "--guidance", "1"]
    assert main(["generate", "--model", str(tmp_path / "model"), "--out", str(tmp_path / "out"), *words]) == 0
    assert capfd.readouterr().err.count("decoded in fp32 instead") == 1
    assert list((tmp_path / "out").glob("*.png"))
