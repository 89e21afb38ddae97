"""Guidance wraps a denoiser and is one itself, so the sampling loop never sees it."""

from __future__ import annotations

import difflib
import math
import re
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass
from itertools import pairwise
from numbers import Real

import torch
from torch import Tensor

from conditioning.conditions import CONDITIONS, Conditions
from ldm.errors import UserError
from ldm.noise import NoiseSchedule
from ldm.projected_guidance import ApgOptions, ProjectedGuidance, rescale

Denoiser = Callable[[Tensor, Tensor, Conditions], Tensor]
"""(latents [B, C, h, w], timesteps [B], conditions of B) -> the network's prediction [B, C, h, w]."""
EVERYWHERE = (0.0, 1.0)
"""The interval that holds every timestep."""
ROUNDING = 1e-6
"""t / T of a flow timestep is float32: 0.30000001 still lies in an interval that ends at 0.3."""


@dataclass(frozen=True, kw_only=True)
class GuidanceOptions:
    """What may be changed about guidance besides its scales.

    `interval`: guide only where t / T (1 is pure noise) lies in it, ends included; elsewhere the conditional prediction
    stands alone, for one evaluation (arXiv 2404.07724, which gives the interval in sigma). `rescale`: phi of
    arXiv 2305.08891, eq. 16, 0 to 1; that paper takes 0.7. `apg`: adaptive projected guidance, or None.

    Raises ValueError, field first.
    """

    interval: tuple[float, float] = EVERYWHERE
    rescale: float = 0.0
    apg: ApgOptions | None = None

    def __post_init__(self) -> None:
        if len(self.interval) != 2 or not 0 <= self.interval[0] <= self.interval[1] <= 1:
            found = ", ".join(str(end) for end in self.interval)
            raise ValueError(f"interval: found {found}; allowed is two rising numbers in 0 to 1; 0, 1 is always")
        if not 0 <= self.rescale <= 1:
            raise ValueError(f"rescale: found {self.rescale}; allowed is 0 to 1; 0 turns it off, 0.7 is usual")


class Guidance:
    """Steers a denoiser towards its conditions, each with its own scale.

    With e_k the prediction that is told the first k of n conditions (e_0 of none, e_n of all) and scales s_k,

        output = e_0 + sum_k s_k (e_k - e_{k-1})          (k = 1 to n)
               = sum_k c_k e_k,   c_0 = 1 - s_1,   c_k = s_k - s_{k+1},   c_n = s_n

    which is InstructPix2Pix (arXiv 2211.09800, eq. 3) for any number of conditions. With one it is classifier-free
    guidance (arXiv 2207.12598, eq. 6; their w is the scale - 1) as diffusers and Stable Diffusion write it. Scale 1 is
    the conditional prediction and 0 the unconditional one; equal scales guide by these conditions as if they were one.
    The formula is linear, so it holds for noise, v, x_0 or flow predictions alike.

    The network is called once a step, with a batch of B for each e_k whose c_k is not 0 (and e_n for rescale and APG),
    in rising order of k: B alone if all scales are 1, 2 B if all are equal, at most (n + 1) B.

    With APG, which works on x_0 predictions, output = e_n + W apg(sum_k (s_k - 1) / W (e_k - e_{k-1})) where W is the
    largest |s_k - 1|: the paper's formula for one condition, and the sum above where APG changes nothing. APG remembers
    earlier steps, so make one instance for each sampling run.
    """

    def __init__(
        self,
        denoiser: Denoiser,
        without: Sequence[Conditions],
        scales: Sequence[float],
        options: GuidanceOptions | None = None,
        *,
        noise_schedule: NoiseSchedule | None = None,
    ) -> None:
        """Take the chain of conditions, all but its last link, which comes with each call.

        Args:
            without: n of them: at k the first k conditions are left and the others absent or negative, so nothing is
                left at 0. Each a batch of B, or of 1 for all.
            scales: n of them, the values of `resolve_scales`, in the same order.
            options: None is plain guidance at every timestep.
            noise_schedule: the one that the network was trained with; only an interval (for T) and APG need it.

        Raises:
            UserError: for a scale that is none.
            ValueError: unless there are as many scales as conditions, and a noise schedule where it is needed.
        """
        if len(without) != len(scales):
            raise ValueError(f"guidance: found {len(without)} conditions and {len(scales)} scales; allowed is as many")
        for scale in scales:
            check_guidance_scale(scale)
        self.denoiser = denoiser
        self.without = tuple(without)
        self.scales = tuple(float(scale) for scale in scales)
        self.options = options or GuidanceOptions()
        self.noise_schedule = noise_schedule
        self.needed = needed_predictions(self.scales, self.options)
        if noise_schedule is None and (self.options.apg or self.options.interval != EVERYWHERE):
            raise ValueError("noise_schedule: found None; an interval and APG need the network's own; give it")
        self._apg = ProjectedGuidance(self.options.apg, noise_schedule) if self.options.apg and noise_schedule else None

    @property
    def evaluations_per_step(self) -> int:
        """Evaluations of the network for each image and timestep inside the interval; outside it is one."""
        return len(self.needed)

    def __call__(self, latents: Tensor, timesteps: Tensor, conditions: Conditions) -> Tensor:
        """The guided prediction [B, C, h, w], float32, for latents [B, C, h, w], timesteps [B], conditions of B or 1.

        Raises ValueError when the timesteps lie inside the interval for some samples and outside for others.
        """
        full = len(self.scales)
        needed = self.needed if self._guides_at(timesteps) else (full,)
        outputs = self._evaluate(needed, latents, timesteps, [*self.without, conditions])
        if len(needed) == 1:
            return outputs[0]
        # Between two neighbours that are needed all scales are equal, so their differences add up to one.
        scales = [self.scales[k - 1] for k in needed[1:]]
        differences = [after - before for before, after in pairwise(outputs)]
        if self._apg is None:
            guided = _weighted_sum(outputs[0], scales, differences)
        else:
            guided = self._project(self._apg, outputs[-1], scales, differences, latents, timesteps)
        return rescale(guided, outputs[-1], self.options.rescale) if self.options.rescale else guided

    def _evaluate(
        self, needed: Sequence[int], latents: Tensor, timesteps: Tensor, chain: Sequence[Conditions]
    ) -> list[Tensor]:
        """The predictions e_k for k in `needed`, [B, C, h, w] float32 each, by one call of the network."""
        told = [_batch_of(chain[k], len(latents)) for k in needed]
        if len(told) == 1:
            output = self.denoiser(latents, timesteps, told[0])
        else:
            repeated = torch.cat([latents] * len(told)), torch.cat([timesteps] * len(told))
            output = self.denoiser(*repeated, Conditions.cat(told))  # [len(needed) * B, C, h, w]
        # Large scales times small differences: half precision would lose the digits that matter.
        output = output.to(torch.promote_types(output.dtype, torch.float32))
        return list(output.chunk(len(told)))

    @staticmethod
    def _project(
        apg: ProjectedGuidance,
        conditional: Tensor,
        scales: Sequence[float],
        differences: Sequence[Tensor],
        latents: Tensor,
        timesteps: Tensor,
    ) -> Tensor:
        strength = max(abs(scale - 1) for scale in scales)
        weights = [(scale - 1) / strength for scale in scales]
        direction = _weighted_sum(torch.zeros_like(conditional), weights, differences)
        return conditional + strength * apg(direction, conditional, latents.to(conditional.dtype), timesteps)

    def _inside(self, timestep: float) -> bool:
        if self.noise_schedule is None or self.options.interval == EVERYWHERE:
            return True
        low, high = self.options.interval
        return low - ROUNDING <= timestep / self.noise_schedule.config.timesteps <= high + ROUNDING

    def _guides_at(self, timesteps: Tensor) -> bool:
        if self.options.interval == EVERYWHERE:
            return True  # without waiting for the device to tell the timesteps
        inside = {self._inside(timestep) for timestep in timesteps.tolist()}
        if len(inside) > 1:
            raise ValueError("timesteps: found some in the guidance interval and some not; allowed is all or none")
        return inside == {True}


def needed_predictions(scales: Sequence[float], options: GuidanceOptions) -> tuple[int, ...]:
    """Which e_k of `Guidance` the network must evaluate inside the interval, rising; 0 is the one told nothing."""
    full = len(scales)
    needed = {k for k, (left, right) in enumerate(pairwise([1, *scales, 0])) if left != right}  # c_k = left - right
    if options.rescale or options.apg:
        needed.add(full)
    return tuple(sorted(needed))


def _weighted_sum(start: Tensor, weights: Sequence[float], terms: Sequence[Tensor]) -> Tensor:
    return sum((weight * term for weight, term in zip(weights, terms, strict=True)), start=start)


def _batch_of(conditions: Conditions, size: int) -> Conditions:
    parts = (conditions.context, conditions.spatial, conditions.class_embedding)
    if size != 1 and any(part is not None and len(part) == 1 for part in parts):
        return conditions.repeat_interleave(size)
    return conditions


def resolve_scales(guidance_scale: float | Mapping[str, float], given: Collection[str]) -> dict[str, float]:
    """The scale of every condition in `given` (names in CONDITIONS), in the order of CONDITIONS.

    One number is for all of them except inpainting, which gets 1: Stable Diffusion keeps mask and masked image in both
    branches, and models are trained for that. Conditions that a mapping does not name get 1, which is no guidance.
    Raises UserError for a scale that is none and for the name of a condition that is not given.
    """
    check_guidance_scale(guidance_scale)
    unknown = set(given) - set(CONDITIONS)
    if unknown:
        raise ValueError(f"given: found {', '.join(sorted(unknown))}; allowed is {', '.join(CONDITIONS)}")
    names = [name for name in CONDITIONS if name in given]
    if not isinstance(guidance_scale, Mapping):
        return {name: 1.0 if name == "inpainting" else float(guidance_scale) for name in names}
    for name in guidance_scale:
        if name not in names:
            raise _unknown_name(name, names)
    return {name: float(guidance_scale.get(name, 1)) for name in names}


def check_guidance_scale(guidance_scale: float | Mapping[str, float]) -> None:
    """Raise UserError unless each scale is a finite number of 0 or more and each name is in CONDITIONS."""
    if not isinstance(guidance_scale, Mapping):
        _check_number("guidance_scale", guidance_scale)
        return
    for name, scale in guidance_scale.items():
        if name not in CONDITIONS:
            raise _unknown_name(name, CONDITIONS)
        _check_number(f"guidance_scale {name}", scale)


def parse_guidance_scale(text: str) -> float | dict[str, float]:
    """The guidance scale as a command line has it: "7", or "text=7,semantic=2", or that with spaces for the comma.

    Raises UserError, in one line and with the nearest name, for what is neither.
    """
    words = re.sub(r"\s*=\s*", "=", text).replace(",", " ").split()
    scale: float | dict[str, float]
    if len(words) == 1 and "=" not in words[0]:
        scale = _number(words[0])
    else:
        scale = {}
        for word in words:
            name, equals, value = word.partition("=")
            if not equals:
                raise UserError(
                    f"guidance_scale: found {word!r} in {text!r}; allowed is one number, or NAME=NUMBER,..."
                )
            if name in scale:
                raise UserError(f"guidance_scale: found {name} twice in {text!r}; allowed is once; take one out")
            scale[name] = _number(value)
        if not scale:
            raise UserError("guidance_scale: found nothing; allowed is one number, or NAME=NUMBER,...; 1 turns it off")
    check_guidance_scale(scale)
    return scale


def _number(text: str) -> float:
    try:
        return float(text)
    except ValueError:
        found = f"guidance_scale: found {text!r}; allowed is one number, or NAME=NUMBER,..., e.g. text=7,semantic=2"
        raise UserError(found) from None


def _check_number(field: str, scale: object) -> None:
    if not (isinstance(scale, Real) and 0 <= float(scale) < math.inf):
        raise UserError(f"{field}: found {scale}; allowed is 0 or more; 1 turns guidance off")


def _unknown_name(name: str, allowed: Sequence[str]) -> UserError:
    names = ", ".join(allowed) or "none"
    if name in CONDITIONS:
        return UserError(f"guidance_scale: found {name}, a condition that is not given; allowed is {names}")
    close = difflib.get_close_matches(str(name), allowed, n=1, cutoff=0.5)
    hint = f"; did you mean {close[0]}?" if close else ""
    return UserError(f"guidance_scale: found {name!r}; allowed is {names}{hint}")
