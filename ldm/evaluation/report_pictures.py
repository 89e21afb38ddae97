"""The pictures of a report on disk, each with its seed: drawn once, shared out over processes, resumed after a
kill.

A picture is a function of its own seed and of what it is told, so its file is named by both; everything else that makes
it is in settings.json beside it, and a folder that was drawn with other settings is refused by name.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from PIL import Image
from torch import Tensor
from tqdm import tqdm

from ldm.data.images import to_tensor
from ldm.data.share import Share
from ldm.errors import UserError, user_input
from ldm.evaluation.report_data import Told
from ldm.files import write_text
from ldm.picture import parameters_text, save_png

SETTINGS = "settings.json"
Draw = Callable[[Sequence[Told]], list[Image.Image]]
"""Draws a batch; picture i depends on told[i] alone."""


@dataclass(frozen=True)
class PictureFolder:
    """Pictures of one model with one set of settings."""

    folder: Path

    def path(self, told: Told) -> Path:
        """Where the picture of `told` is, or will be."""
        return self.folder / f"{told.seed:06d}-{_digest(told)}.png"

    def missing(self, told: Sequence[Told]) -> list[Told]:
        """Those that are not there yet."""
        return [one for one in told if not self.path(one).exists()]

    def picture(self, told: Told) -> Image.Image:
        """One that is there."""
        with Image.open(self.path(told), formats=["PNG"]) as image:
            return image.convert("RGB")

    def batches(self, told: Sequence[Told], batch_size: int = 64) -> Iterator[Tensor]:
        """The pictures as images [B, 3, H, W] in [-1, 1], read as they are asked for."""
        for first in range(0, len(told), batch_size):
            yield torch.stack([to_tensor(self.picture(one)) for one in told[first : first + batch_size]])

    def claim(self, settings: Mapping[str, Any]) -> None:
        """Write down what the pictures are drawn with, or check it. Raises `UserError` naming what differs."""
        path = self.folder / SETTINGS
        if path.exists():
            with user_input(f"{path}", OSError, ValueError):
                before = dict(json.loads(path.read_text(encoding="utf-8")))
            for name in dict.fromkeys([*before, *settings]):
                if before.get(name) != settings.get(name):
                    raise UserError(
                        f"{name}: found {settings.get(name)}, but the pictures in {self.folder} were drawn with "
                        f"{before.get(name)}; give that to go on with them, or another --out, or delete the folder"
                    )
            return
        if self.folder.exists() and any(self.folder.iterdir()):
            raise UserError(
                f"{self.folder}: found files that are none of ours; allowed is a new folder; choose another"
            )
        self.folder.mkdir(parents=True, exist_ok=True)
        write_text(path, json.dumps(dict(settings), indent=2) + "\n")

    def draw(self, told: Sequence[Told], draw: Draw, batch_size: int, share: Share, settings: Mapping[str, Any]) -> int:
        """Draw this process's part of what is missing, and wait for the others; returns how many it drew.

        Every picture is written as soon as its batch is done, with its parameters.
        """
        missing = self.missing(told)
        share.wait()  # until all have looked, so that all share out the same pictures
        mine = missing[share.rank :: share.processes]
        hidden = share.rank > 0
        with tqdm(total=len(mine), desc=f"drawing {self.folder.name}", unit="image", disable=hidden or not mine) as bar:
            for first in range(0, len(mine), batch_size):
                part = mine[first : first + batch_size]
                for one, image in zip(part, draw(part), strict=True):
                    save_png(image, self.path(one), _parameters(one, image, settings))
                bar.update(len(part))
        share.wait()
        return len(mine)

    def remove(self) -> None:
        """Delete the pictures of this folder and, if nothing else is in it, the folder."""
        leftovers = self.folder.glob(".*.part")  # of a process that was killed while it wrote
        for path in [*self.folder.glob("[0-9]*-??????????.png"), *leftovers, self.folder / SETTINGS]:
            path.unlink(missing_ok=True)
        for folder in (self.folder, self.folder.parent):
            if folder.is_dir() and not any(folder.iterdir()):
                folder.rmdir()


def _digest(told: Told) -> str:
    """Ten hex digits of all that the picture is told."""
    digest = hashlib.sha256(json.dumps([told.prompt, told.label]).encode())
    if told.semantic is not None:
        digest.update(told.semantic.tobytes())
    return digest.hexdigest()[:10]


def _parameters(told: Told, image: Image.Image, settings: Mapping[str, Any]) -> str:
    return parameters_text(
        told.prompt,
        steps=settings.get("steps", 0),
        sampler=str(settings.get("scheduler", "")),
        guidance_scale=settings.get("guidance", 1.0),
        seed=told.seed,
        size=image.size,
        model=str(settings.get("model", "")),
    )
