"""Guidance wraps a denoiser and is one itself, so the sampling loop never sees it."""

from __future__ import annotations

import math
from collections.abc import Callable

import torch
from torch import Tensor

from conditioning.conditions import Conditions
from ldm.errors import UserError

Denoiser = Callable[[Tensor, Tensor, Conditions], Tensor]
"""(latents [B, C, h, w], timesteps [B], conditions of B) -> the network's prediction [B, C, h, w]."""


class ClassifierFreeGuidance:
    """Steers a denoiser away from the unconditional prediction.

    Ho & Salimans 2022 (arXiv 2207.12598, eq. 6) in the form that diffusers and Stable Diffusion use:

        output = unconditional + guidance_scale * (conditional - unconditional)

    Their w is `guidance_scale - 1`. Scale 1 is the conditional prediction itself and 0 the unconditional one. The
    formula is linear, so it may be applied to noise, v, x_0 or flow predictions alike.

    Evaluations of the network per call: one of batch B at scale 1, else one of batch 2 B, unconditional half first.
    """

    def __init__(self, denoiser: Denoiser, unconditional: Conditions, guidance_scale: float) -> None:
        """`unconditional`: what to steer away from (the empty or negative prompt), a batch of B, or of 1 for all."""
        check_guidance_scale(guidance_scale)
        self.denoiser = denoiser
        self.unconditional = unconditional
        self.guidance_scale = guidance_scale

    def __call__(self, latents: Tensor, timesteps: Tensor, conditions: Conditions) -> Tensor:
        """The guided prediction [B, C, h, w] for latents [B, C, h, w], timesteps [B] and conditions of B."""
        if self.guidance_scale == 1:
            return self.denoiser(latents, timesteps, conditions)
        both = Conditions.cat([self._unconditional_for(len(latents)), conditions])
        output = self.denoiser(torch.cat([latents, latents]), torch.cat([timesteps, timesteps]), both)
        unconditional, conditional = output.chunk(2)  # [B, C, h, w] each
        return unconditional + self.guidance_scale * (conditional - unconditional)

    def _unconditional_for(self, batch_size: int) -> Conditions:
        if len(self.unconditional) == 1:
            return self.unconditional.repeat_interleave(batch_size)
        return self.unconditional


def check_guidance_scale(guidance_scale: float) -> None:
    """Raise UserError unless the scale is a finite number of 0 or more."""
    if not (math.isfinite(guidance_scale) and guidance_scale >= 0):
        raise UserError(f"guidance_scale: found {guidance_scale}; allowed is 0 or more; 1 turns guidance off")
