"""Built-in scenes written to disk: a folder of images, captions and semantic maps that the source `folder` reads."""

from __future__ import annotations

import colorsys
import dataclasses
import json
from collections.abc import Iterable, Iterator
from pathlib import Path

from PIL import Image
from tqdm import tqdm

from ldm.data.sample import Sample
from ldm.data.scenes import ScenesConfig, ScenesSource
from ldm.errors import UserError
from ldm.files import whole_folder


def write_scenes(config: ScenesConfig, resolution: int, out: Path, count: int, *, progress: bool = True) -> None:
    """Write the first `count` scenes of the config (its own `count` is not used) into the new or empty folder `out`.

    Layout: `images/000000.png`, `semantic/000000.png` (palette PNG, pixel = class index), `metadata.jsonl`
    (`file_name`, `text` as a list of phrasings, `semantic`, `label` if every scene has one object, the ground truth)
    and `classes.txt` (line i, from 0, names class i of the semantic maps). The folder appears under its name only when
    it is complete.

    Raises:
        UserError: `out` holds something or is no folder; the resolution is below 16; the emoji font is missing; the
            disk refuses (what was written is removed).
        ValueError: `count` is below 1.
    """
    source = ScenesSource(dataclasses.replace(config, count=count), resolution)
    if out.exists() and (not out.is_dir() or any(out.iterdir())):
        raise UserError(f"{out}: it exists and is not an empty folder; nothing was written; name a new folder")
    with whole_folder(out, synced=False) as parts:
        for name in ("images", "semantic"):
            (parts / name).mkdir()
        samples = (source.read(index) for index in range(count))
        _write(parts, source, tqdm(samples, total=count, desc=f"writing {out}", unit="scene", disable=not progress))


def _write(folder: Path, source: ScenesSource, samples: Iterable[Sample]) -> None:
    (folder / "classes.txt").write_text("\n".join(source.semantic_classes) + "\n", encoding="utf-8")
    with (folder / "metadata.jsonl").open("w", encoding="utf-8") as metadata:
        for index, sample in enumerate(samples):
            names = {"file_name": f"images/{index:06d}.png", "semantic": f"semantic/{index:06d}.png"}
            if sample.image is None or sample.semantic is None:
                raise RuntimeError(f"scene {sample.key} has no picture or no map")
            sample.image.save(folder / names["file_name"])
            _indexed(sample.semantic).save(folder / names["semantic"])
            label = {} if sample.label is None else {"label": source.classes[sample.label]}
            row = {"file_name": names["file_name"], "text": list(sample.captions), "semantic": names["semantic"]}
            metadata.write(json.dumps({**row, **label, **sample.extra}, ensure_ascii=False) + "\n")


def _indexed(semantic: Image.Image) -> Image.Image:
    """The same indices (mode L) as a palette picture (mode P) with a colour for each class, black for class 0."""
    indexed = semantic.copy()
    indexed.putpalette(bytes(_palette()))  # turns mode L into P, indices unchanged
    return indexed


def _palette() -> Iterator[int]:
    yield from (0, 0, 0)
    for index in range(1, 256):
        hue = index * 0.618034 % 1.0  # golden ratio: neighbouring classes get very different hues
        yield from (round(255 * part) for part in colorsys.hsv_to_rgb(hue, 0.75, 0.95))
