from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from conditioning.conditions import Conditions
from ldm.errors import UserError
from ldm.guidance import ClassifierFreeGuidance


class Recorder:
    """A denoiser whose prediction mixes latents, timestep and text, sample by sample, and that counts its calls."""

    def __init__(self) -> None:
        self.batches: list[int] = []

    def __call__(self, latents: Tensor, timesteps: Tensor, conditions: Conditions) -> Tensor:
        self.batches.append(len(latents))
        assert conditions.context is not None and len(conditions) == len(latents) == len(timesteps)
        told = conditions.context.mean(dim=(1, 2)).view(-1, 1, 1, 1)
        return latents.sin() + told * latents + timesteps.view(-1, 1, 1, 1) / 1000


def inputs(batch: int) -> tuple[Tensor, Tensor, Conditions, Conditions]:
    generator = torch.Generator().manual_seed(1)
    latents = torch.randn(batch, 4, 8, 8, generator=generator)
    context, empty = torch.randn(2, batch, 5, 6, generator=generator)
    return latents, torch.arange(batch) * 100, Conditions(context=context), Conditions(context=empty)


def test_scale_one_is_one_evaluation_of_the_batch_and_equals_no_guidance() -> None:
    latents, timesteps, conditions, empty = inputs(3)
    recorder = Recorder()
    guided = ClassifierFreeGuidance(recorder, empty, 1.0)(latents, timesteps, conditions)
    assert recorder.batches == [3]
    assert torch.equal(guided, Recorder()(latents, timesteps, conditions))


@given(scale=st.floats(0, 30).filter(lambda scale: scale != 1))
def test_other_scales_are_one_evaluation_of_twice_the_batch_and_follow_the_formula(scale: float) -> None:
    latents, timesteps, conditions, empty = inputs(3)
    recorder, plain = Recorder(), Recorder()
    guided = ClassifierFreeGuidance(recorder, empty, scale)(latents, timesteps, conditions)
    assert recorder.batches == [6]
    with_text, without = plain(latents, timesteps, conditions), plain(latents, timesteps, empty)
    # Ho & Salimans' own form: (1 + w) conditional - w unconditional, w = scale - 1
    torch.testing.assert_close(guided, scale * with_text - (scale - 1) * without, rtol=1e-4, atol=1e-4)


def test_scale_zero_is_the_unconditional_prediction() -> None:
    latents, timesteps, conditions, empty = inputs(2)
    guided = ClassifierFreeGuidance(Recorder(), empty, 0.0)(latents, timesteps, conditions)
    assert torch.equal(guided, Recorder()(latents, timesteps, empty))


def test_one_unconditional_sample_serves_the_whole_batch() -> None:
    latents, timesteps, conditions, empty = inputs(4)
    one = ClassifierFreeGuidance(Recorder(), empty[0], 3.0)(latents, timesteps, conditions)
    repeated = ClassifierFreeGuidance(Recorder(), empty[0].repeat_interleave(4), 3.0)(latents, timesteps, conditions)
    assert torch.equal(one, repeated)


def test_a_sample_does_not_depend_on_its_batch() -> None:
    latents, timesteps, conditions, empty = inputs(8)
    together = ClassifierFreeGuidance(Recorder(), empty, 4.0)(latents, timesteps, conditions)
    for i in range(8):
        part = slice(i, i + 1)
        alone = ClassifierFreeGuidance(Recorder(), empty[part], 4.0)(latents[part], timesteps[part], conditions[part])
        torch.testing.assert_close(together[part], alone, rtol=0, atol=1e-6)


@pytest.mark.parametrize("scale", [-0.1, float("nan"), float("inf")])
def test_an_impossible_scale_is_refused(scale: float) -> None:
    with pytest.raises(UserError, match=r"guidance_scale: found .* 1 turns guidance off"):
        ClassifierFreeGuidance(Recorder(), Conditions(), scale)
