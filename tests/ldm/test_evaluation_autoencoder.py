"""The autoencoder's report: spectra of known signals, codes that are counted, the worst images, rFID."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor

from autoencoder import Autoencoder, AutoencoderConfig, build_autoencoder, decode, encode, quantise
from autoencoder.latents import Moments, to_unet
from ldm.data.images import to_tensor
from ldm.data.scene_rendering import render_image
from ldm.data.scenes import ScenesConfig, scene_at
from ldm.errors import UserError
from ldm.evaluation import autoencoder_report
from ldm.evaluation.autoencoder_report import measure_autoencoder
from ldm.evaluation.codebook import CodebookMeter
from ldm.evaluation.latent_features import LatentExtractor
from ldm.evaluation.reconstruction import as_saved, measure_reconstructions
from ldm.evaluation.scaled_latents import scaled_moments
from ldm.evaluation.spectrum import BANDS, SpectrumMeter, band_limits, radial_power


def autoencoder_of(kind: str) -> Autoencoder:
    torch.manual_seed(0)
    config = AutoencoderConfig(
        kind=kind,  # type: ignore[arg-type]
        latent_channels=3,
        channels=(8, 8),
        layers_per_block=1,
        mid_attention=False,
        norm_groups=4,
        codebook_size=16,
    )
    return build_autoencoder(config).eval()


@pytest.fixture(scope="module")
def images() -> Tensor:
    return torch.stack([to_tensor(render_image(scene_at(ScenesConfig(), i), 32)) for i in range(14)])


# --- Spectra ---------------------------------------------------------------------------------------------------------


def test_white_noise_has_its_variance_in_every_band() -> None:
    noise = 3 * torch.randn(200, 2, 32, 32, generator=torch.Generator().manual_seed(0))
    power = radial_power(noise).mean(0)
    assert torch.allclose(power[1:], torch.full((BANDS - 1,), 9.0, dtype=torch.float64), rtol=0.05)
    assert 0.5 * 9 < power[0] < 9  # without the mean


@pytest.mark.parametrize("band", range(1, BANDS))
def test_a_wave_is_in_the_band_of_its_frequency(band: int) -> None:
    low, high = band_limits()[band]
    across = torch.arange(64.0)
    wave = torch.cos(2 * math.pi * (low + high) / 2 * across).expand(1, 1, 64, 64)
    for picture in (wave, wave.transpose(2, 3)):
        power = radial_power(picture)[0]
        assert power.argmax() == band
        assert power[band] > 20 * power.sum() / 21 * 0.95


def test_half_the_high_frequencies_survive() -> None:
    noise = torch.randn(60, 3, 32, 32, generator=torch.Generator().manual_seed(0))
    spectrum = torch.fft.rfft2(noise)
    down, across = torch.fft.fftfreq(32)[:, None].abs(), torch.fft.rfftfreq(32)[None]
    high = (down**2 + across**2).sqrt() >= 0.25
    filtered = torch.fft.irfft2(spectrum * torch.where(high, 0.5**0.5, 1.0), s=(32, 32))
    meter = SpectrumMeter()
    for part, found in zip(noise.split(25), filtered.split(25), strict=True):
        meter.update(part, found, part)
    spectra = meter.result()
    assert spectra.n == 60
    assert spectra.high_frequencies() == pytest.approx(0.5, abs=0.03)
    assert spectra.survives[0] == pytest.approx(1, abs=0.02)
    assert spectra.survives[-1] == pytest.approx(0.5, abs=0.02)
    assert spectra.error[-1] == pytest.approx((1 - 0.5**0.5) ** 2, abs=0.02)
    assert spectra.error[0] == pytest.approx(0, abs=0.02)


def test_no_images_have_no_spectrum() -> None:
    with pytest.raises(UserError, match="found 0 images"):
        SpectrumMeter().result()


# --- Codebook --------------------------------------------------------------------------------------------------------


def test_perplexity_is_the_number_of_equally_frequent_codes() -> None:
    meter = CodebookMeter(10)
    meter.update(torch.tensor([[0, 1], [2, 3]]))
    meter.update(torch.tensor([3, 2, 1, 0]))
    use = meter.result()
    assert (use.codes, use.used, use.positions, use.share) == (10, 4, 8, 0.4)
    assert use.perplexity == pytest.approx(4)
    meter.update(torch.tensor([9] * 8))
    assert meter.result().perplexity == pytest.approx(math.exp(0.5 * math.log(2) + 4 * 0.125 * math.log(8)))
    with pytest.raises(UserError, match="found 0 images"):
        CodebookMeter(3).result()


# --- The report ------------------------------------------------------------------------------------------------------


@torch.no_grad()
def test_the_figures_are_the_means_of_the_images(images: Tensor) -> None:
    autoencoder = autoencoder_of("kl")
    report = measure_autoencoder(autoencoder, images.split(5), lpips=lambda a, b: (a - b).abs().mean(dim=(1, 2, 3)))
    short, _ = measure_reconstructions(autoencoder, [images])
    found = {one.name: one for one in report.measurements}
    assert set(found) == {"psnr", "ssim", "lpips"}
    assert found["psnr"].value == pytest.approx(short.psnr, rel=1e-5)
    assert found["ssim"].value == pytest.approx(short.ssim, rel=1e-5)
    difference = as_saved(images) - as_saved(decode(autoencoder, encode(autoencoder, images).mean))
    assert found["lpips"].value == pytest.approx(2 * difference.abs().mean().item(), rel=1e-4)
    for one in found.values():
        assert one.estimate.low is not None and one.estimate.high is not None
        assert one.estimate.low < one.value < one.estimate.high
        assert one.setting.n == 14
    assert report.codebook is None and report.n == 14


@torch.no_grad()
def test_the_ten_worst_are_shown_the_worst_first(images: Tensor) -> None:
    autoencoder = autoencoder_of("kl")
    difference = as_saved(images) - as_saved(decode(autoencoder, encode(autoencoder, images).mean))
    psnr = -10 * difference.square().mean(dim=(1, 2, 3)).log10()
    worst = measure_autoencoder(autoencoder, images.split(4)).worst
    assert [image.index for image in worst] == psnr.argsort()[:10].tolist()
    assert worst[0].psnr == pytest.approx(psnr.min().item(), rel=1e-5)
    assert torch.equal(worst[0].original, as_saved(images[worst[0].index]))
    by_lpips = measure_autoencoder(autoencoder, images.split(4), lpips=lambda a, _: a.mean(dim=(1, 2, 3))).worst
    assert [image.index for image in by_lpips] == images.mean(dim=(1, 2, 3)).argsort(descending=True)[:10].tolist()


@torch.no_grad()
def test_latents_are_told_as_the_unet_sees_them(images: Tensor) -> None:
    autoencoder = autoencoder_of("kl")
    autoencoder.register_to_config(scaling_factor=0.25)
    moments = encode(autoencoder, images)
    summary = measure_autoencoder(autoencoder, images.split(5)).latents
    means = to_unet(autoencoder, moments.mean).transpose(0, 1).flatten(1).double()  # [C, N]
    noise = torch.diag((moments.logvar.double().exp() * 0.25**2).mean(dim=(0, 2, 3)))
    covariance = torch.cov(means, correction=0) + noise
    std = covariance.diagonal().sqrt()
    assert summary.shape == [3, 16, 16]
    assert summary.mean == pytest.approx(means.mean(1).tolist(), rel=1e-4)
    assert summary.std == pytest.approx(std.tolist(), rel=1e-4)
    expected = covariance / torch.outer(std, std)
    assert torch.allclose(torch.tensor(summary.correlation, dtype=torch.float64), expected, atol=1e-4)


def test_scaled_moments_are_those_of_scaled_samples() -> None:
    autoencoder = autoencoder_of("kl")
    autoencoder.register_to_config(scaling_factor=0.5, shift_factor=3.0)
    moments, noise = Moments(torch.randn(2, 3, 4, 4), torch.randn(2, 3, 4, 4)), torch.randn(2, 3, 4, 4)
    found = scaled_moments(autoencoder, moments).sample(noise)
    assert torch.allclose(found, to_unet(autoencoder, moments.sample(noise)), atol=1e-5)


@torch.no_grad()
def test_a_codebook_is_counted(images: Tensor) -> None:
    autoencoder = autoencoder_of("vq")
    report = measure_autoencoder(autoencoder, images.split(5))
    counts = torch.bincount(quantise(autoencoder, encode(autoencoder, images).mean).indices.flatten(), minlength=16)
    assert report.codebook is not None
    assert (report.codebook.codes, report.codebook.positions) == (16, 14 * 16 * 16)
    assert report.codebook.used == int((counts > 0).sum())


def test_perfect_reconstructions_have_no_rfid(images: Tensor, monkeypatch: pytest.MonkeyPatch) -> None:
    autoencoder = autoencoder_of("kl")
    extractor = LatentExtractor(autoencoder, 32)
    worse = {one.name: one for one in measure_autoencoder(autoencoder, [images], extractor=extractor).measurements}
    monkeypatch.setattr(autoencoder_report, "decode", lambda *_: images)
    same = {one.name: one for one in measure_autoencoder(autoencoder, [images], extractor=extractor).measurements}
    assert same["rfid"].value == pytest.approx(0, abs=1e-6)
    assert same["psnr"].value == pytest.approx(10 * math.log10(255**2 * 3 * 32 * 32))  # not infinite
    assert worse["rfid"].value > 0.01
    assert same["rfid"].setting.reference == "the images themselves"


def test_too_few_images_are_refused(images: Tensor) -> None:
    autoencoder = autoencoder_of("kl")
    with pytest.raises(UserError, match="found 0 images"):
        measure_autoencoder(autoencoder, [])
    with pytest.raises(UserError, match="found 1 image "):
        measure_autoencoder(autoencoder, [images[:1]], extractor=LatentExtractor(autoencoder, 32))
    (alone,) = (one for one in measure_autoencoder(autoencoder, [images[:1]]).measurements if one.name == "psnr")
    assert alone.estimate.low is None
