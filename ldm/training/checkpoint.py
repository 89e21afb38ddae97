"""Checkpoints that are whole or not there: written beside the final name, synced, renamed (DESIGN.md 5)."""

from __future__ import annotations

import hashlib
import json
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

from ldm.errors import UserError, user_input
from ldm.files import whole_folder, writing

_NAME = re.compile(r"step-(\d+)")
_STATE, _MANIFEST = "state.json", "manifest.json"


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
        final = self.folder / f"step-{step}"
        if final.exists():
            return final
        with whole_folder(final, ", earlier ones are kept") as partial:
            _write(partial, tensors, {"step": step, **state})
        self._prune()
        return final

    def steps(self) -> list[int]:
        """The steps of the complete checkpoints, ascending."""
        if not self.folder.is_dir():
            return []
        names = (_NAME.fullmatch(entry.name) for entry in self.folder.iterdir())
        return sorted(int(match[1]) for match in names if match)

    def latest(self) -> Checkpoint | None:
        """The newest complete checkpoint, or None. Raises `UserError` if it is damaged, naming the one before."""
        steps = self.steps()
        if not steps:
            return None
        newest = self.folder / f"step-{steps[-1]}"
        try:
            return load_checkpoint(newest)
        except UserError as error:
            before = f"go on from step {steps[-2]}" if len(steps) > 1 else "start anew, as there is none before it"
            raise UserError(f"{error}; remove the folder {newest} to {before}") from error

    def remove(self, step: int) -> None:
        """Remove a checkpoint. It loses its name first: a folder that is being deleted must not look like one."""
        doomed = self.folder / f".removed-step-{step}"
        with writing(self.folder):
            (self.folder / f"step-{step}").rename(doomed)
            shutil.rmtree(doomed)

    def _prune(self) -> None:
        """Remove what a killed process left half-written or half-removed, and old checkpoints."""
        with writing(self.folder):
            for leftover in [*self.folder.glob(".removed-*"), *self.folder.glob(".step-*.part")]:
                shutil.rmtree(leftover)
        for step in self.steps()[: -self.keep]:
            self.remove(step)


def _write(folder: Path, tensors: Mapping[str, Mapping[str, Tensor]], state: Mapping[str, Any]) -> None:
    for name, named in tensors.items():
        contiguous = {key: value.detach().cpu().contiguous() for key, value in named.items()}
        save_file(contiguous, folder / f"{name}.safetensors")
    (folder / _STATE).write_text(json.dumps(state, indent=2), encoding="utf-8")
    hashes = {path.name: _hash(path) for path in sorted(folder.iterdir())}
    (folder / _MANIFEST).write_text(json.dumps(hashes, indent=2), encoding="utf-8")


def load_checkpoint(folder: Path) -> Checkpoint:
    """Read the files of one `step-N` folder that its manifest names, if each still has the hash that it was saved with.

    Raises `UserError` for a folder that is missing or damaged; it names the file.
    """
    with user_input(f"checkpoint {folder}", OSError, ValueError, KeyError, RecursionError, SafetensorError):
        hashes = _table(folder / _MANIFEST)
        for name, saved in hashes.items():
            if Path(name).name != name:
                raise ValueError(f"{_MANIFEST}: found {name!r}; allowed are names of files in the folder")
            if _hash(folder / name) != saved:
                raise ValueError(f"{name} is damaged: its bytes are not those that were saved")
        state = _table(folder / _STATE)
        tensors = {Path(name).stem: load_file(folder / name) for name in hashes if name != _STATE}
        step = state.pop("step")
        if type(step) is not int or step < 0:
            raise ValueError(f"{_STATE}: found step {step!r}; allowed is a whole number")
        return Checkpoint(step=step, tensors=tensors, state=state)


def _table(path: Path) -> dict[str, Any]:
    table = json.loads(path.read_text(encoding="utf-8"))
    if not isinstance(table, dict):
        raise ValueError(f"{path.name}: found no table; the file is damaged")
    return table


def _hash(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def checksum(files: Mapping[str, Mapping[str, Tensor]]) -> str:
    """16 hex digits over names and bytes of all tensors: equal on processes that hold the same weights."""
    digest = hashlib.sha256()
    for file, tensors in sorted(files.items()):
        for name, tensor in sorted(tensors.items()):
            digest.update(f"{file}/{name}".encode())
            digest.update(tensor.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy().data)
    return digest.hexdigest()[:16]
