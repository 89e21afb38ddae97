"""A training that goes wrong without breaking: said in plain words, each once, with what one may do.

Only numbers are looked at that the loop has read already. Nothing is kept in checkpoints: what a run that goes on
knows, it learns anew.
"""

from __future__ import annotations

import math
from collections import deque
from collections.abc import Callable, Mapping

import numpy as np

from autoencoder.discriminator import GREATEST_ADAPTIVE_WEIGHT

_OF_NO_USE = {
    "wins": (
        "the discriminator has told reconstructions from images without a mistake (its loss is 0), so it teaches the "
        "decoder nothing: lower discriminator_optimiser.lr or discriminator.channels, or let the autoencoder get "
        "better first (discriminator.start_step)"
    ),
    "blind": (
        "the discriminator has not told reconstructions from images at all (both have the same logits): raise "
        "discriminator_optimiser.lr or discriminator.channels; if the reconstructions are as wanted, all is well"
    ),
    "unheard": (
        "the adversarial weight has been at its ceiling, as next to no gradient of the discriminator reaches the "
        "decoder: lower discriminator_optimiser.lr, or set discriminator.adaptive: false with a small "
        "discriminator.weight"
    ),
}


class LossSpike:
    """Hears the loss of every step and tells once that it stays far above what it was.

    The last `recent` values are compared with the `reference` ones before them: their median must exceed the median
    there by `deviations` robust standard deviations (1.4826 x the median absolute deviation) of a single value and by
    `share` of its size. A median of 25 values varies a quarter as much as one value, so noise does not reach that, and
    a loss that falls moves away from it.
    """

    def __init__(
        self, *, reference: int = 400, recent: int = 25, least: int = 100, deviations: float = 4.0, share: float = 0.2
    ) -> None:
        self._before: deque[float] = deque(maxlen=reference)
        self._now: deque[float] = deque(maxlen=recent)
        self._recent, self._least = recent, least
        self._deviations, self._share = deviations, share
        self._heard = 0
        self._told = False

    def hear(self, loss: float) -> str | None:
        """What to tell the user, None if nothing or told before."""
        if self._told:
            return None
        if len(self._now) == self._recent:
            self._before.append(self._now[0])
        self._now.append(loss)
        self._heard += 1
        if len(self._before) < self._least or self._heard % self._recent:
            return None
        before, now = np.array(self._before), float(np.median(self._now))
        middle = float(np.median(before))
        deviation = 1.4826 * float(np.median(np.abs(before - middle)))
        if now <= middle + max(self._deviations * deviation, self._share * abs(middle)):
            return None
        self._told = True
        return (
            f"the loss has risen from about {middle:.4g} to {now:.4g} and stays there: lower optimiser.lr or "
            "optimiser.clip and go on from the checkpoint before, if it does not fall again by itself"
        )


class AdversaryWatch:
    """Hears the values of every step of stage 1, and tells once each in what way the discriminator is of no use."""

    def __init__(self, *, loss: str, weight: float, stretch: int = 500) -> None:
        """`loss` is hinge or vanilla and `weight` that of the config; `stretch`: how many steps are looked at."""
        self._blind = {"hinge": 1.0, "vanilla": math.log(2)}[loss]  # where all logits are 0
        self._ceiling = GREATEST_ADAPTIVE_WEIGHT * weight
        self._stretch = stretch
        self._last: deque[tuple[float, float, float]] = deque(maxlen=stretch)
        self._heard = 0
        self._told: set[str] = set()

    def hear(self, values: Mapping[str, float]) -> list[str]:
        """What to tell the user."""
        if "discriminator" not in values:
            return []
        gap = values["logits_real"] - values["logits_fake"]
        self._last.append((values["discriminator"], gap, values.get("adversarial_weight", 0.0)))
        self._heard += 1
        if self._heard % (self._stretch // 10) or len(self._last) < self._stretch:
            return []
        loss, gap, weight = np.median(np.array(self._last), axis=0)
        now = {
            "wins": loss < 0.005 * self._blind,
            "blind": abs(loss - self._blind) < 0.01 * self._blind and abs(gap) < 0.02,
            "unheard": weight >= 0.99 * self._ceiling > 0,
        }
        new = [name for name, true in now.items() if true and name not in self._told]
        self._told.update(new)
        return [f"for {self._stretch} steps {_OF_NO_USE[name]}" for name in new]


class Alarms:
    """All that one training is watched for; hears the values of every step, and says what it finds."""

    def __init__(self, say: Callable[[str], None], adversary: AdversaryWatch | None = None) -> None:
        self._say, self._spike, self._adversary = say, LossSpike(), adversary

    def hear(self, step: int, values: Mapping[str, float]) -> None:
        """`values` are those of update number `step` (from 0)."""
        # In stage 1 the loss changes its meaning when the adversary sets in; what it is made of does not.
        found = self._spike.hear(values.get("reconstruction", values["loss"]))
        lines = [found] if found is not None else []
        lines += self._adversary.hear(values) if self._adversary is not None else []
        for line in lines:
            self._say(f"warning: step {step}: {line}")
