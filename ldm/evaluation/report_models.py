"""What is measured of several models for one page: each seen through the same eyes, against the same reference."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

from PIL import Image

from autoencoder.model import Autoencoder
from ldm.data.fixed_batches import fixed_images
from ldm.data.sample import Source
from ldm.errors import UserError
from ldm.evaluation.alignment import clip_score
from ldm.evaluation.autoencoder_report import measure_autoencoder
from ldm.evaluation.features import extract_features
from ldm.evaluation.image_metrics import measure_images
from ldm.evaluation.measurement import Measurement
from ldm.evaluation.report import Section
from ldm.evaluation.report_compare import ROWS, Contender, comparison_section, side_by_side_section
from ldm.evaluation.report_copying import through_autoencoder
from ldm.evaluation.report_data import ReportData, prompts_of
from ldm.evaluation.report_drawing import Drawn
from ldm.evaluation.report_eyes import Eyes, References, open_eyes
from ldm.evaluation.report_model import BATCH, Measuring
from ldm.evaluation.report_reconstruction import open_lpips, rfid_extractor
from ldm.evaluation.report_scenes import flag_of, scene_figures
from ldm.evaluation.scenes import SceneScore
from ldm.picture import to_pil


def measure_models(
    drawn: Mapping[str, Drawn],
    data: ReportData,
    source: Source,
    measuring: Measuring,
    autoencoder: Autoencoder,
    cache: Path,
) -> list[Section]:
    """The pictures side by side and the table of figures; all models are seen through the first one's `autoencoder`."""
    device = next(autoencoder.parameters()).device
    eyes = open_eyes(measuring.extractors, data.config.resolution, autoencoder, data.vocabulary, device)
    references = References(eyes, data, source, measuring.reference, cache)
    scores: dict[str, list[SceneScore]] = {}
    if data.vocabulary is not None:
        scores = {label: one.scores(data.vocabulary) for label, one in drawn.items()}
    contenders = [
        Contender(label, _model_figures(one, eyes, references, scores.get(label, []), measuring.seed))
        for label, one in drawn.items()
    ]
    first = next(iter(drawn.values()))
    count = min(ROWS, len(first.told))
    pictures = {label: [one.picture(i) for i in range(count)] for label, one in drawn.items()}
    flags = {label: [flag_of(score) for score in found[:count]] for label, found in scores.items()}
    shown = side_by_side_section(prompts_of(first.told[:count]), pictures, flags)
    return [shown, comparison_section(contenders), *_lines(eyes)]


def measure_autoencoders(
    autoencoders: Mapping[str, Autoencoder], data: ReportData, source: Source, measuring: Measuring
) -> list[Section]:
    """Originals beside each one's reconstructions, and the table of figures."""
    eyes = open_eyes(
        [one for one in measuring.extractors if one.kind != "autoencoder"],  # no common eye for all of them
        data.config.resolution,
        next(iter(autoencoders.values())),
        data.vocabulary,
        next(next(iter(autoencoders.values())).parameters()).device,
    )
    contenders = []
    pictures: dict[str, list[Image.Image]] = {}
    images = next(iter(fixed_images(source, data.config, ROWS, ROWS)))
    pictures["original"] = to_pil(images)
    for label, autoencoder in autoencoders.items():
        lpips, _ = open_lpips(autoencoder, measuring.lpips_weights)
        report = measure_autoencoder(
            autoencoder,
            fixed_images(source, data.config, measuring.reconstructed, BATCH),
            lpips=lpips,
            extractor=rfid_extractor(eyes.opened),
            seed=measuring.seed,
        )
        contenders.append(Contender(label, {figure.name: figure for figure in report.measurements}))
        pictures[label] = to_pil(through_autoencoder(autoencoder)(images))
    shown = side_by_side_section([f"image {i}" for i in range(len(images))], pictures, {})
    return [shown, comparison_section(contenders), *_lines(eyes)]


def _model_figures(
    drawn: Drawn, eyes: Eyes, references: References, scores: list[SceneScore], seed: int
) -> dict[str, Measurement]:
    """Every figure of one model, by `extractor/name`."""
    figures: dict[str, Measurement] = {}
    if scores:
        figures |= {f"scenes/{one.name}": one for one in scene_figures(scores, references.data.config.resolution)}
    for name, extractor in eyes.opened.items():
        try:
            against = references.through(name)
            found = extract_features(extractor, drawn.folder.batches(drawn.told, BATCH), "samples")
            figures |= {f"{name}/{one.name}": one for one in measure_images(found, against, seed=seed)}
        except UserError as error:
            eyes.missing.setdefault(name, str(error))
    if eyes.clip is not None and any(one.prompt for one in drawn.told):
        prompts = [one.prompt for one in drawn.told]
        batches = drawn.folder.batches(drawn.told, BATCH)
        figures["clip_score"] = clip_score(eyes.clip, batches, prompts, seed=seed).measurement
    return figures


def _lines(eyes: Eyes) -> list[Section]:
    return [
        Section(name=f"missing_{name}", title=f"Figures through {name}", missing=line)
        for name, line in eyes.missing.items()
    ]
