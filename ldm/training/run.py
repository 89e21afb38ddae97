"""A run: its folder, its processes, its numeric format, and where it starts."""

from __future__ import annotations

import sys
from dataclasses import dataclass
from datetime import timedelta
from pathlib import Path
from typing import TYPE_CHECKING, Literal, TextIO

import torch
from accelerate import Accelerator, DistributedDataParallelKwargs
from accelerate.utils import InitProcessGroupKwargs
from torch import nn

from ldm.attention import attention_that_ran
from ldm.device import choose_dtype
from ldm.files import writing
from ldm.picture import save_png
from ldm.training.checkpoint import Checkpoint, CheckpointFolder
from ldm.training.folder_lock import lock_folder
from ldm.training.ranks import other_processes

if TYPE_CHECKING:
    from diffusers import UNet2DConditionModel
    from PIL.Image import Image


@dataclass(frozen=True, kw_only=True)
class RuntimeConfig:
    """What a run uses of the machine; nothing here changes what is learned beyond rounding."""

    precision: Literal["auto", "fp32", "bf16"] = "auto"  # of the forward pass; weights and optimiser are always fp32
    channels_last: bool = True
    trackers: tuple[Literal["tensorboard", "wandb", "aim", "mlflow"], ...] = ("tensorboard",)


@dataclass(frozen=True)
class Run:
    """Where a training run lives and how it talks. Made by `open_run`."""

    folder: Path
    seed: int
    accelerator: Accelerator
    checkpoint: Checkpoint | None
    """What to continue from; None at the first start."""
    lock: TextIO | None = None
    """Keeps other runs out of the folder while it is open; None on processes other than the first."""

    @property
    def start_step(self) -> int:
        return self.checkpoint.step if self.checkpoint else 0

    def say(self, line: str) -> None:
        """One line to the person watching, once whatever the number of processes. Stdout is for results."""
        if self.accelerator.is_main_process:
            print(line, file=sys.stderr, flush=True)

    def close(self) -> None:
        """Part from the other processes once all are done."""
        self.accelerator.wait_for_everyone()
        self.accelerator.state.destroy_process_group()
        if self.lock is not None:
            self.lock.close()

    def save_picture(self, picture: Image, name: str) -> Path:
        """Write a picture into the run folder; call it on one process."""
        path = self.folder / name
        with writing(path):
            path.parent.mkdir(parents=True, exist_ok=True)
        save_png(picture, path)
        return path


def open_run(folder: Path, seed: int, runtime: RuntimeConfig, keep_checkpoints: int) -> Run:
    """Make the run folder, join the processes, and find the checkpoint to continue from."""
    with writing(folder):
        folder.mkdir(parents=True, exist_ok=True)
    accelerator = join_processes(folder, runtime)
    lock = lock_folder(folder) if accelerator.is_main_process else None
    run = Run(folder, seed, accelerator, CheckpointFolder(folder / "checkpoints", keep_checkpoints).latest(), lock)
    devices = f"{accelerator.num_processes} x {accelerator.device.type}"
    format_name = "bf16" if accelerator.mixed_precision == "bf16" else "fp32"
    start = f"going on from step {run.start_step}" if run.checkpoint else "a new run"
    if run.checkpoint and (note := other_processes(run.checkpoint.state, accelerator.num_processes)):
        run.say(note)
    run.say(f"{folder}: {start}, on {devices}, {format_name}, {torch.get_num_threads()} threads")
    return run


def join_processes(folder: Path, runtime: RuntimeConfig) -> Accelerator:
    """The processes of a run and their numeric format; nothing is written."""
    return Accelerator(
        cpu=not torch.accelerator.is_available(),  # unasked, accelerate takes each process of torchrun for a run alone
        mixed_precision="bf16" if _precision(runtime.precision) == torch.bfloat16 else "no",
        log_with=list(runtime.trackers) or None,
        project_dir=str(folder),
        # Buffers (noise schedules, position ids) are the same everywhere; broadcasting them each step is waste.
        kwargs_handlers=[
            DistributedDataParallelKwargs(broadcast_buffers=False),
            # The others wait while the first process validates and reports, which may take long at full size.
            InitProcessGroupKwargs(timeout=timedelta(hours=6)),
        ],
    )


def describe_parameters(name: str, module: nn.Module) -> str:
    """`unet: 8.8 M parameters, 8.8 M trained`."""
    total = sum(parameter.numel() for parameter in module.parameters())
    trained = sum(parameter.numel() for parameter in module.parameters() if parameter.requires_grad)
    return f"{name}: {total / 1e6:.2f} M parameters, {trained / 1e6:.2f} M trained"


def describe_attention(unet: UNet2DConditionModel, run: Run) -> str:
    """`attention: sdpa (flash)`: what really ran in a call of the network, as it is trained. Raises `UserError`."""
    with run.accelerator.autocast():
        return f"attention: {attention_that_ran(unet)}"


def _precision(name: str) -> torch.dtype:
    device = "cuda" if torch.cuda.is_available() else "cpu"
    return choose_dtype(name, torch.device(device))
