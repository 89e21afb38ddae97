"""From noise to latents: diffusers' schedulers and the one loop that runs them."""

from __future__ import annotations

import difflib
import inspect
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from diffusers import (
    DDIMScheduler,
    DDPMScheduler,
    DPMSolverMultistepScheduler,
    EulerDiscreteScheduler,
    FlowMatchEulerDiscreteScheduler,
    FlowMatchHeunDiscreteScheduler,
    HeunDiscreteScheduler,
    SchedulerMixin,
    UniPCMultistepScheduler,
)
from torch import Tensor

from conditioning.conditions import Conditions
from ldm.errors import UserError, user_input
from ldm.guidance import Denoiser
from ldm.noise import NoiseConfig, beta_arguments

SCHEDULERS: dict[str, type[SchedulerMixin]] = {
    "ddpm": DDPMScheduler,  # stochastic, arXiv 2006.11239
    "ddim": DDIMScheduler,  # arXiv 2010.02502
    "euler": EulerDiscreteScheduler,  # arXiv 2206.00364, first order
    "heun": HeunDiscreteScheduler,  # the same, second order: two evaluations a step
    "dpm++": DPMSolverMultistepScheduler,  # DPM-Solver++ 2M, arXiv 2211.01095
    "unipc": UniPCMultistepScheduler,  # arXiv 2302.04867
}
FLOW_SCHEDULERS: dict[str, type[SchedulerMixin]] = {
    "euler": FlowMatchEulerDiscreteScheduler,
    "heun": FlowMatchHeunDiscreteScheduler,
    "dpm++": DPMSolverMultistepScheduler,
    "unipc": UniPCMultistepScheduler,
}
StepCallback = Callable[[int, Tensor, Tensor], Tensor | None]
"""(index of the step, timestep, latents after it) -> latents to go on with, or None to leave them."""


def make_scheduler(name: str, noise_config: NoiseConfig) -> SchedulerMixin:
    """The diffusers scheduler called `name` (a key of SCHEDULERS) for a model trained with `noise_config`.

    The betas are those of the training. Timesteps are spaced "trailing": the first step starts at the last, noisiest
    timestep, where the initial noise belongs; "leading", Stable Diffusion's old default, misses it (arXiv 2305.08891).
    The last step goes to zero noise (but see `sample` for DDIM), and x_0 is never clipped. Heun on the cosine schedule
    is the exception and is spaced "leading": its trapezoid from that schedule's last sigma, 20,000, to the next, about
    10, misses the ODE by 0.8 of the data's standard deviation (20 steps, Gaussian data, measured).

    Raises UserError for an unknown name and for a scheduler that cannot run the model: zero terminal SNR needs one that
    rescales its betas (not heun), flow one of FLOW_SCHEDULERS (not ddpm, not ddim).
    """
    check_scheduler_name(name)
    if noise_config.prediction == "flow":
        return _flow_scheduler(name, noise_config)
    scheduler_class = SCHEDULERS[name]
    arguments = beta_arguments(noise_config) | {
        "prediction_type": noise_config.prediction,
        "timestep_spacing": "leading" if name == "heun" and noise_config.schedule == "cosine" else "trailing",
        "steps_offset": 1,  # of "leading"; diffusers' pipeline complains about any other value
        "clip_sample": False,
        "set_alpha_to_one": True,  # DDIM: the last step returns x_0 rather than x_0 at the first noise level
    }
    if noise_config.zero_terminal_snr and not _takes(scheduler_class.__init__, "rescale_betas_zero_snr"):
        able = [key for key, value in SCHEDULERS.items() if _takes(value.__init__, "rescale_betas_zero_snr")]
        raise UserError(f"scheduler: found {name} for a model with zero terminal SNR; allowed is {', '.join(able)}")
    return scheduler_class(**{key: value for key, value in arguments.items() if _takes(scheduler_class.__init__, key)})


def _flow_scheduler(name: str, noise_config: NoiseConfig) -> SchedulerMixin:
    if name not in FLOW_SCHEDULERS:
        raise UserError(f"scheduler: found {name} for a flow model; allowed is {', '.join(FLOW_SCHEDULERS)}")
    scheduler_class, steps, shift = FLOW_SCHEDULERS[name], noise_config.timesteps, noise_config.flow_shift
    if _takes(scheduler_class.__init__, "use_flow_sigmas"):
        return scheduler_class(
            num_train_timesteps=steps, prediction_type="flow_prediction", use_flow_sigmas=True, flow_shift=shift
        )
    return scheduler_class(num_train_timesteps=steps, shift=shift)


def scheduler_name(scheduler: SchedulerMixin) -> str:
    """The key of SCHEDULERS that makes this scheduler's class; a class of diffusers beyond those gives its own name."""
    for name, scheduler_class in [*SCHEDULERS.items(), *FLOW_SCHEDULERS.items()]:
        if type(scheduler) is scheduler_class:
            return name
    return type(scheduler).__name__


def check_scheduler_name(name: str) -> None:
    """Raise UserError, with the nearest valid name, unless `name` is a key of SCHEDULERS."""
    if name not in SCHEDULERS:
        close = difflib.get_close_matches(name, SCHEDULERS, n=1, cutoff=0.5)
        hint = f"; did you mean {close[0]}?" if close else ""
        raise UserError(f"scheduler: found {name!r}; allowed is {', '.join(SCHEDULERS)}{hint}")


def noise_config_of(scheduler: SchedulerMixin) -> NoiseConfig:
    """The noise that a diffusers scheduler was configured for, so that another can be made for the same model.

    Raises UserError when the configuration says something that NoiseConfig cannot (explicit or unusual betas).
    """
    config = scheduler.config
    flow_matching = isinstance(scheduler, FlowMatchEulerDiscreteScheduler | FlowMatchHeunDiscreteScheduler)
    if flow_matching or config.get("use_flow_sigmas"):
        shift = config.shift if flow_matching else config.flow_shift
        return NoiseConfig(
            schedule="flow", prediction="flow", timesteps=config.num_train_timesteps, flow_shift=float(shift)
        )
    schedule = {"squaredcos_cap_v2": "cosine"}.get(config.beta_schedule, config.beta_schedule)
    with user_input(f"the noise schedule of {type(scheduler).__name__}"):
        if config.get("trained_betas") is not None:
            raise ValueError("trained_betas: found a list; allowed is a named schedule; use the folder's own scheduler")
        return NoiseConfig(
            schedule=schedule,
            prediction=config.get("prediction_type", "epsilon"),
            timesteps=config.num_train_timesteps,
            beta_start=config.beta_start,
            beta_end=config.beta_end,
            zero_terminal_snr=bool(config.get("rescale_betas_zero_snr", False)),
        )


def initial_latents(generators: Sequence[torch.Generator], shape: Sequence[int]) -> Tensor:
    """Standard normal noise [len(generators), *shape], float32, on the CPU; image i is drawn by generator i alone."""
    return torch.stack([torch.randn(*shape, generator=generator) for generator in generators])


def set_timesteps(scheduler: SchedulerMixin, num_inference_steps: int, device: torch.device | str = "cpu") -> Tensor:
    """Prepare `scheduler` for one run and return its timesteps: one a step; Heun's has two a step, less one.

    Raises UserError when the number of steps is not one that the scheduler can do.
    """
    most = scheduler.config.num_train_timesteps
    if not 1 <= num_inference_steps <= most:
        raise UserError(f"num_inference_steps: found {num_inference_steps}; allowed is 1 to {most}")
    if isinstance(scheduler, FlowMatchEulerDiscreteScheduler):
        # Its own grid spends the last step on the way from sigma 1 / T to 0; diffusers' Flux pipeline passes this one.
        sigmas = np.linspace(1, 1 / num_inference_steps, num_inference_steps).tolist()
        scheduler.set_timesteps(sigmas=sigmas, device=device)
    else:
        scheduler.set_timesteps(num_inference_steps, device=device)
    if scheduler.timesteps.min() < 0:
        # diffusers' "trailing" is an arange with a fractional step: for a few counts rounding makes one step too many.
        raise UserError(
            f"num_inference_steps: found {num_inference_steps}, for which {type(scheduler).__name__} makes a timestep "
            f"below 0 (a rounding error in diffusers); take {num_inference_steps - 1} or {num_inference_steps + 1}"
        )
    return scheduler.timesteps


def starting_step(num_inference_steps: int, strength: float) -> int:
    """How many of the steps `strength` in (0, 1] leaves out: 1 takes them all, 0.3 the last 30 % (as in diffusers).

    Raises UserError when none would be left.
    """
    if not 0 < strength <= 1:
        raise UserError(f"strength: found {strength}; allowed is above 0 up to 1; 0.5 keeps the outlines, 1 nothing")
    taken = min(int(num_inference_steps * strength + 1e-9), num_inference_steps)
    if taken == 0:
        raise UserError(
            f"strength: found {strength} with {num_inference_steps} steps, which leaves none; "
            f"allowed is {1 / num_inference_steps:.3g} or more; raise the strength or the steps"
        )
    return num_inference_steps - taken


def noised(noise_scheduler: SchedulerMixin, latents: Tensor, noise: Tensor, timestep: Tensor) -> Tensor:
    """x_t of x_0 `latents` [B, C, h, w] at a timestep of the prepared scheduler, in that scheduler's own scaling."""
    timesteps = timestep.expand(len(latents))
    if hasattr(noise_scheduler, "scale_noise"):  # the flow matching classes
        return noise_scheduler.scale_noise(latents, timesteps, noise)
    return noise_scheduler.add_noise(latents, noise, timesteps)


@dataclass(frozen=True)
class Known:
    """What is known of the result: image-to-image starts from it, blending keeps it outside the mask.

    Attributes:
        latents: x_0 of the given picture, [B, C, h, w], as the U-Net sees latents.
        strength: the share of the steps that is taken, (0, 1]; 1 starts from noise alone.
        mask: [B, 1, h, w]; where it is 0 every step ends at the known latents, noised (arXiv 2201.09865, eq. 8, without
            its resampling). None keeps nothing.
    """

    latents: Tensor
    strength: float = 1.0
    mask: Tensor | None = None


@torch.no_grad()
def sample(
    denoiser: Denoiser,
    noise_scheduler: SchedulerMixin,
    noise: Tensor,
    conditions: Conditions,
    num_inference_steps: int,
    generators: Sequence[torch.Generator] | torch.Generator,
    callback: StepCallback | None = None,
    known: Known | None = None,
) -> Tensor:
    """Denoise standard normal `noise` [B, C, h, w] in `num_inference_steps` steps; returns x_0, float32.

    `denoiser(latents, timesteps [B], conditions)` returns what the network predicts; guidance, if any, is in it.
    `generators` (one an image, on the CPU) draw the noise of stochastic schedulers, so that an image does not depend
    on its batch; a single generator draws for the whole batch, as in diffusers. The latents stay float32 whatever the
    network computes in: Euler's have a standard deviation of 20,000 at the start of the cosine schedule, and even in
    float32 that costs it digits: its images repeat to 1e-4 on another machine, where the others' repeat to 1e-5.

    diffusers' DDIM leaves the noise of timestep 0 in the result (sigma 0.006 with the cosine schedule, 0.03 with Stable
    Diffusion's) when T / steps rounds upwards, as with 15 or 60 of 1000; 10, 20, 25, 30, 40, 50 and 100 are exact.
    """
    timesteps = set_timesteps(noise_scheduler, num_inference_steps, noise.device)
    skipped = 0
    if known is not None:
        skipped = starting_step(num_inference_steps, known.strength) * getattr(noise_scheduler, "order", 1)
        timesteps = timesteps[skipped:]
        if hasattr(noise_scheduler, "set_begin_index"):
            noise_scheduler.set_begin_index(skipped)
    if known is None or skipped == 0:
        latents = noise.float() * getattr(noise_scheduler, "init_noise_sigma", 1.0)  # flow's schedulers have none
    else:
        latents = noised(noise_scheduler, known.latents.float(), noise.float(), timesteps[:1])
    options: dict[str, Any] = {"generator": generators} if _takes(noise_scheduler.step, "generator") else {}
    scale = getattr(noise_scheduler, "scale_model_input", lambda sample, timestep: sample)
    for step, t in enumerate(timesteps):
        inputs = scale(latents, t)
        output = denoiser(inputs, t.expand(len(latents)), conditions).float()  # [B, C, h, w]
        latents = noise_scheduler.step(output, t, latents, return_dict=False, **options)[0]
        if known is not None and known.mask is not None:
            latents = _blended(noise_scheduler, latents, known, known.mask, noise, timesteps[step + 1 : step + 2])
        if callback is not None:
            changed = callback(step, t, latents)
            latents = latents if changed is None else changed
    return latents


def _blended(
    scheduler: SchedulerMixin, latents: Tensor, known: Known, mask: Tensor, noise: Tensor, following: Tensor
) -> Tensor:
    """`latents` inside the mask, the known ones outside, as noisy as the `following` timestep (none: the end)."""
    kept = known.latents.float()
    if len(following):
        kept = noised(scheduler, kept, noise.float(), following)
    return torch.where(mask > 0, latents, kept)


def _takes(function: Callable[..., Any], parameter: str) -> bool:
    return parameter in inspect.signature(function).parameters
