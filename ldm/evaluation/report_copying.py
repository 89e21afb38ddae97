"""The report's part on copying: the verdict, and the samples nearest to training images beside them."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass, replace

import torch
from PIL import Image
from torch import Tensor
from tqdm import tqdm

from autoencoder.latents import decode, encode
from autoencoder.model import Autoencoder
from ldm.data.fixed_batches import fixed_images, spread_indices
from ldm.data.sources import DataConfig
from ldm.errors import UserError
from ldm.evaluation.copying import CopyingCheck, CopyingReport
from ldm.evaluation.features import FeatureExtractor
from ldm.evaluation.measurement import Measurement, Setting
from ldm.evaluation.page import Shown, gallery, note, paragraph
from ldm.evaluation.page_text import Html, tag
from ldm.evaluation.report import Section, figures_table
from ldm.evaluation.report_data import ReportData, numbered_images, open_data, picture_at
from ldm.picture import strip
from ldm.randomness import derive_seed

PLANTED = 100
"""Training images that are altered and looked for."""
HELD_OUT = 500
"""Held-out images at most."""
SHOWN = 12
"""Pairs on the page."""
_BATCH = 64


@dataclass(frozen=True)
class CopySearch:
    """What the check found, and the training images that it numbers."""

    report: CopyingReport
    training: Callable[[int], Image.Image]
    """The picture of a training image, by the number that a pair has."""
    available: int
    """Training images in all; the report has how many were compared."""


def search_copies(
    extractor: FeatureExtractor,
    samples: Iterable[Tensor],
    data: ReportData,
    *,
    autoencoder: Autoencoder,
    most: int,
    seed: int,
) -> CopySearch:
    """Compare the samples with up to `most` training images. Raises `UserError` where there is nothing to compare."""
    unseen = unseen_images(data)
    if data.training is None or unseen is None:
        raise UserError(
            "found no training images apart from held-out ones; it needs a run, or a --data CONFIG, with both data and "
            "validation_data"
        )
    config, training = data.training, open_data(data.training)
    chosen = spread_indices(len(training), most)
    planted = [chosen[i] for i in spread_indices(len(chosen), PLANTED)]
    check = CopyingCheck(
        extractor,
        samples=samples,
        held_out=fixed_images(open_data(unseen), unseen, HELD_OUT, _BATCH),
        planted=(images for _, images in numbered_images(training, config, planted, _BATCH)),
        through=through_autoencoder(autoencoder),
        seed=seed,
    )
    indices: list[int] = []
    with tqdm(total=len(chosen), desc="comparing with training images", unit="image") as progress:
        for numbers, images in numbered_images(training, config, chosen, _BATCH):
            indices += numbers
            check.add(images)
            progress.update(len(numbers))
    return CopySearch(check.result(), lambda n: picture_at(training, config, indices[n]), len(training))


def unseen_images(data: ReportData) -> DataConfig | None:
    """Images of the training set's kind that are not in it, None where there are none.

    Of built-in scenes fresh ones are drawn, as the training's were: the held-out combinations are another kind, and a
    sample that shows a training combination by mistake would lie nearer to the training set than any of them.
    """
    if data.training is not None and data.training.source == "scenes":
        scenes = data.training.scenes
        fresh = replace(scenes, seed=derive_seed(scenes.seed, "fresh scenes"), count=HELD_OUT)
        return replace(data.training, scenes=fresh)
    return data.config if data.held_out else None


def through_autoencoder(autoencoder: Autoencoder) -> Callable[[Tensor], Tensor]:
    """What is left of images [B, 3, H, W] in [-1, 1] when they are coded: no model can copy more of them."""
    parameter = next(autoencoder.parameters())

    @torch.no_grad()
    def through(images: Tensor) -> Tensor:
        mean = encode(autoencoder, images.to(parameter.device, parameter.dtype)).mean
        return decode(autoencoder, mean).float().clamp(-1, 1).cpu()

    return through


def copying_section(found: CopySearch, sample: Callable[[int], Image.Image], resolution: int) -> Section:
    """The verdict and the most suspicious pairs. `sample` gives the picture of a number."""
    report, available = found.report, found.available
    setting = Setting(
        n=report.n,
        resolution=resolution,
        extractor=report.extractor,
        resize_filter=report.resize_filter,
        reference="training images",
        reference_n=report.training,
    )
    figure = Measurement("copied", "flagged as copies", "lower", report.flagged, setting)
    shown = []
    for pair in report.pairs[:SHOWN]:
        beside = strip([sample(pair.sample), found.training(pair.training)])
        words = f"sample {pair.sample} | training {pair.training}: {pair.pixel_distance:.1f}/255 apart"
        shown.append(Shown(beside, words, "flagged" if pair.flagged else ""))
    partly = ""
    if report.training < available:
        partly = f" Only {report.training:,} of {available:,} training images were compared (--training-images)."
    kind = {True: "flag", False: "ok", None: "unsure"}[report.copies]
    content = [
        tag("p", tag("span", report.verdict(), class_=kind)),
        paragraph(f"Each sample (left) beside the training image nearest to it, the most suspicious first.{partly}"),
        gallery(shown, cell=200, largest=512),
        figures_table([figure]),
        note(
            "A picture is flagged if it lies nearer to a training image than 99 % of held-out images do, in pixels and "
            "features together; so about 1 % of fresh pictures are flagged too. Of built-in scenes the held-out images "
            "are fresh ones, drawn as the training's were. Training and held-out images are first put through the "
            "autoencoder, since a model can copy no more of them than that."
        ),
    ]
    values = {"copies": report.copies, "planted_found": report.planted, "nearer": report.nearer, "n": report.n}
    counts = {"held_out": report.held_out, "training": report.training, "training_available": available}
    return Section(
        name="copying",
        title="Copies of training images",
        content=Html("".join(content)),
        figures=(figure,),
        values={**values, **counts},
        verdict=report.verdict() + partly,
    )
