"""The light version of a report while stage 2 trains: a few pictures, FID and its like, the scenes' exact scorer."""

from __future__ import annotations

import math
from dataclasses import replace
from functools import cached_property

import torch
from PIL import Image

from ldm.data.fixed_batches import fixed_images
from ldm.data.images import to_tensor
from ldm.data.sample import Source
from ldm.data.scenes import ScenesConfig
from ldm.errors import UserError
from ldm.evaluation.drawing import PipelineDrawer
from ldm.evaluation.extractors import open_extractor
from ldm.evaluation.features import FeatureExtractor, extract_features
from ldm.evaluation.image_metrics import measure_images
from ldm.evaluation.reference import Reference, make_reference
from ldm.evaluation.report_data import Told, told_samples, told_scenes
from ldm.evaluation.scenes import rates, score_each
from ldm.pipeline import LatentDiffusionPipeline
from ldm.pipeline_model import NotFinitePicture
from ldm.training.stage2 import DiffusionStage
from ldm.training.watch import Watch, WatchConfig

_BATCH = 64
_LEAST_REPLICATES = 2
"""Intervals are for reports: they would cost more than the figures."""


class PictureWatch:
    """Draws the same prompts from the same seeds each time and compares with the same images, kept in memory."""

    def __init__(self, stage: DiffusionStage, config: WatchConfig, source: Source) -> None:
        """Raises `UserError` now if the extractor is not there, and not after a thousand steps."""
        data = stage.config.validation_data or stage.config.data
        self._stage, self._config, self._source = stage, config, source
        self._data = replace(data, buckets=None, crop="center", flip=False)
        self._scenes = stage.config.data.scenes if stage.config.data.source == "scenes" else None
        device = stage.run.accelerator.device
        self._extractor: FeatureExtractor = open_extractor(
            config.extractor,
            resolution=data.resolution,
            autoencoder=stage.autoencoder,
            scenes=self._scenes,
            device=device,
        )
        if self._scenes is not None:
            self._check_metric(self._scenes)

    @torch.no_grad()
    def __call__(self) -> dict[str, float]:
        """Every figure by its name. Neither weights nor torch's random numbers are changed."""
        devices = [self._stage.run.accelerator.device] if torch.cuda.is_available() else []
        with torch.random.fork_rng(devices=devices):
            try:
                images = self._draw()
            except NotFinitePicture as error:
                self._stage.run.say(f"the watch measures nothing this time, the training goes on: {error}")
                return {self._config.metric: math.nan}
            batches = (
                torch.stack([to_tensor(image) for image in images[first : first + _BATCH]])
                for first in range(0, len(images), _BATCH)
            )
            found = extract_features(self._extractor, batches, "watched pictures")
            figures = measure_images(found, self._reference, seed=self._stage.run.seed, replicates=_LEAST_REPLICATES)
            numbers = {figure.name: figure.value for figure in figures}
            scenes = [one.scene for one in self._told if one.scene is not None]
            if self._scenes is not None and scenes:
                scored = rates(score_each(images, scenes, self._scenes))
                numbers |= {name: value for name, value in scored.items() if name != "images"}
        return numbers

    def _check_metric(self, scenes: ScenesConfig) -> None:
        drawn = [one.scene for one in self._told if one.scene is not None]
        stated = {
            "colours": scenes.kind == "shapes",
            "sizes": any(scene.sized for scene in drawn),
            "relation": any(scene.relation is not None for scene in drawn),
        }
        if not stated.get(self._config.metric, True):
            raise UserError(
                f"watch.metric: found {self._config.metric}, of which the prompts of these scenes say nothing; allowed "
                "is everything, objects, background or fid; choose one"
            )

    def _draw(self) -> list[Image.Image]:
        config, stage = self._config, self._stage
        with stage.learner.averaged_weights(), stage.run.accelerator.autocast():
            drawer = self._drawer(stage.pipeline())
            told = self._told
            parts = [told[first : first + config.batch_size] for first in range(0, len(told), config.batch_size)]
            return [image for part in parts for image in drawer.batch(part)]

    def _drawer(self, pipeline: LatentDiffusionPipeline) -> PipelineDrawer:
        config, scheduler = self._config, self._stage.config.preview.scheduler_for(self._stage.noise)
        steps, side = config.num_inference_steps, self._data.resolution
        return PipelineDrawer(pipeline, steps, config.guidance_scale, scheduler, config.batch_size, side)

    @cached_property
    def _told(self) -> list[Told]:
        count, seed = self._config.count, self._stage.run.seed
        if self._scenes is not None:
            return told_scenes(self._scenes, count, seed)
        return told_samples(self._stage.pipeline(), self._source, self._data, count, seed)

    @cached_property
    def _reference(self) -> Reference:
        images = fixed_images(self._source, self._data, self._config.reference, _BATCH)
        return make_reference(extract_features(self._extractor, images, "reference"), "validation", "")


def watch_of(stage: DiffusionStage, source: Source) -> Watch | None:
    """The watch that the stage's config asks for; `source` are the images that pictures are compared with."""
    config = stage.config.watch
    if config is None:
        return None
    return Watch(
        stage.run.folder,
        every=config.every,
        metric=config.metric,
        keep_best=config.keep_best,
        measure=PictureWatch(stage, config, source),
    )
