"""One trained module with its optimiser, learning rate and moving average."""

from __future__ import annotations

import importlib.util
import math
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, Literal

import torch
from accelerate import Accelerator
from diffusers.training_utils import EMAModel
from torch import Tensor, nn

from ldm.errors import UserError, user_input
from ldm.training.finite import greatest_weight


@dataclass(frozen=True, kw_only=True)
class OptimiserConfig:
    """AdamW and its learning-rate schedule.

    `adamw8bit` keeps both moments in 8 bits (arXiv 2110.02861), a quarter of the memory; it is bitsandbytes' and needs
    the extra `adam8bit`. `lr` is used as it is written: nothing multiplies it by processes or batch size.
    `text_lr_ratio` is the share of it that a text encoder gets which is trained with the U-Net: the U-Net learns what a
    word means the sooner the less the words' contexts move meanwhile.
    `warmup_steps` rise linearly from 0; then `schedule` leads from `lr` to `lr * final_lr_ratio` at the last step.
    """

    kind: Literal["adamw", "adamw8bit"] = "adamw"
    lr: float = 1e-4
    text_lr_ratio: float = 1.0
    betas: tuple[float, ...] = (0.9, 0.999)
    weight_decay: float = 0.01
    eps: float = 1e-8
    schedule: Literal["constant", "cosine", "linear"] = "constant"
    warmup_steps: int = 0
    final_lr_ratio: float = 0.0
    clip: float = 1.0  # largest norm of the whole gradient; 0 = no clipping

    def __post_init__(self) -> None:
        if self.lr <= 0:
            raise ValueError(f"lr: found {self.lr}; allowed is a number above 0")
        if len(self.betas) != 2 or not all(0 <= beta < 1 for beta in self.betas):
            raise ValueError(f"betas: found {list(self.betas)}; allowed are two numbers in [0, 1), e.g. [0.9, 0.999]")
        for name in ("text_lr_ratio", "weight_decay", "warmup_steps", "final_lr_ratio", "clip"):
            if getattr(self, name) < 0:
                raise ValueError(f"{name}: found {getattr(self, name)}; allowed is 0 or more")


def learning_rate(config: OptimiserConfig, step: int, steps: int) -> float:
    """The rate of update number `step` (from 0) out of `steps`: a pure function, so a resume needs no state."""
    if step < config.warmup_steps:
        return config.lr * (step + 1) / config.warmup_steps
    if config.schedule == "constant":
        return config.lr
    progress = min(1.0, (step - config.warmup_steps) / max(1, steps - config.warmup_steps))
    falling = 1 - progress if config.schedule == "linear" else (1 + math.cos(math.pi * progress)) / 2
    return config.lr * (config.final_lr_ratio + (1 - config.final_lr_ratio) * falling)


def build_optimiser(
    config: OptimiserConfig, parameters: Sequence[nn.Parameter], device: torch.device
) -> torch.optim.Optimizer:
    """The optimiser that `config` names, to work on `device`. Raises `UserError` if it is not installed here."""
    arguments: dict[str, Any] = {
        "lr": config.lr,
        "betas": (config.betas[0], config.betas[1]),
        "eps": config.eps,
        "weight_decay": config.weight_decay,
    }
    if config.kind == "adamw":
        return torch.optim.AdamW(parameters, fused=device.type in ("cpu", "cuda"), **arguments)
    if importlib.util.find_spec("bitsandbytes") is None:
        raise UserError(
            "optimiser.kind: found adamw8bit, for which bitsandbytes is not installed; pip install 'ldm[adam8bit]', or "
            "choose adamw"
        )
    with user_input("optimiser.kind: adamw8bit does not work here", ImportError, OSError, RuntimeError):
        from bitsandbytes.optim import AdamW8bit
    for parameter in parameters:
        # It walks over memory and makes weights contiguous at its first step, but their moments before that: with
        # channels-last weights a saved moment would not say which weight it belongs to.
        parameter.data = parameter.data.contiguous()
    return AdamW8bit(parameters, **arguments)


class Learner:
    """A module prepared for its device and processes, with everything that belongs to training it.

    `module` is the plain module (saved, evaluated); `wrapped` is what the training step must call, so that data
    parallelism sees every gradient. Only parameters with `requires_grad` at construction are trained.
    """

    def __init__(
        self,
        name: str,
        module: nn.Module,
        config: OptimiserConfig,
        accelerator: Accelerator,
        *,
        steps: int,
        ema_decay: float = 0.0,
    ) -> None:
        self.name, self.config, self.steps = name, config, steps
        self._accelerator = accelerator
        self._names, self._parameters = _trained(module)
        optimiser = build_optimiser(config, self._parameters, accelerator.device)
        self._split_off_text(optimiser)
        self.module = module
        self.wrapped, self.optimiser = accelerator.prepare(module, optimiser)
        self._names, self._parameters = _trained(module)
        self.ema = EMAModel(self._parameters, decay=ema_decay, foreach=True) if ema_decay > 0 else None

    def _split_off_text(self, optimiser: torch.optim.Optimizer) -> None:
        """Move the weights of a text encoder, which `_trained` puts last, into a group with a rate of their own.

        Raises `UserError` when such a rate is asked for and no text encoder is trained.
        """
        ratio, group = self.config.text_lr_ratio, optimiser.param_groups[0]
        group["lr_ratio"] = 1.0
        if ratio == 1.0:
            return
        number = sum(_is_text(name) for name in self._names)
        if number == 0:
            raise UserError(
                f"optimiser.text_lr_ratio: found {ratio}, but the {self.name} is trained with no text encoder; leave "
                "it out, or train one (conditions.text: encoder trained, or finetune)"
            )
        first = len(self._names) - number
        text, group["params"] = group["params"][first:], group["params"][:first]
        optimiser.add_param_group({"params": text, "lr_ratio": ratio})

    def clip_gradients(self) -> Tensor:
        """Clip to `config.clip` and return the norm before clipping, a scalar on the device (no host sync)."""
        largest = self.config.clip if self.config.clip > 0 else math.inf
        norm = self._accelerator.clip_grad_norm_(self._parameters, largest)
        return torch.as_tensor(norm, device=self._accelerator.device, dtype=torch.float32)

    def greatest_weight(self) -> Tensor:
        """The greatest |w|, a scalar on the device (no host sync); NaN or infinite if one weight is."""
        return greatest_weight(self._parameters)

    def update(self, step: int) -> None:
        """One optimiser step and, if there is one, one step of the moving average; clears the gradients."""
        for group in self.optimiser.param_groups:
            group["lr"] = learning_rate(self.config, step, self.steps) * group["lr_ratio"]
        self.optimiser.step()
        self.optimiser.zero_grad(set_to_none=True)
        if self.ema is not None:
            self.ema.step(self._parameters)

    @contextmanager
    def averaged_weights(self) -> Iterator[None]:
        """Inside, the module holds the moving average (its own weights if there is none)."""
        if self.ema is None:
            yield
            return
        self.ema.store(self._parameters)
        self.ema.copy_to(self._parameters)
        try:
            yield
        finally:
            self.ema.restore(self._parameters)

    def tensors(self) -> dict[str, dict[str, Tensor]]:
        """What a checkpoint keeps: file name -> tensor name -> tensor."""
        files = {
            self.name: {name: p.detach() for name, p in zip(self._names, self._parameters, strict=True)},
            f"{self.name}.optimiser": self._optimiser_tensors(),
        }
        if self.ema is not None:
            files[f"{self.name}.ema"] = dict(zip(self._names, self.ema.shadow_params, strict=True)) | {
                "optimization_step": torch.tensor(self.ema.optimization_step)
            }
        return files

    def load_tensors(self, files: Mapping[str, Mapping[str, Tensor]]) -> None:
        """The inverse of `tensors`; raises `UserError` if the checkpoint is of another model."""
        self._copy(files, self.name, self._parameters)
        self._load_optimiser(files[f"{self.name}.optimiser"])
        if self.ema is not None:
            self._copy(files, f"{self.name}.ema", self.ema.shadow_params)
            self.ema.optimization_step = int(files[f"{self.name}.ema"]["optimization_step"])

    def _copy(self, files: Mapping[str, Mapping[str, Tensor]], file: str, targets: list[nn.Parameter]) -> None:
        saved = files.get(file, {})
        with torch.no_grad():
            for name, target in zip(self._names, targets, strict=True):
                if name not in saved or saved[name].shape != target.shape:
                    found = tuple(saved[name].shape) if name in saved else "nothing"
                    raise UserError(
                        f"checkpoint {file}: found {found} for {name}, the config builds {tuple(target.shape)}; "
                        "resume with the config that made it, or start a new run with another out="
                    )
                target.copy_(saved[name])
        for name in sorted(saved.keys() - set(self._names) - {"optimization_step"}):
            raise UserError(
                f"checkpoint {file}: found {name}, which the config does not build; "
                "resume with the config that made it, or start a new run with another out="
            )

    def _optimiser_tensors(self) -> dict[str, Tensor]:
        state = self.optimiser.state
        return {
            f"{name}/{key}": _as_own_tensor(key, value)
            for name, parameter in zip(self._names, self._parameters, strict=True)
            for key, value in state.get(parameter, {}).items()
        }

    def _load_optimiser(self, saved: Mapping[str, Tensor]) -> None:
        parameters = dict(zip(self._names, self._parameters, strict=True))
        by_name: dict[str, dict[str, Tensor | int]] = {}
        for name, value in saved.items():
            parameter_name, key = name.rsplit("/", 1)
            restored = _laid_out_like(parameters[parameter_name], value)
            by_name.setdefault(parameter_name, {})[key] = int(value) if _is_count(value) else restored
        state = {i: by_name[name] for i, name in enumerate(self._names) if name in by_name}
        groups = self.optimiser.state_dict()["param_groups"]
        self.optimiser.load_state_dict({"state": state, "param_groups": groups})


def _as_own_tensor(key: str, value: Tensor | int) -> Tensor:
    """A state of an optimiser as safetensors holds it. AdamW8bit counts its steps in an int, and its code tables
    (`qmap`, 256 numbers) are one tensor for all weights, where a file may hold none twice."""
    if isinstance(value, int):
        return torch.tensor(value)
    return value.clone() if key.startswith("qmap") else value


def _is_count(value: Tensor) -> bool:
    """Whether it was an int (torch's AdamW counts in float32)."""
    return value.ndim == 0 and value.dtype == torch.int64


def _laid_out_like(parameter: Tensor, value: Tensor) -> Tensor:
    """`value` with the strides of `parameter`: fused AdamW walks over both in memory order, so channels-last weights
    with contiguous moments would pair the wrong elements."""
    if value.shape != parameter.shape:
        return value
    return torch.empty_like(parameter, dtype=value.dtype).copy_(value)


def _is_text(name: str) -> bool:
    return name.startswith("encoders.text.")


def _trained(module: nn.Module) -> tuple[list[str], list[nn.Parameter]]:
    named = [(name, parameter) for name, parameter in module.named_parameters() if parameter.requires_grad]
    named.sort(key=lambda item: _is_text(item[0]))  # stable: a text encoder's weights come last
    return [name for name, _ in named], [parameter for _, parameter in named]
