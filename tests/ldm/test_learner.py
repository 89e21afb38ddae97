"""Learning rates against their formulas; a learner that was saved and loaded goes on with the same bits."""

from __future__ import annotations

import math

import pytest
import torch
from accelerate import Accelerator
from accelerate.state import AcceleratorState, GradientState
from hypothesis import given
from hypothesis import strategies as st
from torch import nn

from ldm.errors import UserError
from ldm.training.checkpoint import CheckpointFolder
from ldm.training.learner import Learner, OptimiserConfig, learning_rate


class Net(nn.Module):
    """Weights of every number of axes; those of the convolutions have channels-last strides that differ."""

    def __init__(self, width: int = 6, *, scale: bool = True) -> None:
        super().__init__()
        self.first, self.second = nn.Conv2d(3, width, 3), nn.Conv2d(width, 4, 3)
        self.last = nn.Linear(4, 2)
        self.frozen = nn.Linear(2, 2).requires_grad_(False)
        nn.init.eye_(self.frozen.weight)  # the same in every net: it is in no checkpoint
        nn.init.zeros_(self.frozen.bias)
        self.scale = nn.Parameter(torch.tensor(1.3)) if scale else 1.0
        self.to(memory_format=torch.channels_last)

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        hidden = self.second(torch.tanh(self.first(images))).mean(dim=(2, 3))
        return self.frozen(self.last(hidden)) * self.scale


@pytest.fixture
def accelerator():
    for state in (AcceleratorState, GradientState):
        state._reset_state()
    yield Accelerator(cpu=True, mixed_precision="no")
    AcceleratorState._reset_state(reset_partial_state=True)
    GradientState._reset_state()


@pytest.fixture
def learner(accelerator):
    def make(
        seed: int, net: type[nn.Module] = Net, *, decay: float = 0.9, frozen: tuple[str, ...] = (), **options: object
    ) -> Learner:
        torch.manual_seed(seed)
        config = OptimiserConfig(lr=0.01, schedule="cosine", warmup_steps=2, **options)
        module = net()
        for part in frozen:
            module.get_submodule(part).requires_grad_(False)
        return Learner("net", module, config, accelerator, steps=20, ema_decay=decay)

    return make


def train(learner: Learner, steps: range) -> None:
    for step in steps:
        images = torch.randn(2, 3, 8, 8, generator=torch.Generator().manual_seed(step))
        images = images.contiguous(memory_format=torch.channels_last)
        learner.wrapped(images).square().mean().backward()
        learner.clip_gradients()
        learner.update(step)


def flat(files):
    return {(file, name): tensor for file, tensors in files.items() for name, tensor in tensors.items()}


def assert_equal(first: Learner, second: Learner) -> None:
    one, two = flat(first.tensors()), flat(second.tensors())
    assert one.keys() == two.keys()
    assert [name for name in one if not torch.equal(one[name], two[name])] == []


# --- Learning rate ---------------------------------------------------------------------------------------------------


def test_the_warm_up_rises_to_lr_and_does_not_begin_at_zero():
    config = OptimiserConfig(lr=0.4, warmup_steps=4)
    assert [learning_rate(config, step, 10) for step in range(6)] == pytest.approx([0.1, 0.2, 0.3, 0.4, 0.4, 0.4])


@pytest.mark.parametrize(
    ("schedule", "middle", "quarter"),
    [("constant", 1.0, 1.0), ("linear", 0.55, 0.775), ("cosine", 0.55, 0.1 + 0.9 * (1 + math.sqrt(0.5)) / 2)],
)
def test_schedules_begin_at_lr_and_end_at_the_final_ratio(schedule, middle, quarter):
    config = OptimiserConfig(lr=2.0, schedule=schedule, warmup_steps=20, final_lr_ratio=0.1)
    end = 2.0 if schedule == "constant" else 0.2
    rates = [learning_rate(config, step, 100) for step in (20, 40, 60, 100, 130)]
    assert rates == pytest.approx([2.0, 2 * quarter, 2 * middle, end, end])


@given(
    st.sampled_from(["constant", "linear", "cosine"]),
    st.integers(0, 30),
    st.integers(1, 60),
    st.floats(0, 1),
)
def test_it_rises_then_never_rises_again_and_stays_within_bounds(schedule, warmup, steps, ratio):
    config = OptimiserConfig(lr=1.0, schedule=schedule, warmup_steps=warmup, final_lr_ratio=ratio)
    rates = [learning_rate(config, step, steps) for step in range(steps)]
    assert all(0 < rate <= 1 + 1e-12 or ratio == 0 for rate in rates)
    assert rates[:warmup] == sorted(rates[:warmup])
    assert rates[warmup:] == sorted(rates[warmup:], reverse=True)


def test_the_optimiser_gets_the_rate(learner):
    one = learner(0)
    train(one, range(3))
    assert one.optimiser.param_groups[0]["lr"] == learning_rate(one.config, 2, 20)


class WithText(nn.Module):
    """A text encoder that is registered before the network it conditions."""

    def __init__(self) -> None:
        super().__init__()
        self.encoders = nn.ModuleDict({"text": nn.Conv2d(3, 3, 3)})
        self.unet = Net(4)

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        return self.unet(self.encoders["text"](images))


def test_a_text_encoder_gets_its_share_of_the_rate_and_the_first_steps_are_that_much_shorter(learner):
    one = learner(0, WithText, text_lr_ratio=0.25)
    before = {name: parameter.detach().clone() for name, parameter in one.module.named_parameters()}
    train(one, range(1))
    assert [group["lr"] for group in one.optimiser.param_groups] == [0.005, 0.00125]  # the warm-up's first of two steps
    moved = {name: (p.detach() - before[name]).abs().max().item() for name, p in one.module.named_parameters()}
    # Adam's first step is the rate, whatever the gradient; weight decay adds a hundredth of it times the weight.
    assert moved["encoders.text.weight"] == pytest.approx(0.00125, rel=0.02)
    assert moved["unet.first.weight"] == pytest.approx(0.005, rel=0.02)


def test_where_the_text_encoder_alone_is_trained_it_gets_its_share_too(learner):
    one = learner(0, WithText, frozen=("unet",), text_lr_ratio=0.25)
    train(one, range(3))
    assert one.optimiser.param_groups[-1]["lr"] == learning_rate(one.config, 2, 20) / 4
    stepped = {name for name, parameter in one.module.named_parameters() if parameter in one.optimiser.state}
    assert stepped == {"encoders.text.weight", "encoders.text.bias"}


def test_a_rate_for_text_without_a_text_encoder_is_refused(learner):
    with pytest.raises(UserError, match=r"text_lr_ratio: found 0\.25, but the net is trained with no text encoder"):
        learner(0, text_lr_ratio=0.25)


# --- Saving and loading ----------------------------------------------------------------------------------------------


def test_channels_last_weights_have_strides_that_differ(learner):
    """What the round trip below is about."""
    weight = learner(0).module.second.weight
    assert weight.is_contiguous(memory_format=torch.channels_last)
    assert not weight.is_contiguous()


@pytest.mark.parametrize(("net", "options"), [(Net, {}), (WithText, {"text_lr_ratio": 0.25})])
def test_a_loaded_learner_goes_on_with_the_same_bits(learner, tmp_path, net, options):
    """Through a real checkpoint: safetensors holds contiguous tensors, fused AdamW pairs elements in memory order."""
    straight, saved, other = (learner(seed, net, **options) for seed in (0, 0, 1))
    train(straight, range(9))
    train(saved, range(5))
    train(other, range(2))
    folder = CheckpointFolder(tmp_path, keep=1)
    folder.save(5, saved.tensors(), {})
    other.load_tensors(folder.latest().tensors)
    assert_equal(other, saved)
    train(other, range(5, 9))
    assert_equal(other, straight)
    for name, parameter in other.module.named_parameters():
        for moment in other.optimiser.state.get(parameter, {}).values():
            assert moment.ndim == 0 or moment.stride() == parameter.stride(), name


def test_frozen_parameters_are_neither_trained_nor_saved(learner):
    one = learner(0)
    before = one.module.frozen.weight.clone()
    train(one, range(3))
    assert torch.equal(one.module.frozen.weight, before)
    assert not [name for _, name in flat(one.tensors()) if "frozen" in name]


def test_a_learner_that_has_not_stepped_can_be_saved_and_loaded(learner):
    one, two = learner(0), learner(1)
    two.load_tensors(one.tensors())
    train(one, range(2))
    train(two, range(2))
    assert_equal(one, two)


@pytest.mark.parametrize(
    ("saved", "built", "says"),
    [
        (lambda: Net(width=5), Net, r"found \(5, 3, 3, 3\) for first.weight, the config builds \(6, 3, 3, 3\)"),
        (lambda: Net(scale=False), Net, "found nothing for scale"),
        (Net, lambda: Net(scale=False), "found scale, which the config does not build"),
    ],
)
def test_a_checkpoint_of_another_architecture_is_refused_by_name(learner, saved, built, says):
    one, two = learner(0, saved), learner(0, built)
    train(one, range(1))
    with pytest.raises(UserError, match=f"checkpoint net: {says}"):
        two.load_tensors(one.tensors())


def test_a_checkpoint_without_an_average_is_refused(learner):
    with pytest.raises(UserError, match=r"checkpoint net\.ema: found nothing for"):
        learner(0).load_tensors(learner(0, decay=0.0).tensors())


# --- 8-bit AdamW -----------------------------------------------------------------------------------------------------


def large_net() -> Net:
    """Convolutions of more than the 4,096 weights from which on bitsandbytes keeps moments in 8 bits."""
    return Net(width=160)


def test_8_bit_adam_that_is_not_installed_is_one_line(learner, monkeypatch):
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    with pytest.raises(UserError, match=r"^optimiser.kind: found adamw8bit, for which bitsandbytes is not installed"):
        learner(0, kind="adamw8bit")


def test_8_bit_adam_goes_on_with_the_same_bits(learner, tmp_path):
    pytest.importorskip("bitsandbytes", reason="bitsandbytes is not installed (extra adam8bit)")
    straight, saved = (learner(0, large_net, kind="adamw8bit") for _ in range(2))
    other, stepped = (learner(1, large_net, kind="adamw8bit") for _ in range(2))
    train(straight, range(9))
    train(saved, range(5))
    train(stepped, range(2))
    folder = CheckpointFolder(tmp_path, keep=1)
    folder.save(5, saved.tensors(), {})
    states = folder.latest().tensors["net.optimiser"]
    assert states["second.weight/state1"].dtype == torch.uint8
    assert states["last.weight/state1"].dtype == torch.float32  # a small one
    for one in (other, stepped):  # one that is new, as in a resume, and one that has moments of its own
        one.load_tensors(folder.latest().tensors)
        assert_equal(one, saved)
        train(one, range(5, 9))
        assert_equal(one, straight)


def test_8_bit_adam_learns_nearly_what_adam_does(learner):
    pytest.importorskip("bitsandbytes", reason="bitsandbytes is not installed (extra adam8bit)")
    small, large = learner(0, large_net, kind="adamw8bit"), learner(0, large_net)
    before = large.module.second.weight.detach().clone()
    for one in (small, large):
        train(one, range(9))
    changed = large.module.second.weight - before
    difference = small.module.second.weight - large.module.second.weight
    assert difference.norm() < 0.1 * changed.norm()


# --- Moving average --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("decay", [0.35, 0.999])
def test_the_average_warms_up(learner, decay):
    """Update n (from 0) keeps min(decay, (1 + n) / (10 + n)) of the average; the first one is a copy."""
    one = learner(0, decay=decay)
    expected = one.module.last.weight.detach().clone()
    for n in range(8):
        train(one, range(n, n + 1))
        kept = min(decay, (1 + n) / (10 + n)) if n else 0.0
        expected = kept * expected + (1 - kept) * one.module.last.weight.detach()
    average = one.tensors()["net.ema"]["last.weight"]
    torch.testing.assert_close(average, expected, rtol=1e-5, atol=1e-7)
    assert not torch.allclose(average, one.module.last.weight)


def test_averaged_weights_are_there_inside_and_gone_afterwards(learner):
    one = learner(0)
    train(one, range(6))
    raw = {name: p.detach().clone() for name, p in one.module.named_parameters()}
    average = one.tensors()["net.ema"]["first.weight"].clone()
    with pytest.raises(KeyError), one.averaged_weights():
        assert torch.equal(one.module.first.weight, average)
        assert not torch.equal(one.module.first.weight, raw["first.weight"])
        raise KeyError
    assert all(torch.equal(p, raw[name]) for name, p in one.module.named_parameters())


def test_without_an_average_the_weights_are_their_own(learner):
    one = learner(0, decay=0.0)
    train(one, range(2))
    before = one.module.first.weight.detach().clone()
    with one.averaged_weights():
        assert torch.equal(one.module.first.weight, before)
    assert "net.ema" not in one.tensors()


# --- Clipping --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("clip", [0.0, 0.01, 1e6])
def test_clipping_gives_the_norm_before_and_shortens_only_what_is_longer(learner, clip):
    one = learner(0, clip=clip)
    one.wrapped(torch.ones(2, 3, 8, 8)).square().mean().backward()
    gradients = [p.grad for p in one.module.parameters() if p.grad is not None]
    before = torch.stack([g.norm() for g in gradients]).norm().item()
    assert before > 0.01
    assert one.clip_gradients().item() == pytest.approx(before, rel=1e-5)
    after = torch.stack([g.norm() for g in gradients]).norm().item()
    assert after == pytest.approx(0.01 if clip == 0.01 else before, rel=1e-3)
