"""All figures of a set of generated images against a reference, each with its interval and setting."""

from __future__ import annotations

from dataclasses import dataclass

from ldm.evaluation.bootstrap import metric_seed
from ldm.evaluation.features import FeatureSet
from ldm.evaluation.frechet import fid
from ldm.evaluation.inception_score import inception_score
from ldm.evaluation.kernel_distance import kid
from ldm.evaluation.manifold import manifold
from ldm.evaluation.measurement import Better, Estimate, Measurement, Setting
from ldm.evaluation.reference import Reference, check_same


@dataclass(frozen=True)
class _Kind:
    label: str
    better: Better
    unit: str = ""


KINDS = {
    "fid": _Kind("FID", "lower"),
    "sfid": _Kind("sFID", "lower"),
    "kid": _Kind("KID", "lower"),
    "inception_score": _Kind("Inception score", "higher"),
    "precision": _Kind("precision", "higher"),
    "recall": _Kind("recall", "higher"),
    "density": _Kind("density", "higher"),
    "coverage": _Kind("coverage", "higher"),
}
"""What `measure_images` can measure, by name."""


def measure_images(
    samples: FeatureSet, reference: Reference, *, seed: int = 0, replicates: int = 100
) -> list[Measurement]:
    """Every figure that the extractor's features allow: without spatial features no sFID, without logits no IS.

    `replicates` are the resamplings of FID, sFID, KID and IS; the first two take an eigenvalue problem each. Raises
    `UserError` for too few images, and if samples and reference were not seen alike.
    """
    check_same(samples, reference)
    features = samples.features
    seeds = {name: metric_seed(seed, name) for name in KINDS}
    found: dict[str, Estimate] = {"fid": fid(features.pooled, reference.pooled, seeds["fid"], replicates)}
    if features.spatial is not None and reference.spatial is not None:
        found["sfid"] = fid(features.spatial, reference.spatial, seeds["sfid"], replicates)
    found["kid"] = kid(features.pooled, reference.rows, seeds["kid"], replicates)
    if features.logits is not None:
        found["inception_score"] = inception_score(features.logits, seeds["inception_score"], replicates)
    balls = manifold(features.pooled, reference.rows, seeds["density"])
    for name in ("precision", "recall", "density", "coverage"):
        found[name] = getattr(balls, name)
    return [_measurement(name, estimate, samples, reference) for name, estimate in found.items()]


def _measurement(name: str, estimate: Estimate, samples: FeatureSet, reference: Reference) -> Measurement:
    kind = KINDS[name]
    compared = name != "inception_score"
    setting = Setting(
        n=len(samples),
        resolution=samples.resolution,
        extractor=samples.seen_through,
        resize_filter=samples.resize_filter,
        reference=reference.name if compared else None,
        reference_n=len(reference) if compared else None,
    )
    return Measurement(name, kind.label, kind.better, estimate, setting, kind.unit)
