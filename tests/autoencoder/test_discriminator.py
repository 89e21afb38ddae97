from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from autoencoder import (
    DiscriminatorConfig,
    PatchDiscriminator,
    adaptive_weight,
    discriminator_loss,
    feature_matching,
    frozen,
    generator_loss,
)


def make_discriminator(**fields: object) -> PatchDiscriminator:
    torch.manual_seed(0)
    return PatchDiscriminator(DiscriminatorConfig(**{"channels": 4, "norm": "none", **fields}))


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"layers": 0}, "layers: found 0"),
        ({"channels": 0}, "channels: found 0"),
        ({"norm": "batch"}, "norm: found 'batch'; allowed is group or none"),
        ({"loss": "wgan"}, "loss: found 'wgan'; allowed is hinge or vanilla"),
        ({"weight": -0.1}, "weight: found -0.1"),
        ({"weight": math.nan}, "weight: found nan"),
        ({"start_step": -1}, "start_step: found -1"),
    ],
)
def test_config_refuses(fields, message):
    with pytest.raises(ValueError) as raised:
        DiscriminatorConfig(**fields)
    assert str(raised.value).startswith(message)
    assert "\n" not in str(raised.value)


def test_active_from_the_start_step_on():
    config = DiscriminatorConfig(start_step=3)
    assert [config.active(step) for step in range(5)] == [False, False, False, True, True]
    assert not DiscriminatorConfig(weight=0.0, start_step=0).active(10)


@pytest.mark.parametrize(("layers", "field", "size"), [(1, 16, 48), (2, 34, 96), (3, 70, 192)])
def test_receptive_field_measured_by_gradient(layers, field, size):
    """The pixels that move one middle logit are a square of exactly this side: 70 px at 3 layers."""
    discriminator = make_discriminator(layers=layers)
    image = torch.randn(1, 3, size, size, generator=torch.Generator().manual_seed(0), requires_grad=True)
    logits = discriminator(image)
    middle = logits.shape[-1] // 2
    logits[0, 0, middle, middle].backward()
    touched = image.grad.abs().sum(dim=(0, 1)) > 0
    rows, columns = touched.any(1).nonzero().flatten(), touched.any(0).nonzero().flatten()
    assert rows[0] > 0 and rows[-1] < size - 1  # not cut off by the border
    assert rows[-1] - rows[0] + 1 == columns[-1] - columns[0] + 1 == field
    assert discriminator.receptive_field == field


@pytest.mark.parametrize("layers", [1, 2, 3, 4])
@pytest.mark.parametrize("norm", ["group", "none"])
def test_minimum_size_is_exact(layers, norm):
    discriminator = make_discriminator(layers=layers, norm=norm)
    size = discriminator.minimum_size
    assert discriminator(torch.zeros(1, 3, size, size)).shape == (1, 1, 1, 1)
    with pytest.raises(ValueError, match=rf"found an image of {size} x {size - 1} px; allowed is {size} px or more"):
        discriminator(torch.zeros(1, 3, size - 1, size))


def test_standard_size_is_pix2pix():
    """The 70 x 70 PatchGAN of pix2pix and latent-diffusion: 2.77 M parameters, 30 x 30 logits at 256 px."""
    discriminator = make_discriminator(channels=64, norm="group")
    convolutions = [m for m in discriminator.modules() if isinstance(m, torch.nn.Conv2d)]
    assert [(m.in_channels, m.out_channels, m.stride[0]) for m in convolutions] == [
        (3, 64, 2), (64, 128, 2), (128, 256, 2), (256, 512, 1), (512, 1, 1)
    ]  # fmt: skip
    assert sum(p.numel() for p in discriminator.parameters()) == 2_765_633
    assert make_discriminator()(torch.zeros(1, 3, 256, 256)).shape == (1, 1, 30, 30)


@pytest.mark.parametrize("norm", ["group", "none"])
def test_a_judgement_depends_on_its_own_image_only(norm):
    discriminator = make_discriminator(norm=norm)
    images = torch.randn(4, 3, 32, 32, generator=torch.Generator().manual_seed(0))
    together = discriminator(images)
    torch.testing.assert_close(discriminator(images[2:3]), together[2:3])


def test_judge_gives_logits_and_features_of_one_pass():
    discriminator = make_discriminator()
    images = torch.randn(2, 3, 32, 32, generator=torch.Generator().manual_seed(0))
    judgement = discriminator.judge(images)
    assert torch.equal(judgement.logits, discriminator(images))
    assert all(torch.equal(a, b) for a, b in zip(judgement.features, discriminator.features(images), strict=True))
    assert [tuple(f.shape[1:]) for f in judgement.features] == [(4, 16, 16), (8, 8, 8), (16, 4, 4), (32, 3, 3)]
    assert torch.equal(discriminator.head(judgement.features[-1]), judgement.logits)


def test_hinge_values():
    real, fake = torch.tensor([2.0, 0.5]), torch.tensor([-2.0, 0.5])
    assert discriminator_loss("hinge", real, fake).item() == pytest.approx(0.5 * (0.25 + 0.75))
    assert generator_loss("hinge", fake).item() == pytest.approx(0.75)


def test_vanilla_values_are_binary_cross_entropy():
    real, fake = torch.tensor([2.0, 0.5, -1.0]), torch.tensor([-2.0, 0.5, 3.0])
    bce = torch.nn.functional.binary_cross_entropy_with_logits
    expected = 0.5 * (bce(real, torch.ones(3)) + bce(fake, torch.zeros(3)))
    torch.testing.assert_close(discriminator_loss("vanilla", real, fake), expected)
    torch.testing.assert_close(generator_loss("vanilla", fake), bce(fake, torch.ones(3)))


@pytest.mark.parametrize("kind", ["hinge", "vanilla"])
def test_losses_pull_in_opposite_directions(kind):
    logits = torch.zeros(3, requires_grad=True)
    (for_discriminator,) = torch.autograd.grad(discriminator_loss(kind, torch.ones(3), logits), logits)
    (for_generator,) = torch.autograd.grad(generator_loss(kind, logits), logits)
    assert (for_discriminator > 0).all()
    assert (for_generator < 0).all()


@pytest.mark.parametrize("kind", ["hinge", "vanilla"])
def test_discriminator_learns_to_tell_flat_from_noisy(kind):
    discriminator = make_discriminator(loss=kind, norm="group", layers=2)
    optimiser = torch.optim.Adam(discriminator.parameters(), lr=3e-3)
    generator = torch.Generator().manual_seed(0)
    for _ in range(20):
        real = torch.randn(8, 3, 16, 16, generator=generator)
        fake = torch.randn(8, 3, 1, 1, generator=generator).expand(8, 3, 16, 16)
        loss = discriminator_loss(kind, discriminator(real), discriminator(fake))
        optimiser.zero_grad()
        loss.backward()
        optimiser.step()
    assert discriminator(real).mean() > discriminator(fake).mean() + 1.0


NORMS = st.just(0.0) | st.floats(1e-6, 1e3)  # squares that float32 holds


@given(rec=NORMS, adv=NORMS, size=st.integers(1, 20))
@settings(deadline=None)
def test_adaptive_weight_equals_its_formula(rec, adv, size):
    reconstruction, adversarial = torch.full((size, 2), rec), torch.full((2, size), -adv)
    root = math.sqrt(2 * size)
    expected = min(rec * root / (adv * root + 1e-4), 1e4)
    assert adaptive_weight(reconstruction, adversarial).item() == pytest.approx(expected, rel=1e-4, abs=1e-30)


def test_adaptive_weight_is_clamped_and_detached():
    gradient = torch.ones(3, requires_grad=True)
    assert adaptive_weight(gradient, torch.zeros(3)).item() == 1e4
    assert not adaptive_weight(gradient, gradient * 2).requires_grad


def test_adaptive_weight_makes_the_gradients_equal_at_the_last_layer():
    last = torch.randn(4, 4, generator=torch.Generator().manual_seed(0)).requires_grad_()
    hidden = torch.randn(8, 4, generator=torch.Generator().manual_seed(1))
    reconstruction, adversarial = (hidden @ last).square().mean(), 300.0 * (hidden @ last).sin().mean()
    (rec,) = torch.autograd.grad(reconstruction, last, retain_graph=True)
    (adv,) = torch.autograd.grad(adversarial, last, retain_graph=True)
    (scaled,) = torch.autograd.grad(adaptive_weight(rec, adv) * adversarial, last)
    torch.testing.assert_close(scaled.norm(), rec.norm(), rtol=1e-4, atol=0)


def test_feature_matching_value_and_gradient():
    real = [torch.zeros(2, 3, requires_grad=True), torch.zeros(4, requires_grad=True)]
    fake = [torch.full((2, 3), 2.0, requires_grad=True), torch.full((4,), -1.0, requires_grad=True)]
    loss = feature_matching(real, fake)
    loss.backward()
    assert loss.item() == pytest.approx(1.5)
    assert all(tensor.grad is None for tensor in real)
    torch.testing.assert_close(fake[0].grad, torch.full((2, 3), 0.5 / 6))
    torch.testing.assert_close(fake[1].grad, torch.full((4,), -0.5 / 4))


def test_frozen_passes_gradients_through_and_restores():
    discriminator = make_discriminator()
    discriminator.head.bias.requires_grad_(False)
    image = torch.randn(1, 3, 32, 32, generator=torch.Generator().manual_seed(0), requires_grad=True)
    with frozen(discriminator):
        generator_loss("hinge", discriminator(image)).backward()
    assert image.grad.abs().sum() > 0
    assert all(parameter.grad is None for parameter in discriminator.parameters())
    flags = {name: parameter.requires_grad for name, parameter in discriminator.named_parameters()}
    assert not flags.pop("head.bias")
    assert all(flags.values())
    with pytest.raises(RuntimeError, match="boom"), frozen(discriminator):
        raise RuntimeError("boom")
    assert discriminator.head.weight.requires_grad
