"""What a report measures on: the data to compare with, the data that was trained on, and what is to be drawn."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from itertools import cycle
from pathlib import Path

import torch
from PIL import Image
from torch import Tensor

from ldm.data.combined import distinct
from ldm.data.fixed_batches import fixed_batches, fixed_images
from ldm.data.loader import Wanted
from ldm.data.sample import BadSample, Batch, Source
from ldm.data.scene_rendering import Scene
from ldm.data.scenes import ScenesConfig, held_out_prompts, trained_prompts
from ldm.data.sources import DataConfig, open_source
from ldm.data.transforms import Geometry, apply_geometry, size_for
from ldm.evaluation.features import FeatureExtractor, extract_features
from ldm.evaluation.reference import (
    Provenance,
    Reference,
    load_reference,
    make_reference,
    provenance_of,
    save_reference,
)
from ldm.picture import to_pil
from ldm.pipeline_model import LatentDiffusionModel
from ldm.randomness import derive_seed, generator_for

_TRAINED_POOL, _LEAST_POOL = 8, 512
"""Trained prompts looked through for each that is drawn, and at least: few name as many objects as held-out ones."""


@dataclass(frozen=True, kw_only=True)
class ReportData:
    """The images that a report compares with, and those that the model has seen."""

    name: str
    """What a reader calls the first, such as `validation_data of runs/demo/ldm/config.yaml`."""
    config: DataConfig
    vocabulary: ScenesConfig | None = None
    """Of built-in scenes: prompts are of held-out combinations of these."""
    training: DataConfig | None = None
    """None where it is not known, or is the same as `config`."""
    held_out: bool = True
    """Whether the model has not been trained on `config`."""

    def at(self, side: int) -> ReportData:
        """The same, cut to squares of `side` pixels from the middle, unflipped: as the model draws them."""
        training = None if self.training is None else _square(self.training, side)
        return replace(self, config=_square(self.config, side), training=training)


@dataclass(frozen=True, kw_only=True)
class Told:
    """One picture to draw: what it is told, its seed, and what it should show."""

    prompt: str
    seed: int
    label: int | None = None
    semantic: Image.Image | None = None
    scene: Scene | None = None


def _square(config: DataConfig, side: int) -> DataConfig:
    return replace(config, resolution=side, buckets=None, crop="center", flip=False)


def told_scenes(config: ScenesConfig, count: int, seed: int, *, trained: bool = False) -> list[Told]:
    """Prompts of held-out combinations, or of trained ones; picture i is drawn from seed + i.

    Trained prompt i names as many objects as held-out prompt i: the more there are, the more likely is one of their
    pairs held out, and the harder they are, so that the two could not be compared otherwise.
    """
    prompts = held_out_prompts(config, count, seed)
    if trained:
        pool = trained_prompts(config, max(_LEAST_POOL, _TRAINED_POOL * count), seed)
        numbers = [len(scene.objects) for _, scene in prompts]
        alike = {number: cycle([one for one in pool if len(one[1].objects) == number]) for number in set(numbers)}
        prompts = [next(alike[number]) for number in numbers]
    return [Told(prompt=prompt, seed=seed + i, scene=scene) for i, (prompt, scene) in enumerate(prompts)]


def told_samples(model: LatentDiffusionModel, source: Source, config: DataConfig, count: int, seed: int) -> list[Told]:
    """The captions of samples spread over the data, in turn, and their labels; picture i is drawn from seed + i.

    They come in a fixed shuffled order: data are often sorted by class, and the first few stand for all in the pictures
    that are shown, in a sweep, and where there are more pictures than captions. A model without text is told their maps
    too, as far as it takes them. Raises `UserError` where nothing can be read.
    """
    told: list[Told] = []
    for batch in condition_batches(model, source, config, count, 16):
        labels = batch.labels.tolist() if batch.labels is not None and "label" in model.conditions else None
        maps = None
        if "text" not in model.conditions and "semantic" in model.conditions and batch.semantic is not None:
            maps = [Image.fromarray(one.to(torch.uint8).numpy()) for one in batch.semantic]
        for i, caption in enumerate(batch.captions):
            label = labels[i] if labels is not None and labels[i] >= 0 else None
            prompt = caption if "text" in model.conditions else ""
            told.append(Told(prompt=prompt, seed=0, label=label, semantic=None if maps is None else maps[i]))
    order = torch.randperm(len(told), generator=generator_for("order of captions")).tolist()
    return [replace(told[order[i % len(told)]], seed=seed + i) for i in range(count)]


def condition_batches(
    model: LatentDiffusionModel, source: Source, config: DataConfig, count: int, batch_size: int
) -> Iterator[Batch]:
    """Up to `count` samples with the labels and maps that the model takes, numbered as the model knows them."""
    labels = model.label_encoder.classes if model.label_encoder is not None else ()
    classes = model.semantic_encoder.classes if model.semantic_encoder is not None else ()
    wanted = Wanted(
        semantic_classes=len(classes) if model.semantic_encoder is not None else None,
        label_classes=len(labels) if model.label_encoder is not None else None,
    )
    return fixed_batches(source, config, count, batch_size, wanted, 0, labels, classes)


def numbered_images(
    source: Source, config: DataConfig, indices: Sequence[int], batch_size: int
) -> Iterator[tuple[list[int], Tensor]]:
    """The images of `distinct(source)` at `indices`, [B, 3, H, W] in [-1, 1], each batch with the indices it is of.

    What cannot be read is left out.
    """
    source = distinct(source)
    for first in range(0, len(indices), batch_size):
        part = [(i, _image(source, config, i)) for i in indices[first : first + batch_size]]
        readable = [(i, image) for i, image in part if image is not None]
        if readable:
            yield [i for i, _ in readable], torch.stack([image for _, image in readable])


def picture_at(source: Source, config: DataConfig, index: int) -> Image.Image:
    """One of those images as a picture."""
    image = _image(distinct(source), config, index)
    if image is None:
        raise ValueError(f"index {index} is of an image that could be read before and cannot now")
    return to_pil(image[None])[0]


def reference_images(
    extractor: FeatureExtractor, data: ReportData, source: Source, count: int, cache: Path, batch_size: int = 32
) -> Reference:
    """The statistics of up to `count` images of the data, from a file in `cache` if it has them already.

    The file's name is a hash of all that they depend on, so another extractor or changed data make another file.
    Statistics of data with unreadable images are made anew each time.
    """
    config = data.config
    asked = min(count, len(distinct(source)))
    fingerprint = f"{source.fingerprint}, {asked} spread over it"
    expected = provenance_of(extractor, fingerprint, asked, config.resolution)
    path = cache / f"reference-{_hash_of(expected)}.safetensors"
    if path.exists():
        return load_reference(path, expected)
    found = extract_features(extractor, fixed_images(source, config, count, batch_size), data.name)
    reference = make_reference(found, data.name, fingerprint)
    if reference.provenance == expected:
        cache.mkdir(parents=True, exist_ok=True)
        save_reference(path, reference)
    return reference


def data_of_folder(root: Path, resolution: int, training: DataConfig | None) -> ReportData:
    """A folder of images that the model was not trained on, as far as we know."""
    return ReportData(
        name=str(root), config=DataConfig(root=str(root), resolution=resolution), training=training, held_out=True
    )


def open_data(config: DataConfig) -> Source:
    """`open_source`, each sample once."""
    return distinct(open_source(config))


def prompts_of(told: Sequence[Told]) -> list[str]:
    """What a reader sees under each picture."""
    return [one.prompt or (f"class {one.label}" if one.label is not None else "") for one in told]


def _image(source: Source, config: DataConfig, index: int) -> Tensor | None:
    try:
        sample = source.read(index)
        return apply_geometry(sample, size_for(sample, config), Geometry()).image
    except BadSample:
        return None


def _hash_of(provenance: Provenance) -> str:
    return f"{derive_seed('reference', repr(provenance)):016x}"
