"""What to change so that a run fits: counted again with each change, those that cost nothing first."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import Any

import torch

from autoencoder.model import AutoencoderConfig
from ldm.adapters import LoraConfig
from ldm.training.plan import USABLE, Machine, Plan, RunConfig, peak_of, recount
from ldm.training.plan_count import Count
from ldm.training.plan_steps import STEP
from ldm.training.stage1 import Stage1Config
from ldm.training.stage2_config import Stage2Config

WORTH_TELLING = 0.01
"""Share of the peak that a change has to save."""


@dataclass(frozen=True)
class Change:
    """One change of the config, made beside those before it.

    Attributes:
        override: as it is written behind the config on the command line.
        cost: what it costs, or that it costs nothing.
        saves, peak: bytes, and what is then needed.
        fits: whether that is little enough.
    """

    override: str
    cost: str
    saves: int
    peak: int
    fits: bool


_Step = tuple[str, Any, str]
"""Key, new value, what it costs."""


def advise(plan: Plan, autoencoder: AutoencoderConfig | None = None) -> list[Change]:
    """The changes that bring the run into the machine's memory, each beside those before it; all that help if none do.

    `autoencoder` as in `make_plan`.
    """
    machine, changes = plan.machine, []
    config, counted = plan.config, plan.count
    limit = USABLE * machine.memory * min(1.0, plan.counted_peak / plan.peak)  # what is measured may be more
    tried: set[str] = set()
    while peak_of(counted, machine) > limit:
        step = next((s for s in _steps(config, counted, machine, limit) if s[0] not in tried), None)
        if step is None:
            break
        key, value, cost = step
        tried.add(key)
        changed = with_value(config, key, value)
        other = replace(machine, low=torch.bfloat16) if key == "runtime.precision" else machine
        new = recount(changed, other, autoencoder)
        before, after = peak_of(counted, machine), peak_of(new, other)
        if before - after < WORTH_TELLING * before:
            continue
        changes.append(Change(f"{key}={_written(value)}", cost, before - after, after, after <= limit))
        config, counted, machine = changed, new, other
    return changes


def _steps(config: RunConfig, counted: Count, machine: Machine, limit: float) -> Iterator[_Step]:
    """What may help, in the order of its cost."""
    name = counted.worst[0]
    if name == STEP:
        yield from _smaller_steps(config, counted, machine, limit)
    else:
        yield from _smaller_phase(name, counted, machine, limit)
    if config.optimiser.kind == "adamw":
        yield "optimiser.kind", "adamw8bit", "nearly the same result; pip install 'ldm[adam8bit]'"
    if isinstance(config, Stage2Config) and config.model and not config.lora and not config.textual_inversion:
        yield "lora", LoraConfig(), "trains small matrices instead of all weights"
    if config.ema_decay:
        yield "ema_decay", 0, "no averaged weights: often worse images"
    smaller = config.data.resolution * 3 // 4 // 64 * 64
    if smaller >= 64:
        yield "data.resolution", smaller, "smaller images"


def _smaller_steps(config: RunConfig, counted: Count, machine: Machine, limit: float) -> Iterator[_Step]:
    images = config.training.batch_size // (config.training.accumulation * machine.devices)
    if images > 1:
        yield "training.accumulation", _accumulation(config, counted, machine, limit, images), "nothing"
    if machine.low is None and machine.kind == "cuda":
        yield "runtime.precision", "bf16", "faster; losses differ in the third digit"
    section = "autoencoder" if isinstance(config, Stage1Config) else "unet"
    if not getattr(config, section).gradient_checkpointing and not _is_vq(config):
        yield f"{section}.gradient_checkpointing", True, "the same result, a third slower"


def _smaller_phase(name: str, counted: Count, machine: Machine, limit: float) -> Iterator[_Step]:
    """Fewer images at once in what takes more memory than the step."""
    phase = counted.phases[name]
    if phase.key is None or phase.at_once == 1:
        return
    resting = counted.weights + counted.average + (0 if phase.before else counted.optimiser)
    over = peak_of(counted, machine) - limit
    share = max(0.0, 1 - over / max(1, phase.peak - resting))
    yield phase.key, max(1, int(share * phase.at_once)), f"nothing; against the {name}"


def _accumulation(config: RunConfig, counted: Count, machine: Machine, limit: float, images: int) -> int:
    """The least that should do, by activations in proportion to the images; else one image at once."""
    resting = peak_of(counted, machine) - counted.activations
    room = max(0.0, limit - resting) / max(1, counted.activations) * images
    possible = [size for size in range(1, images) if images % size == 0 and size <= room]
    return config.training.accumulation * (images // max(possible, default=1))


def _is_vq(config: RunConfig) -> bool:
    return isinstance(config, Stage1Config) and config.autoencoder.kind == "vq"


def with_value(config: Any, key: str, value: Any) -> Any:
    """The config with the value at a dotted key replaced."""
    name, _, rest = key.partition(".")
    return replace(config, **{name: with_value(getattr(config, name), rest, value) if rest else value})


def _written(value: Any) -> str:
    if isinstance(value, LoraConfig):
        return f"{{rank: {value.rank}}}"
    return str(value).lower() if isinstance(value, bool) else str(value)
