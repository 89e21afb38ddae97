"""From trained weights to an autoencoder that others can use: measured, normalised, reported, saved."""

from __future__ import annotations

import json
from collections.abc import Iterable
from pathlib import Path

import torch
from torch import Tensor
from tqdm import tqdm

from autoencoder.latents import LatentStatistics, encode, fold_normalisation
from autoencoder.model import Autoencoder, latent_channels
from ldm.data.fixed_batches import fixed_images
from ldm.data.sample import Source
from ldm.evaluation.reconstruction import ReconstructionReport, measure_reconstructions
from ldm.files import whole_folder, write_text
from ldm.training.run import Run
from ldm.training.stage1 import AutoencoderStage, LatentScale, Stage1Config, evaluating


def finish(
    stage: AutoencoderStage,
    config: Stage1Config,
    run: Run,
    training_source: Source,
    validation_source: Source,
) -> ReconstructionReport:
    """Fold the latent statistics into the averaged weights, report, and write `RUN/autoencoder`. First process only.

    A decoder-only run keeps its latents and their scale as they are, so nothing is folded.
    """
    autoencoder = stage.autoencoder
    with stage.generator.averaged_weights(), evaluating(autoencoder):
        backup = {name: value.clone() for name, value in autoencoder.state_dict().items()}
        try:
            if config.train == "all":
                images = fixed_images(training_source, config.data, config.statistics_images)
                normalise_latents(autoencoder, images, config.latent_scale)
            data = config.validation_data or config.data
            images = fixed_images(validation_source, data, config.report_images)
            report, picture = measure_reconstructions(
                autoencoder, tqdm(images, desc="report", unit="batch", leave=False), stage.lpips
            )
            save_autoencoder(autoencoder, run.folder / "autoencoder")
        finally:
            # The learner still holds the weights of before the fold: they must not be mixed with the folded ones.
            autoencoder.load_state_dict(backup)
    path = run.save_picture(picture, "report.png")
    measured_on = "validation_data" if config.validation_data else "training images (no validation_data was named)"
    write_text(
        run.folder / "report.json", json.dumps({"measured_on": measured_on, **report.to_json()}, indent=2) + "\n"
    )
    run.say(f"{report.summary()}, measured on {measured_on}")
    run.say(f"autoencoder: {run.folder / 'autoencoder'}   picture: {path}")
    return report


@torch.no_grad()
def normalise_latents(
    autoencoder: Autoencoder, batches: Iterable[Tensor], scale: LatentScale = "channel"
) -> LatentStatistics:
    """Measure the latents of images and fold their mean and standard deviation into the weights (DESIGN.md 4).

    `overall`: one factor for all and no shift, as latent diffusion's `scale_by_std` does (arXiv 2112.10752, app. G).
    """
    device = next(autoencoder.parameters()).device
    statistics = LatentStatistics(latent_channels(autoencoder))
    for images in tqdm(batches, desc="latent statistics", unit="batch", leave=False):
        statistics.update(encode(autoencoder, images.to(device)))
    if scale == "overall":
        deviations = statistics.overall_std.expand(statistics.channels)
        fold_normalisation(autoencoder, torch.zeros_like(statistics.mean), deviations)
    else:
        fold_normalisation(autoencoder, statistics.mean, statistics.std, statistics.covariance)
    return statistics


def save_autoencoder(autoencoder: Autoencoder, folder: Path) -> None:
    """Write the folder that diffusers opens, as a whole."""
    with whole_folder(folder) as partial:
        autoencoder.save_pretrained(partial, safe_serialization=True)
