"""Values of the loss terms, and to what each gives a gradient and to what it gives none."""

from __future__ import annotations

import math
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor

from autoencoder import (
    AutoencoderLossConfig,
    DiscriminatorConfig,
    Moments,
    PatchDiscriminator,
    ReconstructionLoss,
    build_lpips,
    decode,
    decoder_parameters,
    discriminator_loss,
    encode,
    encoder_parameters,
    frozen,
    generator_loss,
    kl_loss,
    lpips_distance,
    quantise,
)


def reached(parameters) -> bool:
    """Whether every one of the parameters has a gradient, or none has; a mixture is an error of the test."""
    states = {parameter.grad is not None and bool(parameter.grad.abs().sum() > 0) for parameter in parameters}
    assert len(states) == 1
    return states.pop()


def clear(*modules: torch.nn.Module) -> None:
    for module in modules:
        module.zero_grad(set_to_none=True)


@pytest.fixture
def discriminator() -> PatchDiscriminator:
    torch.manual_seed(0)
    return PatchDiscriminator(DiscriminatorConfig(layers=2, channels=4))


def noisy_round_trip(autoencoder, images: Tensor) -> tuple[Moments, Tensor]:
    moments = encode(autoencoder, images)
    noise = torch.randn(moments.mean.shape, generator=torch.Generator().manual_seed(0))
    return moments, decode(autoencoder, moments.sample(noise))


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"reconstruction": "l3"}, "reconstruction: found 'l3'; allowed is l1, l2"),
        ({"perceptual": "vgg"}, "perceptual: found 'vgg'; allowed is none, lpips, features"),
        ({"kl_weight": -1.0}, "kl_weight: found -1.0; allowed is 0 or more"),
        ({"gradient_weight": math.inf}, "gradient_weight: found inf"),
        ({"equivariance": 1.5}, "equivariance: found 1.5; allowed is 0 to 1"),
        ({"equivariance_minimum": 0.0}, "equivariance_minimum: found 0.0"),
        ({"reconstruction_weight": 0.0}, "reconstruction_weight: found 0 with l2_weight 0"),
        ({"perceptual": "lpips"}, "lpips_weights: found none; allowed is a local file of torchvision's vgg16 weights"),
        ({"lpips_network": "squeeze"}, "lpips_network: found 'squeeze'; allowed is vgg, alex"),
    ],
)
def test_config_refuses(fields, message):
    with pytest.raises(ValueError) as raised:
        AutoencoderLossConfig(**fields)
    assert str(raised.value).startswith(message)
    assert "\n" not in str(raised.value)


# Values


def test_terms_and_their_weighted_sum():
    images = torch.zeros(2, 3, 4, 4)
    reconstructions = images.clone()
    reconstructions[..., ::2] = 0.5  # stripes: neighbours in a row differ by 0.5, in a column by 0
    config = AutoencoderLossConfig(reconstruction_weight=2.0, l2_weight=3.0, gradient_weight=5.0)
    terms = ReconstructionLoss(config)(images, reconstructions)
    assert terms.reconstruction.item() == pytest.approx(0.25)
    assert terms.l2.item() == pytest.approx(0.125)
    assert terms.gradient.item() == pytest.approx(0.25)
    assert terms.perceptual.item() == 0.0
    assert terms.total.item() == pytest.approx(2 * 0.25 + 3 * 0.125 + 5 * 0.25)
    squared = ReconstructionLoss(AutoencoderLossConfig(reconstruction="l2"))(images, reconstructions)
    assert squared.reconstruction.item() == squared.total.item() == pytest.approx(0.125)


def test_a_constant_offset_has_no_image_gradient():
    images = torch.randn(1, 3, 8, 8, generator=torch.Generator().manual_seed(0))
    terms = ReconstructionLoss(AutoencoderLossConfig(gradient_weight=1.0))(images, images + 0.3)
    assert terms.gradient.item() == pytest.approx(0.0, abs=1e-6)
    assert terms.reconstruction.item() == pytest.approx(0.3, rel=1e-5)


def test_terms_do_not_depend_on_the_resolution():
    loss = ReconstructionLoss(AutoencoderLossConfig(l2_weight=1.0))
    images = torch.randn(2, 3, 8, 8, generator=torch.Generator().manual_seed(0))
    large = images.repeat(1, 1, 4, 4)
    torch.testing.assert_close(loss(large, large * 0.5).total, loss(images, images * 0.5).total)
    moments = Moments(images, images - 1)
    tiled = Moments(large, large - 1)
    torch.testing.assert_close(kl_loss(tiled), kl_loss(moments))


def test_kl_loss_is_the_mean_per_latent_element():
    generator = torch.Generator().manual_seed(0)
    moments = Moments(torch.randn(3, 4, 5, 6, generator=generator), torch.randn(3, 4, 5, 6, generator=generator))
    torch.testing.assert_close(kl_loss(moments), moments.kl().sum() / (3 * 4 * 5 * 6))


# Learned log-scale


@pytest.mark.parametrize("kind", ["l1", "l2"])
def test_learned_logvar_converges_to_the_log_error(kind):
    loss = ReconstructionLoss(AutoencoderLossConfig(reconstruction=kind, learned_logvar=True))
    images = torch.zeros(4, 3, 16, 16)
    errors = 0.2 * torch.randn(images.shape, generator=torch.Generator().manual_seed(0))
    optimiser = torch.optim.Adam(loss.parameters(), lr=0.05)
    for _ in range(400):
        optimiser.zero_grad()
        loss(images, errors).total.backward()
        optimiser.step()
    expected = (errors.abs() if kind == "l1" else errors.square()).mean().log()
    torch.testing.assert_close(loss.logvar.detach(), expected, atol=1e-3, rtol=0)


def test_logvar_gradient_equals_its_closed_form():
    loss = ReconstructionLoss(AutoencoderLossConfig(learned_logvar=True))
    images = torch.full((1, 3, 4, 4), 0.25)
    with torch.no_grad():
        loss.logvar.fill_(-0.7)
    terms = loss(images, torch.zeros_like(images))
    terms.total.backward()
    assert terms.total.item() == pytest.approx(0.25 * math.exp(0.7) - 0.7)
    assert loss.logvar.grad.item() == pytest.approx(1 - 0.25 * math.exp(0.7))


def test_without_learned_logvar_there_is_nothing_to_train():
    assert list(ReconstructionLoss(AutoencoderLossConfig()).parameters()) == []
    names = [name for name, _ in ReconstructionLoss(AutoencoderLossConfig(learned_logvar=True)).named_parameters()]
    assert names == ["logvar"]


# Where gradients go


def test_reconstruction_and_logvar(make, images):
    autoencoder = make("kl")
    loss = ReconstructionLoss(AutoencoderLossConfig(l2_weight=1.0, gradient_weight=1.0, learned_logvar=True))
    for weights in ("reconstruction", "l2", "gradient"):
        clear(autoencoder, loss)
        terms = loss(images, noisy_round_trip(autoencoder, images)[1])
        getattr(terms, weights).backward()
        assert reached(encoder_parameters(autoencoder))
        assert reached(decoder_parameters(autoencoder))
        assert not reached(loss.parameters())  # the unweighted term; the total follows
    clear(autoencoder, loss)
    loss(images, noisy_round_trip(autoencoder, images)[1]).total.backward()
    assert reached(loss.parameters())
    assert reached(autoencoder.parameters())


def test_kl_reaches_the_encoder_alone(make, images):
    autoencoder = make("kl")
    moments, _ = noisy_round_trip(autoencoder, images)
    kl_loss(moments).backward()
    assert reached(encoder_parameters(autoencoder))
    assert not reached(decoder_parameters(autoencoder))


def test_kl_reaches_mean_and_log_variance(make, images):
    autoencoder = make("kl")
    kl_loss(encode(autoencoder, images)).backward()
    assert (autoencoder.quant_conv.weight.grad.abs().sum(dim=(1, 2, 3)) > 0).all()


def test_codebook_loss_reaches_codes_and_encoder_not_the_decoder(make, images):
    autoencoder = make("vq")
    quantised = quantise(autoencoder, encode(autoencoder, images).mean * 1.1)
    quantised.codebook_loss.backward()
    assert reached(autoencoder.quantize.parameters())
    assert reached(autoencoder.encoder.parameters())
    assert not reached(decoder_parameters(autoencoder))


def test_vq_reconstruction_reaches_encoder_and_decoder_not_the_codes(make, images):
    autoencoder = make("vq")
    codes = quantise(autoencoder, encode(autoencoder, images).mean).latents
    loss = ReconstructionLoss(AutoencoderLossConfig())
    loss(images, decode(autoencoder, codes, quantised=True)).total.backward()
    assert reached(autoencoder.encoder.parameters())
    assert reached(decoder_parameters(autoencoder))
    assert not reached(autoencoder.quantize.parameters())


@pytest.mark.parametrize("kind", ["hinge", "vanilla"])
def test_adversarial_losses_train_their_own_side_only(make, images, discriminator, kind):
    autoencoder = make("kl")
    _, reconstructions = noisy_round_trip(autoencoder, images)
    discriminator_loss(kind, discriminator(images), discriminator(reconstructions.detach())).backward()
    assert reached(p for name, p in discriminator.named_parameters() if name != "head.bias")
    assert not reached(autoencoder.parameters())

    clear(autoencoder, discriminator)
    with frozen(discriminator):
        generator_loss(kind, discriminator(reconstructions)).backward()
    assert reached(encoder_parameters(autoencoder))
    assert reached(decoder_parameters(autoencoder))
    assert not reached(discriminator.parameters())


def test_feature_matching_reaches_the_autoencoder_alone(make, images, discriminator):
    autoencoder = make("kl")
    loss = ReconstructionLoss(AutoencoderLossConfig(perceptual="features"))
    _, reconstructions = noisy_round_trip(autoencoder, images)
    with frozen(discriminator):
        features = (discriminator.features(images), discriminator.features(reconstructions))
        terms = loss(images, reconstructions, features)
    terms.perceptual.backward()
    assert terms.perceptual.item() > 0
    assert reached(autoencoder.parameters())
    assert not reached(discriminator.parameters())
    before_the_adversary = loss(images, reconstructions)
    assert before_the_adversary.perceptual.item() == 0.0
    assert torch.equal(before_the_adversary.total, before_the_adversary.reconstruction)


# LPIPS


@pytest.fixture(scope="module")
def lpips_config(vgg_weights: Path) -> AutoencoderLossConfig:
    return AutoencoderLossConfig(perceptual="lpips", lpips_weights=str(vgg_weights.parent))  # found in its folder


@pytest.fixture(scope="module")
def lpips_loss(lpips_config) -> ReconstructionLoss:
    return ReconstructionLoss(lpips_config)


def network(loss: ReconstructionLoss) -> torch.nn.Module:
    return loss._unregistered[0]


def test_lpips_reaches_the_images_and_not_the_trunk(lpips_loss, make, images):
    autoencoder = make("kl")
    _, reconstructions = noisy_round_trip(autoencoder, images[:2])
    terms = lpips_loss(images[:2], reconstructions)
    terms.perceptual.backward()
    assert terms.perceptual.item() > 0
    assert reached(encoder_parameters(autoencoder))
    assert reached(decoder_parameters(autoencoder))
    assert not any(parameter.requires_grad for parameter in network(lpips_loss).parameters())
    assert not reached(network(lpips_loss).parameters())


def test_lpips_uses_the_given_weights(lpips_loss, vgg_weights):
    weights = load_file(vgg_weights)
    trunk = network(lpips_loss).net.state_dict()
    assert len(trunk) == len(weights) == 26
    for name, tensor in trunk.items():
        assert torch.equal(tensor, weights[f"features.{name.split('.', 1)[1]}"])


def test_lpips_is_zero_for_equal_images_and_grows_with_the_error(lpips_loss, images):
    noise = torch.randn(2, 3, 32, 32, generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        distances = [lpips_distance(network(lpips_loss), images[:2], images[:2] + s * noise) for s in (0.0, 0.1, 0.5)]
    assert distances[0].shape == (2,)
    assert (distances[0] == 0).all()
    assert (distances[1] > 0).all()
    assert (distances[2] > distances[1]).all()


def test_lpips_is_neither_trained_nor_saved_but_moves_along(lpips_loss):
    assert list(lpips_loss.parameters()) == []
    assert lpips_loss.state_dict() == {}
    lpips_loss.double()
    assert {p.dtype for p in network(lpips_loss).parameters()} == {torch.float64}
    lpips_loss.float()
    assert {p.dtype for p in network(lpips_loss).parameters()} == {torch.float32}
    lpips_loss.train()
    assert not any(module.training for module in network(lpips_loss).modules())


def test_lpips_pickle_opens_only_when_allowed(tmp_path):
    shapes = {0: (64, 3, 11), 3: (192, 64, 5), 6: (384, 192, 3), 8: (256, 384, 3), 10: (256, 256, 3)}  # AlexNet
    weights = {f"features.{i}.weight": torch.full((out, of, k, k), 0.1) for i, (out, of, k) in shapes.items()}
    weights |= {f"features.{i}.bias": torch.full((out,), float(i)) for i, (out, _, _) in shapes.items()}
    path = tmp_path / "alexnet-owt-7be5be79.pth"
    torch.save(weights, path)
    fields = {"perceptual": "lpips", "lpips_network": "alex"}
    with pytest.raises(ValueError, match=r"a pickle; allowed is \.safetensors; .* set lpips_allow_pickle: true"):
        build_lpips(AutoencoderLossConfig(**fields, lpips_weights=str(path)))
    with pytest.raises(FileNotFoundError, match=r"found no alexnet\*\.safetensors in"):
        build_lpips(AutoencoderLossConfig(**fields, lpips_weights=str(tmp_path)))
    network = build_lpips(AutoencoderLossConfig(**fields, lpips_weights=str(path), lpips_allow_pickle=True))
    assert torch.equal(network.net.state_dict()["slice5.10.bias"], weights["features.10.bias"])


def test_lpips_weights_that_do_not_fit_are_one_line(vgg_weights, tmp_path):
    config = AutoencoderLossConfig(perceptual="lpips", lpips_network="alex", lpips_weights=str(vgg_weights))
    (tmp_path / "vgg16.safetensors").write_bytes(b"not safetensors")
    broken = AutoencoderLossConfig(perceptual="lpips", lpips_weights=str(tmp_path))
    missing = AutoencoderLossConfig(perceptual="lpips", lpips_weights=str(tmp_path / "nothing"))
    for case, error, part in (
        (config, ValueError, "for features.0.weight in"),
        (broken, ValueError, "vgg16.safetensors, "),
        (missing, FileNotFoundError, "found no file or folder"),
    ):
        with pytest.raises(error) as raised:
            build_lpips(case)
        assert part in str(raised.value)
        assert "\n" not in str(raised.value)
        assert str(raised.value).startswith("lpips_weights: ")


def test_lpips_without_weights_or_permission_is_refused():
    with pytest.raises(ValueError, match="set lpips_download: true"):
        build_lpips(AutoencoderLossConfig())


def test_lpips_downloads_only_when_asked(monkeypatch):
    """The permission hands the download to torchvision; the network itself is kept out of the test."""
    calls = []

    def refuse(url: str, *args: object, **kwargs: object) -> None:
        calls.append(url)
        raise OSError("no network in tests")

    monkeypatch.setattr("torchvision.models._api.load_state_dict_from_url", refuse)
    with pytest.raises(OSError, match="no network in tests"):
        build_lpips(AutoencoderLossConfig(perceptual="lpips", lpips_network="alex", lpips_download=True))
    assert len(calls) == 1
    assert "alexnet" in calls[0]
