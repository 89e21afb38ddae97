from __future__ import annotations

import pytest
import torch

from autoencoder import AutoencoderConfig, build_autoencoder, decode, encode
from ldm.errors import UserError
from ldm.evaluation import reconstruction
from ldm.evaluation.reconstruction import PICTURES, as_saved, measure_reconstructions


@pytest.fixture
def autoencoder():
    torch.manual_seed(0)
    config = AutoencoderConfig(
        latent_channels=2, channels=(8, 8), layers_per_block=1, mid_attention=False, norm_groups=4
    )
    return build_autoencoder(config).eval()


@torch.no_grad()
def test_psnr_is_the_mean_of_the_images_own(autoencoder):
    images = torch.rand(5, 3, 16, 16, generator=torch.Generator().manual_seed(1)) * 2 - 1
    report, picture = measure_reconstructions(autoencoder, [images[:2], images[2:]])
    error = as_saved(decode(autoencoder, encode(autoencoder, images).mean)) - as_saved(images)
    expected = (-10 * error.square().mean(dim=(1, 2, 3)).log10()).mean().item()
    assert report.psnr == pytest.approx(expected, rel=1e-4)
    assert (report.images, report.resolution, report.latent_shape) == (5, 16, [2, 8, 8])
    assert picture.width > 5 * 16


def test_an_identical_reconstruction_is_perfect(autoencoder, monkeypatch):
    images = torch.rand(3, 3, 16, 16) * 2 - 1
    monkeypatch.setattr(reconstruction, "decode", lambda *_: images)
    report, _ = measure_reconstructions(autoencoder, [images], lambda a, b: (a - b).abs().mean(dim=(1, 2, 3)))
    assert report.psnr > 100
    assert report.ssim == pytest.approx(1.0)
    assert report.lpips == 0.0


def test_no_images_is_a_user_error(autoencoder):
    with pytest.raises(UserError, match="no image to measure"):
        measure_reconstructions(autoencoder, [])


@pytest.mark.parametrize("count", [1, 3, 8, 9, 16, 100, 333])
def test_the_pictures_shown_are_spread_over_all_images(count):
    gallery = reconstruction._Gallery()
    for i in range(count):
        gallery.offer((torch.tensor(i), torch.tensor(i)))
    shown = [int(original) for original, _ in gallery.chosen()]
    assert len(shown) == min(PICTURES, count)
    assert shown == sorted(set(shown))
    assert shown[0] == 0
    assert count - shown[-1] <= max(1, count // 2)
    assert max(b - a for a, b in zip([*shown, count], [*shown[1:], count], strict=False)) <= max(1, count // 3)
