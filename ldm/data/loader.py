"""Batches for training: a pure function of (seed, step, position), whatever the number of workers and processes."""

from __future__ import annotations

import os
import signal
import threading
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, Protocol

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import DataLoader, Dataset

from conditioning.inpainting import InpaintingConfig, draw_mask
from ldm.data.buckets import Buckets, Size
from ldm.data.combined import distinct_index
from ldm.data.order import BucketOrder, Order, SquareOrder
from ldm.data.quarantine import Quarantine as Quarantine
from ldm.data.sample import UNKNOWN_CLASS, UNKNOWN_LABEL, BadSample, Batch, Sample, Source
from ldm.data.sources import DataConfig
from ldm.data.transforms import Transformed, apply_geometry, draw_geometry
from ldm.errors import UserError
from ldm.randomness import derive_seed, generator_for

_ATTEMPTS = 20
"""Stand-ins tried for one unusable sample before the run stops: so many in a row mean that most of the data is bad."""


class LatentReader(Protocol):
    """What the latent cache offers: posterior moments instead of pixels, of the centre crop.

    A repeated sample (ldm/data/combined.py) has one place there: `index` counts different samples.
    """

    supports_flip: bool
    """Whether the moments of mirrored images are held too."""

    def read(self, index: int, flipped: bool) -> tuple[np.ndarray | Tensor, np.ndarray | Tensor]:
        """Mean and log-variance, each [C, h, w]. Raises `BadSample` if the image could not be encoded."""


@dataclass(frozen=True)
class Item:
    """One place of a batch, filled."""

    key: str
    caption: str
    label: int | None
    tensors: Transformed
    moments: tuple[Tensor, Tensor] | None
    bad: tuple[tuple[str, str], ...]
    weight: float = 1.0


@dataclass(frozen=True, kw_only=True)
class Wanted:
    """What the conditions of a model need of every sample, beside latents and caption."""

    masks: InpaintingConfig | None = None
    """Draw a mask where the sample has none of its own, and read the image, also beside cached latents."""
    semantic_classes: int | None = None
    """Number of classes; a map with another one makes its sample unusable. A sample without a map is all unknown."""
    label_classes: int | None = None
    """The same for the label; a sample without one has -1."""


NOTHING = Wanted()


class TrainingBatches:
    """The micro-batches of one rank from `start_step` up to, not including, `end_step`; `accumulation` of them a step.

    `batch_size` is the global one. With b = batch_size // (world_size * accumulation), micro-batch a of rank r holds
    the positions a * b * world_size + r * b + i, i = 0..b-1: all ranks' micro-batches together are the global batch.
    Each sample's crop, flip and caption depend on (seed, epoch, index) alone. With `buckets` all images of a global
    batch have one shape.

    A sample that cannot be used is replaced by one chosen from (seed, epoch, index) and reported in `Batch.bad`.
    With a `reader`, moments are read instead of images, or beside them if `wanted` needs both. Raises `UserError` for
    sizes that do not fit.

    One iteration runs through all steps, so its workers live as long as the run; they end with it.
    """

    def __init__(
        self,
        source: Source,
        config: DataConfig,
        *,
        batch_size: int,
        seed: int,
        start_step: int,
        end_step: int,
        accumulation: int = 1,
        rank: int = 0,
        world_size: int = 1,
        workers: int = 0,
        reader: LatentReader | None = None,
        wanted: Wanted = NOTHING,
        buckets: Buckets | None = None,
        prefetch: int = 2,
        pin_memory: bool = False,
    ) -> None:
        parts = world_size * accumulation
        if batch_size < 1 or batch_size % parts:
            raise UserError(
                f"batch_size: found {batch_size} for {world_size} processes x accumulation {accumulation}; "
                f"allowed is a multiple of {parts}; set {max(1, round(batch_size / parts)) * parts}"
            )
        if reader is not None:
            _check_reader(reader, config)
        order = (
            SquareOrder(len(source), batch_size, seed, config.resolution)
            if buckets is None
            else BucketOrder(buckets, batch_size, seed, one_shape_each=reader is not None)
        )
        micro_batches = _MicroBatches(
            source, config, order, batch_size // parts, accumulation, seed, rank, world_size, reader, wanted
        )
        self._micro_steps = range(start_step * accumulation, max(start_step, end_step) * accumulation)
        self._loader = DataLoader(
            micro_batches,
            batch_size=None,  # an item is a micro-batch already
            sampler=self._micro_steps,
            num_workers=workers,
            collate_fn=_as_it_is,
            prefetch_factor=prefetch if workers else None,
            worker_init_fn=_prepare_worker,
            pin_memory=pin_memory,
            generator=torch.Generator().manual_seed(0),  # else the loader draws from the global one
        )

    def __len__(self) -> int:
        """Number of micro-batches."""
        return len(self._micro_steps)

    def __iter__(self) -> Iterator[Batch]:
        for batch in self._loader:
            if isinstance(batch, UserError):  # the loader would bury it in a worker's traceback
                raise UserError(str(batch))  # a new one: `batch` would hold this frame, and with it the workers
            yield batch


@dataclass(frozen=True)
class _MicroBatches(Dataset[Batch | UserError]):
    """Item n is micro-batch n % accumulation of step n // accumulation. Runs in the workers."""

    source: Source
    config: DataConfig
    order: Order
    micro_batch_size: int
    accumulation: int
    seed: int
    rank: int
    world_size: int
    reader: LatentReader | None
    wanted: Wanted

    def __getitem__(self, micro_step: int) -> Batch | UserError:
        step, micro_batch = divmod(micro_step, self.accumulation)
        first = (micro_batch * self.world_size + self.rank) * self.micro_batch_size
        positions = range(first, first + self.micro_batch_size)
        try:
            size = self.order.size_at(step)
            return collate([self._item(step, position, size) for position in positions], positions)
        except UserError as error:
            return error

    def _item(self, step: int, position: int, size: Size) -> Item:
        """The sample at `position`, or the first usable one of its stand-ins."""
        epoch, first = self.order.sample_at(step, position)
        bad: list[tuple[str, str]] = []
        index = first
        for attempt in range(_ATTEMPTS):
            try:
                return self._load(epoch, index, size, tuple(bad))
            except BadSample as error:
                bad.append((error.key, error.reason))
                index = self.order.replacement_for(step, first, epoch, attempt)
        raise UserError(
            f"data: {_ATTEMPTS} samples in a row cannot be used (first {bad[0][0]}: {bad[0][1]}); "
            "run `ldm data check` on the folder to list them all"
        )

    def _load(self, epoch: int, index: int, size: Size, bad: tuple[tuple[str, str], ...]) -> Item:
        geometry = draw_geometry(self.config, generator_for(self.seed, "transform", epoch, index))
        sample = self.source.read(index, with_image=self.reader is None or self.wanted.masks is not None)
        moments = None
        if self.reader is not None:
            mean, logvar = self.reader.read(distinct_index(self.source, index), geometry.flipped)
            moments = (torch.as_tensor(mean).float(), torch.as_tensor(logvar).float())  # [C, h, w] each
        caption = sample.captions[derive_seed(self.seed, "caption", epoch, index) % len(sample.captions)]
        tensors = apply_geometry(sample, size, geometry)
        mask_generator = generator_for(self.seed, "mask", epoch, index)
        return make_item(sample, caption, tensors, size, moments, self.wanted, mask_generator, bad)


def make_item(
    sample: Sample,
    caption: str,
    tensors: Transformed,
    size: Size,
    moments: tuple[Tensor, Tensor] | None,
    wanted: Wanted,
    mask_generator: torch.Generator,
    bad: tuple[tuple[str, str], ...] = (),
) -> Item:
    """Check the parts that `wanted` asks for and fill in those that the sample lacks, of `size` (width, height).

    Raises `BadSample`.
    """
    width, height = size
    semantic, mask, label = tensors.semantic, tensors.mask, sample.label
    if wanted.semantic_classes is not None:
        if semantic is None:
            semantic = torch.full((height, width), UNKNOWN_CLASS)
        known = semantic[semantic != UNKNOWN_CLASS]
        _check_range(sample.key, "semantic map with class", known, wanted.semantic_classes)
    if wanted.label_classes is not None:
        if label is not None:
            _check_range(sample.key, "label", torch.tensor([label]), wanted.label_classes)
        label = UNKNOWN_LABEL if label is None else label
    if wanted.masks is not None and mask is None:
        mask = draw_mask(wanted.masks, height, width, mask_generator, semantic)  # [1, H, W]
    return Item(sample.key, caption, label, Transformed(tensors.image, semantic, mask), moments, bad, sample.weight)


def _check_range(key: str, what: str, found: Tensor, classes: int) -> None:
    wrong = found[(found < 0) | (found >= classes)]
    if len(wrong):
        raise BadSample(key, f"{what} {int(wrong[0])}; allowed is 0 to {classes - 1}")


def _check_reader(reader: LatentReader, config: DataConfig) -> None:
    """Cached latents are of one fixed crop, so what the config asks for must be what the cache holds."""
    if config.crop == "random":
        raise UserError("data.crop: found random with a latent cache; allowed is center; set it or turn the cache off")
    if config.flip and not reader.supports_flip:
        raise UserError("data.flip: found true with a latent cache made without flips; build the cache anew")


def collate(items: Sequence[Item], positions: Sequence[int]) -> Batch:
    """Items to a batch. Raises `UserError` where some samples have a part that others lack."""

    def stack(name: str, parts: Sequence[Tensor | None]) -> Tensor | None:
        there = [part for part in parts if part is not None]
        if there and len(there) < len(items):
            lacking = next(item.key for item, part in zip(items, parts, strict=True) if part is None)
            raise UserError(f"data: {lacking} has no {name} while other samples have; give one to all or to none")
        return torch.stack(there) if there else None

    labels = [None if item.label is None else torch.tensor(item.label) for item in items]
    masks = [item.tensors.mask for item in items]
    means = stack("latents", [item.moments[0] if item.moments else None for item in items])
    logvars = stack("latents", [item.moments[1] if item.moments else None for item in items])
    return Batch(
        keys=tuple(item.key for item in items),
        positions=tuple(positions),
        captions=tuple(item.caption for item in items),
        images=stack("image", [item.tensors.image for item in items]),  # [B, 3, H, W]
        semantic=_stack_known([item.tensors.semantic for item in items], UNKNOWN_CLASS),  # [B, H, W]
        masks=None if any(mask is None for mask in masks) else stack("mask", masks),  # [B, 1, H, W]
        labels=_stack_known(labels, UNKNOWN_LABEL),  # [B]
        weights=_weights([item.weight for item in items]),  # [B]
        moments=None if means is None or logvars is None else (means, logvars),  # [B, C, h, w] each
        bad=tuple(pair for item in items for pair in item.bad),
    )


def _stack_known(parts: Sequence[Tensor | None], unknown: int) -> Tensor | None:
    """The parts as one tensor, those that are lacking filled with `unknown`; None where all are lacking."""
    there = next((part for part in parts if part is not None), None)
    if there is None:
        return None
    return torch.stack([torch.full_like(there, unknown) if part is None else part for part in parts])


def _weights(weights: Sequence[float]) -> Tensor | None:
    return None if all(weight == 1.0 for weight in weights) else torch.tensor(weights, dtype=torch.float32)


@contextmanager
def dead_worker_told() -> Iterator[None]:
    """Inside, a worker that was killed from outside is one line.

    torch raises it wherever the process happens to be, from a handler of SIGCHLD, so this goes round the whole loop.
    """
    try:
        yield
    except RuntimeError as error:
        if not str(error).startswith("DataLoader worker"):
            raise
        reason = " ".join(str(error).split())
        if hasattr(signal, "SIGCHLD"):
            signal.signal(signal.SIGCHLD, signal.SIG_DFL)  # it would raise again for each worker that now ends
        raise UserError(
            f"data: a process that reads images has died ({reason}): often the machine ran out of memory; lower "
            "training.workers (cache.workers while latents are cached), and start the same command again to go on"
        ) from error


def _as_it_is(item: Any) -> Any:
    return item


def _prepare_worker(worker: int) -> None:
    """Workers share the cores with the training process, and live as long as it does.

    Schedulers send SIGTERM to every process of a job. The training process then saves a checkpoint; if its workers died
    meanwhile it would be interrupted in that. So a worker obeys a SIGTERM of its parent only.
    """
    torch.set_num_threads(1)
    if hasattr(signal, "sigwaitinfo"):
        signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGTERM})
        threading.Thread(target=_end_with_parent, daemon=True).start()


def _end_with_parent() -> None:
    while signal.sigwaitinfo({signal.SIGTERM}).si_pid != os.getppid():
        pass
    os._exit(0)
