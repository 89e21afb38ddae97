"""Do pictures show what their prompts say, and edits what was asked? By the embeddings of a CLIP-like model."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor
from torch.nn import functional as F

from ldm.errors import UserError
from ldm.evaluation.bootstrap import mean_estimate, metric_seed
from ldm.evaluation.features import SeenThrough
from ldm.evaluation.measurement import Measurement, Setting, check_count


class JointModel(SeenThrough, Protocol):
    """Images and texts in one space; `ldm.evaluation.clip_model.ClipModel` is one."""

    def embed_images(self, images: Tensor) -> Tensor:
        """Images [B, 3, H, W] in [-1, 1] -> [B, D]."""

    def embed_texts(self, texts: Sequence[str]) -> Tensor:
        """[len(texts), D]."""


@dataclass(frozen=True)
class PromptScore:
    """The mean CLIP score of the pictures of one prompt."""

    prompt: str
    score: float
    pictures: int


@dataclass(frozen=True)
class Alignment:
    """The CLIP score, of all and of each prompt, the worst prompt first."""

    measurement: Measurement
    prompts: tuple[PromptScore, ...]


def clip_score(model: JointModel, images: Iterable[Tensor], prompts: Sequence[str], *, seed: int = 0) -> Alignment:
    """100 x max(cosine of image and prompt, 0), the mean over pictures (arXiv 2104.08718, scaled as in torchmetrics).

    `images` are batches [B, 3, H, W] in [-1, 1], as many pictures in all as `prompts`. Where every prompt has as many
    pictures, the interval resamples prompts: several pictures of one are no independent evidence. Raises `UserError`
    when the numbers differ.
    """
    embedded, resolution = _embed(model, images, "pictures")
    if len(embedded) != len(prompts):
        raise UserError(f"CLIP score: found {len(embedded)} pictures and {len(prompts)} prompts; give one for each")
    names = list(dict.fromkeys(prompts))
    texts = _texts(model, names)
    places = torch.tensor([names.index(prompt) for prompt in prompts])
    scores = 100 * F.cosine_similarity(embedded, texts[places]).clamp_min(0).double()  # [n]
    counts = torch.bincount(places, minlength=len(names))
    means = torch.zeros(len(names), dtype=torch.float64).index_add_(0, places, scores) / counts
    rows = sorted(zip(names, means.tolist(), counts.tolist(), strict=True), key=lambda row: (row[1], row[0]))
    values = means if bool((counts == counts[0]).all()) else scores
    estimate = mean_estimate(values, metric_seed(seed, "clip_score"))
    setting = _setting(model, len(prompts), resolution, "the prompts")
    return Alignment(
        Measurement("clip_score", "CLIP score", "higher", estimate, setting),
        tuple(PromptScore(*row) for row in rows),
    )


def directional_similarity(
    model: JointModel,
    before: Iterable[Tensor],
    after: Iterable[Tensor],
    texts_before: Sequence[str],
    texts_after: Sequence[str],
    *,
    seed: int = 0,
) -> Measurement:
    """Mean cosine of the change in the picture and the change in the text, -1 to 1 (arXiv 2108.00946, eq. 2).

    `before` and `after` are batches of the pictures before and after the edit. A picture that did not change at all
    counts 0. Raises `UserError` when the numbers differ, and for an edit whose two texts are the same.
    """
    first, resolution = _embed(model, before, "pictures before the edit")
    second, _ = _embed(model, after, "pictures after the edit")
    found = {len(first), len(second), len(texts_before), len(texts_after)}
    if len(found) > 1:
        raise UserError(
            f"directional similarity: found {len(first)} and {len(second)} pictures, {len(texts_before)} and "
            f"{len(texts_after)} texts; give one of each for every edit"
        )
    same = [text for text, other in zip(texts_before, texts_after, strict=True) if text == other]
    if same:
        raise UserError(f"directional similarity: found {same[0]!r} before and after; allowed are two different texts")
    normal = F.normalize
    pictures = normal(second) - normal(first)  # [n, D]
    texts = normal(_texts(model, texts_after)) - normal(_texts(model, texts_before))
    values = F.cosine_similarity(pictures, texts)
    estimate = mean_estimate(values, metric_seed(seed, "directional_similarity"))
    setting = _setting(model, len(values), resolution, "the change of the text")
    return Measurement("directional_similarity", "CLIP directional similarity", "higher", estimate, setting)


def _embed(model: JointModel, batches: Iterable[Tensor], what: str) -> tuple[Tensor, int]:
    """[n, D], and the pictures' side."""
    parts: list[Tensor] = []
    resolution = 0
    for images in batches:
        parts.append(model.embed_images(images))
        resolution = max(images.shape[-2:])
    check_count(what, sum(len(part) for part in parts), 1, "CLIP score")
    return torch.cat(parts), resolution


def _texts(model: JointModel, texts: Sequence[str], batch: int = 256) -> Tensor:
    return torch.cat([model.embed_texts(texts[first : first + batch]) for first in range(0, len(texts), batch)])


def _setting(model: JointModel, count: int, resolution: int, reference: str) -> Setting:
    return Setting(
        n=count,
        resolution=resolution,
        extractor=f"{model.name} at {model.resolution} px (weights {model.weights})",
        resize_filter=model.resize_filter,
        reference=reference,
    )
