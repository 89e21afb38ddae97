"""Checkpoints that are whole or not there: written beside the final name, synced, renamed (DESIGN.md 5)."""

from __future__ import annotations

import hashlib
import json
import os
import re
import shutil
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor

from ldm.errors import user_input

_NAME = re.compile(r"step-(\d+)")


@dataclass(frozen=True)
class Checkpoint:
    """What was saved after `step` updates: tensors by file and name, and plain values."""

    step: int
    tensors: dict[str, dict[str, Tensor]]
    state: dict[str, Any]


class CheckpointFolder:
    """`checkpoints/step-N/` folders. A folder with its final name is complete, whatever instant a process died at."""

    def __init__(self, folder: Path, keep: int) -> None:
        self.folder, self.keep = folder, keep

    def save(self, step: int, tensors: Mapping[str, Mapping[str, Tensor]], state: Mapping[str, Any]) -> Path:
        """Write one checkpoint, then remove the ones that are no longer kept. Call it on one process only.

        Raises `UserError` if the disk refuses; what was written of it is removed, the earlier checkpoints stay.
        """
        self.folder.mkdir(parents=True, exist_ok=True)
        final = self.folder / f"step-{step}"
        if final.exists():
            return final
        partial = self.folder / f".partial-step-{step}"
        shutil.rmtree(partial, ignore_errors=True)
        try:
            # A full disk is an OSError to Python and a SafetensorError to safetensors.
            with user_input(f"checkpoint {final}: cannot be written, earlier ones are kept", OSError, SafetensorError):
                _write(partial, tensors, {"step": step, **state})
                partial.rename(final)
        finally:
            shutil.rmtree(partial, ignore_errors=True)
        sync(self.folder)
        self._prune()
        return final

    def steps(self) -> list[int]:
        """The steps of the complete checkpoints, ascending."""
        if not self.folder.is_dir():
            return []
        names = (_NAME.fullmatch(entry.name) for entry in self.folder.iterdir())
        return sorted(int(match[1]) for match in names if match)

    def latest(self) -> Checkpoint | None:
        """The newest complete checkpoint, or None."""
        steps = self.steps()
        return load_checkpoint(self.folder / f"step-{steps[-1]}") if steps else None

    def _prune(self) -> None:
        """Remove old checkpoints, and what a killed process left half-written."""
        for step in self.steps()[: -self.keep]:
            # Renamed first: a folder that is being deleted must not look like a checkpoint.
            doomed = self.folder / f".removed-step-{step}"
            (self.folder / f"step-{step}").rename(doomed)
        for leftover in [*self.folder.glob(".removed-*"), *self.folder.glob(".partial-*")]:
            shutil.rmtree(leftover)


def _write(folder: Path, tensors: Mapping[str, Mapping[str, Tensor]], state: Mapping[str, Any]) -> None:
    """Make `folder` and have the disk hold all of it."""
    folder.mkdir()
    for name, named in tensors.items():
        contiguous = {key: value.detach().cpu().contiguous() for key, value in named.items()}
        save_file(contiguous, folder / f"{name}.safetensors")
    (folder / "state.json").write_text(json.dumps(state, indent=2), encoding="utf-8")
    for file in folder.iterdir():
        sync(file)
    sync(folder)


def load_checkpoint(folder: Path) -> Checkpoint:
    """Read one `step-N` folder; raises `UserError` for one that is missing or damaged."""
    with user_input(f"checkpoint {folder}", OSError, ValueError, KeyError, SafetensorError):
        state = json.loads((folder / "state.json").read_text(encoding="utf-8"))
        tensors = {file.stem: load_file(file) for file in sorted(folder.glob("*.safetensors"))}
        return Checkpoint(step=state.pop("step"), tensors=tensors, state=state)


def checksum(files: Mapping[str, Mapping[str, Tensor]]) -> str:
    """16 hex digits over names and bytes of all tensors: equal on processes that hold the same weights."""
    digest = hashlib.sha256()
    for file, tensors in sorted(files.items()):
        for name, tensor in sorted(tensors.items()):
            digest.update(f"{file}/{name}".encode())
            digest.update(tensor.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy().data)
    return digest.hexdigest()[:16]


def sync(path: Path) -> None:
    """Flush a file or a folder to the disk."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def write_atomically(path: Path, text: str) -> None:
    """Replace a small text file as a whole: a reader sees the old one or the new one. Raises `UserError`."""
    partial = path.with_name(f".{path.name}.partial")
    try:
        with user_input(f"{path}: cannot be written", OSError):
            partial.write_text(text, encoding="utf-8")
            sync(partial)
            partial.replace(path)
    finally:
        partial.unlink(missing_ok=True)
