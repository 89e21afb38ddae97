"""What is not finite is found, what is merely large is not, and the layer where it begins is named."""

from __future__ import annotations

from contextlib import nullcontext
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from ldm.data.sample import Batch
from ldm.training.finite import broken_tensors, broken_values, floating_tensors, greatest_weight, probe
from ldm.training.replay import _examine

HUGE = 3e38


@pytest.mark.parametrize("bad", [torch.nan, torch.inf, -torch.inf])
def test_one_bad_number_in_many_is_found(bad: float) -> None:
    good = [torch.full((3, 5), HUGE), torch.full((2,), -HUGE), torch.zeros(())]
    assert probe(good) == 0
    weights = [nn.Parameter(tensor) for tensor in good]
    assert greatest_weight(weights) == torch.tensor(HUGE)
    assert broken_tensors({str(i): tensor for i, tensor in enumerate(good)}) == []
    good[0][1, 2] = bad
    assert probe(good).isnan()
    found = greatest_weight([nn.Parameter(tensor) for tensor in good])
    assert not found.isfinite()
    assert broken_tensors({str(i): tensor for i, tensor in enumerate(good)}) == ["0"]
    assert list(broken_values({"a": HUGE, "b": bad})) == ["b"]


def test_the_tensors_of_a_batch_that_can_be_broken() -> None:
    moments = (torch.zeros(1, 2, 4, 4), torch.full((1, 2, 4, 4), torch.inf))
    batch = Batch(("a",), (0,), ("",), labels=torch.tensor([1]), weights=torch.ones(1), moments=moments)
    assert set(floating_tensors(batch)) == {"weights", "latents (mean)", "latents (log-variance)"}
    assert broken_tensors(floating_tensors(batch)) == ["latents (log-variance)"]


class Reciprocal(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return 1 / x


class Fake:
    """A stage of two layers, whose second one divides by the mean of the picture."""

    script = "none.py"

    def __init__(self) -> None:
        self.module = nn.Sequential(nn.Linear(1, 1, bias=False), nn.Sequential(Reciprocal(), nn.Linear(1, 1)))
        nn.init.ones_(self.module[0].weight)  # type: ignore[arg-type]
        learner = SimpleNamespace(name="net", module=self.module, wrapped=self.module)
        learner.optimiser = torch.optim.SGD(self.module.parameters(), 1.0)
        self.learners: list[Any] = [learner]

    def backward(self, batch: Batch, step: int, share: float) -> dict[str, Tensor]:
        assert batch.images is not None
        loss = self.module(batch.images.mean(dim=(1, 2, 3))[:, None]).square().mean()
        loss.backward()
        return {"loss": loss.detach(), "term": loss.detach() * 0 + 1}


def test_each_sample_is_gone_through_alone_and_the_layer_named() -> None:
    images = torch.stack([torch.full((3, 2, 2), value) for value in (1.0, 0.0, torch.nan)])
    batch = Batch(("a", "b", "c"), (4, 5, 6), ("", "", ""), images=images)
    accelerator = SimpleNamespace(device=torch.device("cpu"), no_sync=lambda module: nullcontext())
    stage = Fake()
    one, zero, nan = _examine(stage, batch, 0, SimpleNamespace(accelerator=accelerator))  # type: ignore[arg-type]
    assert one.finite and one.layer is None and one.sample.position == 4
    assert zero.layer == "net.1.0"
    assert zero.data == () and zero.sample.key == "b" and set(zero.values) == {"loss", "term"}
    assert zero.gradients == ("net.0.weight", "net.1.1.weight", "net.1.1.bias")
    assert nan.data == ("images",) and nan.layer is None
    assert "position 5: NOT FINITE" in zero.told() and "first in net.1.0" in zero.told()
    assert all(parameter.grad is None for parameter in stage.module.parameters())
