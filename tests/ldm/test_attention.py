"""Kernels agree, are set as asked, are tried before they are trusted, and are told as they ran."""

from __future__ import annotations

import importlib.util
import sys
import types
from typing import Any

import pytest
import torch
from diffusers import UNet2DConditionModel

from conditioning.conditions import Conditions
from ldm.attention import attention_kernel, attention_that_ran, set_attention
from ldm.errors import UserError
from ldm.unet import UNetConfig, build_unet, denoise

SIZES: dict[str, Any] = {"channels": (16, 32), "layers_per_block": 1, "heads": 4, "norm_groups": 8}
BACKENDS = ["auto", "sdpa", "math"]


def tiny(backend: str = "auto", *, context: int | None = 12, attention: bool = True, **values: Any) -> Any:
    config = UNetConfig(attention=(False, attention), attention_backend=backend, **SIZES)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        return build_unet(config, latent_channels=4, context_width=context, sample_size=8, **values)


def output(unet: UNet2DConditionModel, context: int | None) -> torch.Tensor:
    generator = torch.Generator().manual_seed(1)
    latents = torch.randn(2, 4, 8, 8, generator=generator)
    told = Conditions(context=None if context is None else torch.randn(2, 5, context, generator=generator))
    with torch.no_grad():
        return denoise(unet, latents, torch.tensor([3, 700]), told)


@pytest.mark.parametrize("context", [None, 12])
def test_the_kernels_agree(context: int | None) -> None:
    unet = tiny(context=context)
    fused = output(unet, context)
    set_attention(unet, "math")
    torch.testing.assert_close(output(unet, context), fused, rtol=1e-5, atol=1e-5)
    unet.set_attention_slice("max")
    assert attention_kernel(unet) == "slices"
    torch.testing.assert_close(output(unet, context), fused, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("context", [None, 12])
def test_what_ran_is_what_the_config_asks_for(backend: str, context: int | None) -> None:
    unet = tiny(backend, context=context)
    kernel = "math" if backend == "math" else "sdpa"
    assert attention_kernel(unet) == kernel
    assert attention_that_ran(unet) == f"{kernel} ({'explicit products' if kernel == 'math' else 'flash'})"


def test_what_ran_follows_torch_and_not_the_name_of_the_setting() -> None:
    """Where torch's choice of fused kernels is cut to none, sdpa is explicit products, and that is told."""
    unet = tiny()
    with torch.nn.attention.sdpa_kernel(torch.nn.attention.SDPBackend.MATH):
        assert attention_that_ran(unet) == "sdpa (explicit products)"
    assert attention_that_ran(unet) == "sdpa (flash)"


def test_asking_changes_nothing() -> None:
    unet = tiny(spatial_channels=3, class_embedding_width=6)
    before = {name: weight.clone() for name, weight in unet.state_dict().items()}
    state = torch.get_rng_state()
    assert attention_that_ran(unet) == "sdpa (flash)"
    assert all(torch.equal(weight, before[name]) for name, weight in unet.state_dict().items())
    assert all(parameter.grad is None for parameter in unet.parameters())
    assert torch.equal(torch.get_rng_state(), state)


def test_a_network_without_attention_has_no_kernel() -> None:
    unet = tiny(context=None, attention=False)
    assert attention_kernel(unet) == "none"
    assert attention_that_ran(unet) == "none (no attention)"


def test_xformers_that_is_missing_is_refused_in_one_line(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    with pytest.raises(UserError, match="xformers, which is not installed; allowed is auto, sdpa or math"):
        tiny("xformers")


@pytest.mark.skipif(torch.cuda.is_available(), reason="here it may well work")
def test_xformers_that_is_there_but_does_not_work_is_refused_in_one_line(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: object())
    monkeypatch.setitem(sys.modules, "xformers", types.ModuleType("xformers"))
    with pytest.raises(UserError, match="this kernel does not work here; choose sdpa or math: "):
        tiny("xformers")


def test_a_kernel_that_fails_when_it_is_called_is_one_line() -> None:
    class Broken:
        def __call__(self, *args: object, **options: object) -> torch.Tensor:
            raise NotImplementedError("No operator found for `memory_efficient_attention_forward`")

    unet = tiny()
    unet.set_attn_processor(Broken())
    with pytest.raises(UserError, match="does not work here; choose sdpa or math: No operator found"):
        attention_that_ran(unet)
