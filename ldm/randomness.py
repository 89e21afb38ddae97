"""Every random number is a function of named integers, never of what was drawn before (DESIGN.md 5).

A resume therefore needs no generator state, and one process or eight draw the same numbers.
"""

from __future__ import annotations

import hashlib
from collections.abc import Sequence

import torch
from torch import Tensor


def derive_seed(*parts: int | str) -> int:
    """Hash the parts to a 63-bit seed: `derive_seed(seed, "noise", step, position)`."""
    text = "\x1f".join(f"{type(part).__name__}:{part}" for part in parts)
    return int.from_bytes(hashlib.blake2b(text.encode(), digest_size=8).digest(), "little") >> 1


def generator_for(*parts: int | str) -> torch.Generator:
    """A CPU generator seeded by `derive_seed(*parts)`."""
    return torch.Generator().manual_seed(derive_seed(*parts))


def normal_for_each(positions: Sequence[int], shape: Sequence[int], *parts: int | str) -> Tensor:
    """Standard normal noise [len(positions), *shape]; row i depends on `parts` and `positions[i]` alone."""
    noise = torch.empty(len(positions), *shape)
    for row, position in zip(noise, positions, strict=True):
        row.normal_(generator=generator_for(*parts, position))
    return noise


def uniform_for_each(positions: Sequence[int], *parts: int | str) -> Tensor:
    """Uniform numbers in [0, 1), [len(positions)]; entry i depends on `parts` and `positions[i]` alone."""
    return torch.cat([torch.rand(1, generator=generator_for(*parts, position)) for position in positions])


def permuted_index(position: int, length: int, *parts: int | str) -> int:
    """Where `position` (0 <= position < length) goes in the pseudo-random permutation named by `parts`.

    A four-round Feistel network over the next even power of two, walked until it lands inside `length`: constant
    memory for any length, so a shuffle of ten million images costs nothing (Black & Rogaway 2002, cycle walking).
    """
    if not 0 <= position < length:
        raise ValueError(f"position {position} is outside 0..{length - 1}")
    half = max(1, ((length - 1).bit_length() + 1) // 2)
    mask = (1 << half) - 1
    keys = [derive_seed(*parts, "feistel", round_number) for round_number in range(4)]
    value = position
    while True:
        left, right = value >> half, value & mask
        for key in keys:
            left, right = right, left ^ (_mix(right ^ key) & mask)
        value = (left << half) | right
        if value < length:
            return value


def _mix(value: int) -> int:
    """The finaliser of splitmix64: every input bit reaches every output bit."""
    value &= (1 << 64) - 1
    value = ((value ^ (value >> 30)) * 0xBF58476D1CE4E5B9) & ((1 << 64) - 1)
    value = ((value ^ (value >> 27)) * 0x94D049BB133111EB) & ((1 << 64) - 1)
    return value ^ (value >> 31)


def seed_weights(seed: int) -> None:
    """Seed torch's global generator, from which fresh networks draw their weights."""
    torch.manual_seed(derive_seed(seed, "weights"))
