"""Growing: what it draws stays, what is new can be learned, plain diffusers opens it, nothing is taken away."""

from __future__ import annotations

from itertools import product
from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers import UNet2DConditionModel
from diffusers.models.attention_processor import AttnProcessor
from torch import Tensor

from conditioning.conditions import Conditions
from ldm.attention import set_attention
from ldm.errors import UserError
from ldm.growing import SpatialLayout, grow
from ldm.unet import UNetConfig, build_unet, class_embedding_width_of, denoise, spatial_channels_of

PLAIN = SpatialLayout(inpainting=False, semantic_channels=0)
INPAINTING = SpatialLayout(inpainting=True, semantic_channels=0)
SEMANTIC = SpatialLayout(inpainting=False, semantic_channels=3)
BOTH = SpatialLayout(inpainting=True, semantic_channels=3)
OURS = {"channels": (16, 32), "layers_per_block": 1, "attention": (False, True), "heads": 4, "norm_groups": 8}
STABLE_DIFFUSION: dict[str, Any] = {  # the config.json of 1.5 with narrower levels, one block each
    "sample_size": 8,
    "in_channels": 4,
    "out_channels": 4,
    "down_block_types": ("CrossAttnDownBlock2D", "CrossAttnDownBlock2D", "CrossAttnDownBlock2D", "DownBlock2D"),
    "up_block_types": ("UpBlock2D", "CrossAttnUpBlock2D", "CrossAttnUpBlock2D", "CrossAttnUpBlock2D"),
    "block_out_channels": (8, 16, 32, 32),
    "layers_per_block": 1,
    "norm_num_groups": 4,
    "cross_attention_dim": 12,
    "attention_head_dim": 4,
    "mid_block_scale_factor": 1,
    "downsample_padding": 1,
    "flip_sin_to_cos": True,
    "freq_shift": 0,
    "act_fn": "silu",
    "norm_eps": 1e-5,
}
VERSION_2 = {"attention_head_dim": (1, 2, 4, 4), "use_linear_projection": True, "upcast_attention": True}


def network(kind: str = "ours") -> UNet2DConditionModel:
    """A tiny random network of each kind, its predictions of about standard deviation 1."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        if kind in ("ours", "text-free"):
            unet = build_unet(
                UNetConfig(**OURS), latent_channels=4, context_width=12 if kind == "ours" else None, sample_size=8
            )
        else:
            changes = {"sd1": {}, "sd2": VERSION_2, "sd-inpainting": {"in_channels": 9}}[kind]
            unet = UNet2DConditionModel(**STABLE_DIFFUSION | changes)
    with torch.no_grad():
        unet.conv_out.weight *= 3
    return unet.eval()


KINDS = {"ours": PLAIN, "text-free": PLAIN, "sd1": PLAIN, "sd2": PLAIN, "sd-inpainting": INPAINTING}
GROWTHS = [
    (kind, new, width)
    for (kind, old), (new, width) in product(
        KINDS.items(), [(INPAINTING, None), (SEMANTIC, None), (INPAINTING, 6), (PLAIN, 6), (BOTH, None), (BOTH, 6)]
    )
    if not (old.inpainting and not new.inpainting) and (new != old or width)
]


def named(value: Any) -> str | None:
    if isinstance(value, SpatialLayout):
        return {PLAIN: "plain", INPAINTING: "inpainting", SEMANTIC: "semantic", BOTH: "both"}[value]
    return None


def random(*shape: int, seed: int) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def conditions_for(unet: UNet2DConditionModel, context: bool = True) -> Conditions:
    """Random conditions of a batch of 2, far larger than real ones; the same for the same part of the input."""
    spatial = spatial_channels_of(unet)
    width = class_embedding_width_of(unet)
    return Conditions(
        context=random(2, 5, 12, seed=1) if context else None,
        spatial=10 * random(2, 16, 8, 8, seed=2)[:, :spatial] if spatial else None,
        class_embedding=10 * random(2, width, seed=3) if width else None,
    )


def run(unet: UNet2DConditionModel, conditions: Conditions) -> Tensor:
    return denoise(unet, random(2, 4, 8, 8, seed=4), torch.tensor([20, 700]), conditions)


@pytest.mark.parametrize(("kind", "new", "width"), GROWTHS, ids=named)
def test_a_grown_network_draws_what_it_drew_before(kind: str, new: SpatialLayout, width: int | None) -> None:
    unet, text = network(kind), kind != "text-free"
    grown = grow(unet, old=KINDS[kind], new=new, class_embedding_width=width)
    before, after = conditions_for(unet, text), conditions_for(grown, text)
    with torch.no_grad():
        expected, found = run(unet, before), run(grown, after)
    assert 0.3 < expected.std() < 3
    torch.testing.assert_close(found, expected, rtol=0, atol=1e-6)
    assert (grown.config.in_channels, grown.config.out_channels) == (4 + new.channels(4), 4)
    old_weights, new_weights = unet.state_dict(), grown.state_dict()
    untouched = old_weights.keys() - {"conv_in.weight"}
    assert all(torch.equal(old_weights[name], new_weights[name]) for name in untouched)


@pytest.mark.parametrize("kind", ["text-free", "sd2"])
def test_gradients_reach_every_new_weight_and_after_a_step_every_condition_counts(kind: str) -> None:
    unet = network(kind)
    grown = grow(unet, old=PLAIN, new=BOTH, class_embedding_width=6)
    conditions = conditions_for(grown, kind != "text-free")
    run(grown, conditions).square().mean().backward()
    new = (grown.conv_in.weight.grad[:, 4:], grown.class_embedding.weight.grad, grown.class_embedding.bias.grad)
    for gradient in new:
        assert gradient.abs().amax(dim=tuple(range(2, gradient.ndim))).min() > 0
    torch.optim.SGD(grown.parameters(), 0.1).step()
    with torch.no_grad():
        output = run(grown, conditions)
        for channel in range(8):
            changed = conditions.spatial.clone()
            changed[:, channel] += 1
            other = Conditions(conditions.context, changed, conditions.class_embedding)
            assert not torch.allclose(run(grown, other), output, atol=1e-5), channel
        other = Conditions(conditions.context, conditions.spatial, -conditions.class_embedding)
        assert not torch.allclose(run(grown, other), output, atol=1e-5)


def test_inpainting_takes_its_place_before_an_old_semantic_embedding() -> None:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        unet = build_unet(UNetConfig(**OURS), latent_channels=4, spatial_channels=3, context_width=12, sample_size=8)
    grown = grow(unet, old=SEMANTIC, new=BOTH, class_embedding_width=None)
    old, new = unet.conv_in.weight, grown.conv_in.weight
    assert torch.equal(new[:, :4], old[:, :4]) and torch.equal(new[:, 9:], old[:, 4:])
    assert not new[:, 4:9].any()
    semantic, inpainting = random(2, 3, 8, 8, seed=5), random(2, 5, 8, 8, seed=6)
    context = random(2, 5, 12, seed=1)
    with torch.no_grad():
        expected = run(unet, Conditions(context, semantic))
        found = run(grown, Conditions(context, torch.cat([inpainting, semantic], dim=1)))
    torch.testing.assert_close(found, expected, rtol=0, atol=1e-6)


@pytest.mark.parametrize("first", [INPAINTING, SEMANTIC])
def test_two_steps_are_one(first: SpatialLayout) -> None:
    unet = network()
    once = grow(unet, old=PLAIN, new=BOTH, class_embedding_width=6)
    half = grow(unet, old=PLAIN, new=first, class_embedding_width=None)
    twice = grow(half, old=first, new=BOTH, class_embedding_width=6)
    assert dict(twice.config) == dict(once.config)
    assert twice.state_dict().keys() == once.state_dict().keys()
    assert all(torch.equal(tensor, once.state_dict()[name]) for name, tensor in twice.state_dict().items())


@pytest.mark.parametrize("kind", ["ours", "text-free", "sd2"])
def test_plain_diffusers_opens_it(kind: str, tmp_path: Path) -> None:
    grown = grow(network(kind), old=PLAIN, new=BOTH, class_embedding_width=6)
    grown.save_pretrained(tmp_path)
    loaded, report = UNet2DConditionModel.from_pretrained(tmp_path, output_loading_info=True)
    assert not any(report.values())
    found = (
        loaded.config.in_channels,
        loaded.config.class_embed_type,
        loaded.config.projection_class_embeddings_input_dim,
    )
    assert found == (12, "simple_projection", 6)
    conditions = conditions_for(grown, kind != "text-free")
    with torch.no_grad():
        torch.testing.assert_close(run(loaded, conditions), run(grown, conditions), rtol=0, atol=1e-6)
    assert all(torch.equal(tensor, grown.state_dict()[name]) for name, tensor in loaded.state_dict().items())


def test_the_old_network_is_not_touched() -> None:
    unet = network()
    weights, config = {name: tensor.clone() for name, tensor in unet.state_dict().items()}, dict(unet.config)
    grown = grow(unet, old=PLAIN, new=BOTH, class_embedding_width=6)
    with torch.no_grad():
        for parameter in grown.parameters():
            parameter += 1
    assert dict(unet.config) == config and unet.class_embedding is None and unet.conv_in.in_channels == 4
    assert all(torch.equal(tensor, weights[name]) for name, tensor in unet.state_dict().items())


def test_growing_draws_no_random_numbers() -> None:
    unet, state = network(), torch.get_rng_state()
    grow(unet, old=PLAIN, new=BOTH, class_embedding_width=6)
    assert torch.equal(torch.get_rng_state(), state)


def test_type_layout_kernels_and_modes_are_kept() -> None:
    unet = network().to(torch.float64).to(memory_format=torch.channels_last).train()
    unet.enable_gradient_checkpointing()
    set_attention(unet, "math")
    unet.requires_grad_(False)
    grown = grow(unet, old=PLAIN, new=BOTH, class_embedding_width=6)
    assert {parameter.dtype for parameter in grown.parameters()} == {torch.float64}
    assert grown.conv_in.weight.is_contiguous(memory_format=torch.channels_last)
    assert not grown.conv_in.weight.is_contiguous()
    assert grown.is_gradient_checkpointing and grown.training and grown.class_embedding.training
    assert all(type(processor) is AttnProcessor for processor in grown.attn_processors.values())
    assert not any(parameter.requires_grad for parameter in grown.parameters())


def test_checkpointed_growth_still_learns() -> None:
    unet = network().train()
    unet.enable_gradient_checkpointing()
    grown = grow(unet, old=PLAIN, new=BOTH, class_embedding_width=6)
    run(grown, conditions_for(grown)).square().mean().backward()
    assert grown.conv_in.weight.grad[:, 4:].any() and unet.conv_in.weight.grad is None


def test_a_network_grows_on_the_device_it_is_on() -> None:
    grown = grow(network().to("meta"), old=PLAIN, new=BOTH, class_embedding_width=6)
    assert {parameter.device.type for parameter in grown.parameters()} == {"meta"}


@pytest.mark.parametrize(
    ("old", "new", "before", "after", "message"),
    [
        (INPAINTING, PLAIN, None, None, "inpainting: found in the network .* keep inpainting"),
        (BOTH, INPAINTING, None, None, r"semantic\.channels: found 0 .* have 3; .* set it to 3"),
        (SEMANTIC, SpatialLayout(False, 8), None, None, r"semantic\.channels: found 8 .* set it to 3"),
        (PLAIN, PLAIN, 6, 7, r"label\.width: found 7 .* has width 6; .* keep the label condition, with width 6"),
        (PLAIN, INPAINTING, 6, None, r"label\.width: found no labels .* has width 6"),
        (PLAIN, PLAIN, None, 0, r"label\.width: found 0; allowed is 1 or more"),
    ],
)
def test_nothing_is_taken_away(
    old: SpatialLayout, new: SpatialLayout, before: int | None, after: int | None, message: str
) -> None:
    unet = grow(network(), old=PLAIN, new=old, class_embedding_width=before)
    with pytest.raises(UserError, match=message):
        grow(unet, old=old, new=new, class_embedding_width=after)


@pytest.mark.parametrize(
    ("kind", "old", "message"),
    [
        ("sd-inpainting", PLAIN, r"found 9 input channels; its conditions \(none spatial\) make 4 with 4 latent"),
        ("ours", BOTH, r"found 4 .* \(inpainting and semantic with 3 channels\) make 12 .*; name the conditions"),
    ],
)
def test_a_layout_that_is_not_the_networks_is_refused(kind: str, old: SpatialLayout, message: str) -> None:
    with pytest.raises(UserError, match=message):
        grow(network(kind), old=old, new=BOTH, class_embedding_width=None)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"num_class_embeds": 10}, "class embedding of type index; allowed is none or simple_projection"),
        ({"class_embed_type": "timestep"}, "class embedding of type timestep"),
        (
            {
                "addition_embed_type": "text_time",
                "addition_time_embed_dim": 4,
                "projection_class_embeddings_input_dim": 20,
            },
            "size and crop embeddings",
        ),
    ],
)
def test_foreign_class_embeddings_are_refused(changes: dict[str, Any], message: str) -> None:
    with pytest.raises(UserError, match=message):
        grow(UNet2DConditionModel(**STABLE_DIFFUSION | changes), old=PLAIN, new=INPAINTING, class_embedding_width=6)


def test_a_wrapped_first_layer_is_refused() -> None:
    unet = network()
    unet.conv_in = torch.nn.Sequential(unet.conv_in)
    with pytest.raises(UserError, match=r"found Sequential as its first layer; .* merge the adapters"):
        grow(unet, old=PLAIN, new=INPAINTING, class_embedding_width=None)


def test_the_layout_counts_its_channels() -> None:
    assert [layout.channels(4) for layout in (PLAIN, INPAINTING, SEMANTIC, BOTH)] == [0, 5, 3, 8]
    assert BOTH.channels(16) == 1 + 16 + 3
    with pytest.raises(UserError, match="semantic_channels: found -1; allowed is 0"):
        SpatialLayout(inpainting=False, semantic_channels=-1)
