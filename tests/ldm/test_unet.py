"""The U-Net: its size, what it is told, its kernels, and that plain diffusers reads it."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers import UNet2DConditionModel
from safetensors.torch import load_file, save_file

from conditioning.conditions import Conditions
from ldm.errors import UserError
from ldm.unet import (
    UNetConfig,
    build_unet,
    class_embedding_width_of,
    context_width_of,
    denoise,
    spatial_channels_of,
    spatial_input,
)

TINY = UNetConfig(channels=(16, 32), layers_per_block=1, attention=(False, True), heads=4, norm_groups=8)


def tiny(config: UNetConfig = TINY, **values: Any) -> UNet2DConditionModel:
    """A network of two levels with random weights, the last layer's too."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        return build_unet(config, **{"latent_channels": 4, "context_width": 12, "sample_size": 8} | values)


def inputs(batch: int = 2, spatial: int = 0, context: int | None = 12, class_width: int | None = None) -> Any:
    generator = torch.Generator().manual_seed(1)
    conditions = Conditions(
        context=None if context is None else torch.randn(batch, 5, context, generator=generator),
        spatial=torch.randn(batch, spatial, 8, 8, generator=generator) if spatial else None,
        class_embedding=None if class_width is None else torch.randn(batch, class_width, generator=generator),
    )
    return torch.randn(batch, 4, 8, 8, generator=generator), torch.arange(batch) * 400, conditions


def on_meta(config: UNetConfig, **values: Any) -> UNet2DConditionModel:
    with torch.device("meta"):
        return build_unet(config, **{"latent_channels": 4, "sample_size": 64} | values)


def test_the_default_is_stable_diffusion_1_5() -> None:
    unet = on_meta(UNetConfig(), context_width=768)
    assert sum(parameter.numel() for parameter in unet.parameters()) == 859_520_964


def test_nine_channels_are_stable_diffusion_inpainting() -> None:
    unet = on_meta(UNetConfig(), context_width=768, spatial_channels=5)
    assert sum(parameter.numel() for parameter in unet.parameters()) == 859_520_964 + 5 * 320 * 9
    assert (unet.config.in_channels, unet.config.out_channels, spatial_channels_of(unet)) == (9, 4, 5)


def test_head_width_gives_stable_diffusion_2_heads() -> None:
    unet = on_meta(UNetConfig(head_width=64), context_width=1024)
    assert unet.config.attention_head_dim == (5, 10, 20, 20)
    assert unet.down_blocks[1].attentions[0].transformer_blocks[0].attn1.heads == 10


@pytest.mark.parametrize("context", [None, 12])
def test_heads_mean_heads_with_and_without_text(context: int | None) -> None:
    unet = tiny(context_width=context)
    attention = unet.down_blocks[1].attentions[0]
    assert (attention.heads if context is None else attention.transformer_blocks[0].attn1.heads) == 4


def test_attention_stands_at_the_levels_that_ask_for_it() -> None:
    unet = tiny()
    assert not hasattr(unet.down_blocks[0], "attentions") and len(unet.down_blocks[1].attentions) == 1
    assert len(unet.up_blocks[0].attentions) == 2 and not hasattr(unet.up_blocks[1], "attentions")


@pytest.mark.parametrize("class_width", [None, 6])
@pytest.mark.parametrize("spatial", [0, 3])
@pytest.mark.parametrize("context", [None, 12])
def test_every_mix_of_conditions_runs_and_every_one_counts(
    context: int | None, spatial: int, class_width: int | None
) -> None:
    unet = tiny(context_width=context, spatial_channels=spatial, class_embedding_width=class_width)
    widths = context_width_of(unet), spatial_channels_of(unet), class_embedding_width_of(unet)
    assert widths == (context, spatial, class_width)
    latents, timesteps, conditions = inputs(spatial=spatial, context=context, class_width=class_width)
    with torch.no_grad():
        output = denoise(unet, latents, timesteps, conditions)
        assert output.shape == latents.shape
        assert not torch.allclose(output, denoise(unet, latents, timesteps + 300, conditions))
        for name in ("context", "spatial", "class_embedding"):
            tensor = getattr(conditions, name)
            if tensor is not None:
                changed = dataclasses.replace(conditions, **{name: tensor.flip(0) + 1})
                assert not torch.allclose(output, denoise(unet, latents, timesteps, changed), atol=1e-5), name


def test_denoise_is_diffusers_own_call() -> None:
    unet = tiny(spatial_channels=2, class_embedding_width=6)
    latents, timesteps, conditions = inputs(spatial=2, class_width=6)
    expected = unet(
        torch.cat([latents, conditions.spatial], 1),
        timesteps,
        conditions.context,
        class_labels=conditions.class_embedding,
    ).sample
    assert torch.equal(denoise(unet, latents, timesteps, conditions), expected)


def test_the_way_of_the_text_begins_with_weights_of_variance_one_over_fan_in() -> None:
    wide = dataclasses.replace(TINY, channels=(64, 128))
    unet = tiny(wide, context_width=96)
    found = [module for name, module in unet.named_modules() if name.endswith("attn2")]
    assert len(found) == 4  # one down, two up, one in the middle
    for module in found:
        for layer in (module.to_q, module.to_k, module.to_v, module.to_out[0]):
            assert layer.weight.var().item() * layer.in_features == pytest.approx(1.0, rel=0.05)


def test_spatial_conditions_follow_the_latents() -> None:
    latents, _, conditions = inputs(spatial=3)
    joined = spatial_input(latents, conditions)
    assert torch.equal(joined[:, :4], latents) and torch.equal(joined[:, 4:], conditions.spatial)
    assert spatial_input(latents, Conditions()) is latents


def test_fractional_timesteps_of_flow_are_told_apart() -> None:
    unet = tiny()
    latents, _, conditions = inputs(batch=1)
    early, late = (denoise(unet, latents, torch.tensor([time]), conditions) for time in (10.25, 10.75))
    assert not torch.equal(early, late)


def test_a_sample_does_not_depend_on_its_batch() -> None:
    unet = tiny(spatial_channels=1)
    latents, timesteps, conditions = inputs(batch=4, spatial=1)
    with torch.no_grad():
        together = denoise(unet, latents, timesteps, conditions)
        alone = denoise(unet, latents[2:3], timesteps[2:3], conditions[2])
    torch.testing.assert_close(together[2:3], alone, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize(
    ("built", "given", "part"),
    [
        ({}, {"context": None}, "context"),
        ({}, {"context": 10}, "context"),
        ({"context_width": None}, {}, "context"),
        ({}, {"spatial": 2}, "spatial"),
        ({"spatial_channels": 2}, {}, "spatial"),
        ({"class_embedding_width": 6}, {}, "class_embedding"),
        ({}, {"class_width": 6}, "class_embedding"),
    ],
)
def test_conditions_that_do_not_fit_are_named(built: dict[str, Any], given: dict[str, Any], part: str) -> None:
    with pytest.raises(ValueError, match=rf"^conditions\.{part}: found .*; this U-Net takes"):
        denoise(tiny(**built), *inputs(**given))


@pytest.mark.parametrize("values", [{}, {"context_width": None}, {"spatial_channels": 3, "class_embedding_width": 6}])
def test_plain_diffusers_reads_what_is_saved(values: dict[str, Any], tmp_path: Path) -> None:
    unet = tiny(**values)
    unet.save_pretrained(tmp_path)
    loaded = UNet2DConditionModel.from_pretrained(tmp_path, local_files_only=True)
    arguments = inputs(
        spatial=values.get("spatial_channels", 0),
        context=values.get("context_width", 12),
        class_width=values.get("class_embedding_width"),
    )
    saved, read = unet.state_dict(), loaded.state_dict()
    assert [name for name in saved.keys() | read.keys() if not torch.equal(saved[name], read[name])] == []
    with torch.no_grad():  # the same weights at other addresses: some processors' kernels differ in the last bit
        torch.testing.assert_close(denoise(loaded, *arguments), denoise(unet, *arguments), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("inside_a_pipeline", [True, False])
def test_training_goes_on_from_a_saved_network(inside_a_pipeline: bool, tmp_path: Path) -> None:
    unet = tiny()
    unet.save_pretrained(tmp_path / "unet" if inside_a_pipeline else tmp_path)
    loaded = tiny(UNetConfig(pretrained=str(tmp_path)))
    weights = unet.state_dict()
    assert loaded.state_dict().keys() == weights.keys()
    assert all(torch.equal(weight, weights[name]) for name, weight in loaded.state_dict().items())


@pytest.mark.parametrize(
    ("wanted", "name"),
    [
        ({"latent_channels": 8}, "latent channels 4"),
        ({"spatial_channels": 5}, "spatial condition channels 0"),
        ({"context_width": 768}, "context width 12"),
        ({"class_embedding_width": 6}, "class embedding width None"),
    ],
)
def test_a_saved_network_that_does_not_fit_is_refused(wanted: dict[str, Any], name: str, tmp_path: Path) -> None:
    tiny().save_pretrained(tmp_path)
    with pytest.raises(
        UserError, match=rf"^unet\.pretrained: found a network with {name};.* need {max(wanted.values())}"
    ):
        tiny(UNetConfig(pretrained=str(tmp_path)), **wanted)


def test_a_saved_network_with_a_weight_missing_is_refused(tmp_path: Path) -> None:
    tiny().save_pretrained(tmp_path)
    file = tmp_path / "diffusion_pytorch_model.safetensors"
    weights = load_file(file)
    del weights["conv_in.bias"]
    save_file(weights, file)
    with pytest.raises(UserError, match=r"such as conv_in\.bias"):
        tiny(UNetConfig(pretrained=str(tmp_path)))


@pytest.mark.parametrize("name", ["/no/such/folder", "runs", "./owner/name", "a/b/c"])
def test_a_missing_folder_is_one_line_and_never_a_download(
    name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    with pytest.raises(UserError, match="which does not exist; allowed is an existing folder or a hub id"):
        tiny(UNetConfig(pretrained=name))


@pytest.mark.parametrize("context", [None, 12])
def test_checkpointing_leaves_the_gradients_alone(context: int | None) -> None:
    gradients = []
    for checkpointing in (False, True):
        unet = tiny(dataclasses.replace(TINY, gradient_checkpointing=checkpointing), context_width=context)
        assert unet.is_gradient_checkpointing == checkpointing
        denoise(unet.train(), *inputs(context=context)).square().mean().backward()
        gradients.append({name: parameter.grad for name, parameter in unet.named_parameters()})
    for name, gradient in gradients[0].items():
        torch.testing.assert_close(gradient, gradients[1][name], msg=name)


@pytest.mark.parametrize(
    ("values", "field"),
    [
        ({"channels": ()}, "channels"),
        ({"attention": (True,)}, "attention"),
        ({"layers_per_block": 0}, "layers_per_block"),
        ({"attention_backend": "flash"}, "attention_backend"),
        ({"heads": 8, "head_width": 64}, "heads"),
        ({"heads": 7}, "heads"),
        ({"heads": 0}, "heads"),
        ({"head_width": 100}, "head_width"),
        ({"norm_groups": 24}, "norm_groups"),
        ({"channels": (100, 200), "attention": (True, False), "norm_groups": 20}, "heads"),
    ],
)
def test_sizes_that_cannot_be_built_are_refused(values: dict[str, Any], field: str) -> None:
    with pytest.raises(ValueError, match=rf"^{field}: found .*; ?allowed is|^{field}: found .*, which does not divide"):
        UNetConfig(**values)
