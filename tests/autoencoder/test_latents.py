from __future__ import annotations

import math

import pytest
import torch
from diffusers import AutoencoderKL, VQModel
from diffusers.models.autoencoders.vae import VectorQuantizer
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.distributions import Normal, kl_divergence

from autoencoder import (
    LOGVAR_FLOOR,
    LatentStatistics,
    Moments,
    decode,
    encode,
    fold_normalisation,
    from_unet,
    quantise,
    scale_equivariance,
    to_unet,
)
from autoencoder.latents import equal_variance_rotation


def random_moments(*shape: int, seed: int = 0) -> Moments:
    generator = torch.Generator().manual_seed(seed)
    offsets = torch.arange(shape[1]).view(1, -1, 1, 1)
    mean = torch.randn(shape, generator=generator) * (1 + offsets) + offsets
    return Moments(mean, torch.randn(shape, generator=generator) - 1)


# Moments


def test_kl_equals_torch_distributions():
    moments = random_moments(3, 4, 5, 6)
    posterior = Normal(moments.mean, torch.exp(0.5 * moments.logvar))
    expected = kl_divergence(posterior, Normal(0.0, 1.0)).sum(dim=(1, 2, 3))
    torch.testing.assert_close(moments.kl(), expected, rtol=1e-5, atol=1e-4)


def test_kl_is_zero_only_at_the_prior():
    zero = torch.zeros(1, 2, 3, 3)
    assert Moments(zero, zero).kl().item() == 0.0
    assert Moments(zero + 0.1, zero).kl().item() > 0
    assert Moments(zero, zero + 0.1).kl().item() > 0
    assert Moments(zero, zero - 0.1).kl().item() > 0


def test_samples_have_the_posterior_moments():
    count = 40_000
    moments = random_moments(1, 3, 2, 2)
    noise = torch.randn(count, 3, 2, 2, generator=torch.Generator().manual_seed(1))
    samples = moments.sample(noise)
    std = torch.exp(0.5 * moments.logvar[0])
    assert ((samples.mean(0) - moments.mean[0]).abs() < 5 * std / math.sqrt(count)).all()
    assert ((samples.std(0) / std - 1).abs() < 5 / math.sqrt(2 * count)).all()
    assert torch.equal(moments.sample(torch.zeros(1, 3, 2, 2)), moments.mean)


def test_encode_matches_diffusers(make, images):
    autoencoder = make("kl")
    posterior = autoencoder.encode(images).latent_dist
    moments = encode(autoencoder, images)
    assert torch.equal(moments.mean, posterior.mean)
    assert torch.equal(moments.logvar, posterior.logvar)
    noise = torch.randn(moments.mean.shape, generator=torch.Generator().manual_seed(3))
    torch.testing.assert_close(moments.sample(noise), posterior.sample(torch.Generator().manual_seed(3)))


def test_encode_clamps_the_log_variance(make, images):
    autoencoder = make("kl")
    for bias, bound in ((-1e4, -30.0), (1e4, 20.0)):
        with torch.no_grad():
            autoencoder.quant_conv.bias[4:].fill_(bias)
        assert (encode(autoencoder, images[:1]).logvar == bound).all()


def test_encode_gives_float32_moments_under_autocast(make, images):
    autoencoder = make("kl")
    with torch.autocast("cpu", dtype=torch.bfloat16):
        moments = encode(autoencoder, images[:1, :, :8, :8])
    assert moments.mean.dtype == moments.logvar.dtype == torch.float32


def test_encode_refuses_a_size_that_the_levels_do_not_divide(make, images):
    with pytest.raises(ValueError, match="image size: found 31 x 32; allowed is a multiple of 2"):
        encode(make("kl"), images[..., :31])


def test_vq_has_no_posterior_noise(make, images):
    moments = encode(make("vq"), images)
    assert (moments.logvar == LOGVAR_FLOOR).all()
    noise = torch.randn(moments.mean.shape, generator=torch.Generator().manual_seed(0))
    torch.testing.assert_close(moments.sample(noise), moments.mean, atol=1e-5, rtol=0)


# Quantisation


def test_quantise_finds_the_nearest_codes(make, images):
    autoencoder = make("vq")
    latents = encode(autoencoder, images).mean
    codes = autoencoder.quantize.embedding.weight
    distances = (latents[:, None] - codes[None, :, :, None, None]).square().sum(2)  # [B, K, h, w]
    quantised = quantise(autoencoder, latents)
    chosen = distances.gather(1, quantised.indices[:, None])[:, 0]
    torch.testing.assert_close(chosen, distances.amin(1), atol=1e-6, rtol=1e-5)
    torch.testing.assert_close(quantised.latents, codes[quantised.indices].permute(0, 3, 1, 2))
    assert quantised.indices.unique().numel() > 5


def test_codebook_loss_is_the_papers_and_not_the_legacy_one(make, images):
    autoencoder = make("vq")
    latents = encode(autoencoder, images[:4]).mean.detach() * 1.3
    codes = autoencoder.quantize.embedding.weight
    gradients = []
    for legacy in (False, True):
        reference = VectorQuantizer(*codes.shape, beta=0.25, legacy=legacy)
        reference.load_state_dict(autoencoder.quantize.state_dict())
        z = latents.clone().requires_grad_()
        _, loss, _ = reference(z)
        loss.backward()
        gradients.append((loss.detach(), z.grad, reference.embedding.weight.grad))
    z = latents.clone().requires_grad_()
    ours = quantise(autoencoder, z).codebook_loss
    ours.backward()
    torch.testing.assert_close((ours.detach(), z.grad, codes.grad), gradients[0])
    assert not torch.allclose(z.grad, gradients[1][1])


def test_gradient_goes_straight_through_the_codes(make, images):
    autoencoder = make("vq")
    latents = encode(autoencoder, images[:2]).mean.detach().requires_grad_()
    weights = torch.randn(latents.shape, generator=torch.Generator().manual_seed(0))
    (quantise(autoencoder, latents).latents * weights).sum().backward()
    assert torch.equal(latents.grad, weights)
    assert autoencoder.quantize.embedding.weight.grad is None


def test_decoding_codes_equals_decoding_latents(make, images):
    autoencoder = make("vq")
    with torch.no_grad():
        latents = encode(autoencoder, images).mean
        twice = decode(autoencoder, latents)
        once = decode(autoencoder, quantise(autoencoder, latents).latents, quantised=True)
        unquantised = decode(autoencoder, latents, quantised=True)
    torch.testing.assert_close(once, twice, atol=1e-5, rtol=0)
    assert (unquantised - twice).abs().max() > 1e-4


def test_quantise_refuses_kl(make, images):
    with pytest.raises(ValueError, match="without a codebook"):
        quantise(make("kl"), torch.zeros(1, 4, 2, 2))


# Scaling


@pytest.mark.parametrize(
    "config",
    [
        {"scaling_factor": 0.18215},
        {"scaling_factor": 0.3611, "shift_factor": 0.1159},
        {"scaling_factor": 0.5, "latents_mean": [1.0, 2.0, 3.0, 4.0], "latents_std": [0.5, 1.0, 2.0, 4.0]},
    ],
)
def test_unet_scaling_round_trip_and_value(make, config):
    autoencoder = make("kl")
    autoencoder.register_to_config(**config)
    latents = random_moments(2, 4, 3, 3).mean
    scaled = to_unet(autoencoder, latents)
    shift = torch.tensor(config.get("latents_mean", [config.get("shift_factor", 0.0)])).view(1, -1, 1, 1)
    std = torch.tensor(config.get("latents_std", [1.0])).view(1, -1, 1, 1)
    torch.testing.assert_close(scaled, (latents - shift) / std * config["scaling_factor"])
    torch.testing.assert_close(from_unet(autoencoder, scaled), latents)


# Statistics


def direct(moments: list[Moments]) -> tuple[torch.Tensor, torch.Tensor]:
    mean = torch.cat([m.mean for m in moments]).double()
    variance = mean.var(dim=(0, 2, 3), correction=0)
    noise = torch.cat([m.logvar for m in moments]).double().exp().mean(dim=(0, 2, 3))
    return mean.mean(dim=(0, 2, 3)), (variance + noise).sqrt()


@given(sizes=st.lists(st.integers(1, 5), min_size=2, max_size=5), channels=st.integers(1, 5), seed=st.integers(0, 1000))
@settings(deadline=None, max_examples=25)
def test_streaming_statistics_equal_direct_and_merged(sizes, channels, seed):
    batches = [random_moments(size, channels, 3, 2, seed=seed + i) for i, size in enumerate(sizes)]
    whole, first, second = (LatentStatistics(channels) for _ in range(3))
    for i, batch in enumerate(batches):
        whole.update(batch)
        (first if i % 2 else second).update(batch)
    first.merge(second)
    mean, std = direct(batches)
    for statistics in (whole, first):
        assert statistics.count == 6 * sum(sizes)
        torch.testing.assert_close(statistics.mean, mean)
        torch.testing.assert_close(statistics.std, std)
    reduced = LatentStatistics(channels)
    reduced.sums = sum(_of(batch, channels).sums for batch in batches)  # what an all-reduce over ranks does
    torch.testing.assert_close(reduced.covariance, whole.covariance)


def _of(batch: Moments, channels: int) -> LatentStatistics:
    statistics = LatentStatistics(channels)
    statistics.update(batch)
    return statistics


def test_statistics_describe_posterior_samples():
    moments = random_moments(200, 3, 8, 8)
    samples = moments.sample(torch.randn(moments.mean.shape, generator=torch.Generator().manual_seed(5)))
    statistics = _of(moments, 3)
    torch.testing.assert_close(statistics.std.float(), samples.std(dim=(0, 2, 3)), rtol=0.02, atol=0)
    torch.testing.assert_close(statistics.overall_std.float(), samples.std(), rtol=0.02, atol=0)
    expected = torch.cov(samples.transpose(0, 1).flatten(1))
    torch.testing.assert_close(statistics.covariance.float(), expected, rtol=0.03, atol=0.1)
    assert (statistics.std > moments.mean.double().std(dim=(0, 2, 3)) * 1.005).all()  # the noise counts


def test_statistics_of_nothing_are_refused():
    with pytest.raises(ValueError, match="found no images"):
        _ = LatentStatistics(4).std


# Folding


@pytest.fixture(params=["kl", "vq-rotated", "vq"])
def folded(request, make, images):
    """(autoencoder, moments before, images before, indices before, whether every channel must have variance one)."""
    kind = request.param.split("-")[0]
    autoencoder = make(kind, initial_logvar=-3.0).eval()
    with torch.no_grad():  # channels of very unequal scale, as a trained autoencoder has
        autoencoder.quant_conv.weight[:4] *= torch.tensor([0.3, 1.0, 3.0, 9.0]).view(4, 1, 1, 1)
        autoencoder.quant_conv.bias[:4] += torch.tensor([3.0, -1.0, 0.0, 5.0])
        if kind == "vq":
            latents = encode(autoencoder, images).mean.permute(0, 2, 3, 1).flatten(0, 2)
            autoencoder.quantize.embedding.weight.copy_(latents[torch.linspace(0, len(latents) - 1, 24).long()] + 0.01)
        statistics = LatentStatistics(4)
        moments = encode(autoencoder, images)
        statistics.update(moments)
        pictures = decode(autoencoder, moments.mean)
        indices = quantise(autoencoder, moments.mean).indices if kind == "vq" else None
        covariance = statistics.covariance if request.param == "vq-rotated" else None
        fold_normalisation(autoencoder, statistics.mean, statistics.std, covariance)
    return autoencoder, moments, pictures, indices, request.param != "vq"


def test_folding_leaves_reconstructions_and_indices(folded, images):
    autoencoder, moments, pictures, indices, _ = folded
    with torch.no_grad():
        after = encode(autoencoder, images)
        torch.testing.assert_close(decode(autoencoder, after.mean), pictures, atol=1e-5, rtol=0)
        if indices is not None:
            assert torch.equal(quantise(autoencoder, after.mean).indices, indices)
            assert indices.unique().numel() > 5
    assert not torch.allclose(after.mean, moments.mean, atol=0.1)


def test_folding_gives_unit_latents(folded, images):
    autoencoder, _, _, _, every_channel = folded
    with torch.no_grad():
        moments = encode(autoencoder, images)
    noise = torch.randn(moments.mean.shape, generator=torch.Generator().manual_seed(2))
    samples = to_unet(autoencoder, moments.sample(noise))  # what the U-Net sees
    assert samples.mean(dim=(0, 2, 3)).abs().max() < 0.05
    std = samples.std(dim=(0, 2, 3))
    if every_channel:
        assert (std - 1).abs().max() < 0.05
    else:
        assert std.square().mean().sqrt().item() == pytest.approx(1.0, abs=0.05)
        assert (std - 1).abs().max() > 0.2  # without the covariance VQ channels keep their ratio
    assert autoencoder.config.scaling_factor == 1.0


def test_folding_keeps_the_posterior_noise(make, images):
    """Samples, not only means, decode to the same images from the same noise."""
    autoencoder = make("kl", initial_logvar=-1.0).eval()
    noise = torch.randn(16, 4, 16, 16, generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        before = decode(autoencoder, encode(autoencoder, images).sample(noise))
        fold_normalisation(autoencoder, torch.tensor([1.0, 2.0, -3.0, 0.0]), torch.tensor([0.5, 2.0, 1.0, 3.0]))
        after = decode(autoencoder, encode(autoencoder, images).sample(noise))
    torch.testing.assert_close(after, before, atol=1e-5, rtol=0)


def test_folding_replaces_an_older_scale(make, images):
    autoencoder = make("kl")
    autoencoder.register_to_config(scaling_factor=0.18215, shift_factor=0.1)
    fold_normalisation(autoencoder, torch.zeros(4), torch.ones(4))
    latents = encode(autoencoder, images[:1]).mean
    assert torch.equal(to_unet(autoencoder, latents), latents)


def test_plain_diffusers_opens_the_folded_autoencoder(folded, images, tmp_path):
    autoencoder, _, pictures, _, _ = folded
    autoencoder.save_pretrained(tmp_path)
    plain = (AutoencoderKL if isinstance(autoencoder, AutoencoderKL) else VQModel).from_pretrained(tmp_path)
    with torch.no_grad():
        theirs = plain(images).sample
        ours = decode(autoencoder, encode(autoencoder, images).mean)
    assert torch.equal(theirs, ours)
    torch.testing.assert_close(theirs, pictures, atol=1e-5, rtol=0)
    assert plain.config.scaling_factor == 1.0


def test_folding_refuses_what_it_cannot_do_exactly(make):
    one = torch.ones(4)
    bare = AutoencoderKL(block_out_channels=(8,), norm_num_groups=4, use_quant_conv=False)
    with pytest.raises(ValueError, match="quant_conv: found none"):
        fold_normalisation(bare, one, one)
    bare = AutoencoderKL(block_out_channels=(8,), norm_num_groups=4, use_post_quant_conv=False)
    with pytest.raises(ValueError, match="post_quant_conv: found none"):
        fold_normalisation(bare, one, one)
    with pytest.raises(ValueError, match="a channel that never varies"):
        fold_normalisation(make("kl"), one, torch.tensor([1.0, 0.0, 1.0, 1.0]))
    with pytest.raises(ValueError, match="std: found"):
        fold_normalisation(make("kl"), torch.full((4,), torch.nan), one)
    with pytest.raises(ValueError, match=r"mean: found shape \(3,\); allowed is \(4,\)"):
        fold_normalisation(make("kl"), torch.zeros(3), one)
    spatial = VQModel(block_out_channels=(32,), latent_channels=4, norm_type="spatial")
    with pytest.raises(ValueError, match="norm_type: found spatial"):
        fold_normalisation(spatial, one, one)


def test_refused_folding_changes_nothing(make):
    autoencoder = make("kl")
    before = {name: value.clone() for name, value in autoencoder.state_dict().items()}
    with pytest.raises(ValueError):
        fold_normalisation(autoencoder, torch.zeros(4), torch.zeros(4))
    assert all(torch.equal(value, before[name]) for name, value in autoencoder.state_dict().items())


@given(channels=st.integers(1, 9), rank=st.integers(1, 9), seed=st.integers(0, 10_000))
@settings(deadline=None, max_examples=60)
def test_rotation_is_orthogonal_and_evens_the_variances(channels, rank, seed):
    factor = torch.randn(channels, rank, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
    factor *= torch.logspace(0, 2, channels, dtype=torch.float64)[:, None]
    covariance = factor @ factor.T
    rotation = equal_variance_rotation(covariance, covariance.diagonal().sqrt())
    torch.testing.assert_close(rotation @ rotation.T, torch.eye(channels, dtype=torch.float64), atol=1e-10, rtol=0)
    variances = (rotation @ covariance @ rotation.T).diagonal()
    torch.testing.assert_close(variances, covariance.diagonal().mean().expand(channels), rtol=1e-8, atol=0)
    assert torch.linalg.det(rotation).item() == pytest.approx(1.0)


# Scale equivariance


@pytest.mark.parametrize(("factor", "side"), [(1.0, 8), (0.5, 4), (0.3, 2), (0.01, 1)])
def test_scale_equivariance_shapes_match(factor, side):
    latents, images = random_moments(2, 4, 8, 8).mean, torch.randn(2, 3, 64, 64)
    small = scale_equivariance(latents, images, factor)
    assert small.latents.shape == (2, 4, side, side)
    assert small.images.shape == (2, 3, 8 * side, 8 * side)


def test_scale_equivariance_is_linear_and_keeps_smooth_content():
    ramp = torch.linspace(-1, 1, 64).view(1, 1, 1, 64).expand(1, 3, 64, 64)
    latents = torch.linspace(-1, 1, 8).view(1, 1, 1, 8).expand(1, 4, 8, 8).clone().requires_grad_()
    small = scale_equivariance(latents, ramp, 0.5)
    torch.testing.assert_close(small.images[0, 0, 0, 2:-2], ramp[0, 0, 0].view(32, 2).mean(1)[2:-2], atol=1e-3, rtol=0)
    (gradient,) = torch.autograd.grad(small.latents.sum(), latents)
    torch.testing.assert_close(gradient.sum(), torch.tensor(4.0 * 16))  # weights of each output sum to one


@pytest.mark.parametrize("factor", [0.0, -1.0, 1.5])
def test_scale_equivariance_refuses(factor):
    with pytest.raises(ValueError, match=f"factor: found {factor}"):
        scale_equivariance(torch.zeros(1, 4, 8, 8), torch.zeros(1, 3, 64, 64), factor)
