"""What generated images are compared with: statistics of a reference set, kept in a file that says what they are of."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from ldm.errors import UserError, user_input
from ldm.evaluation.features import FeatureExtractor, FeatureSet
from ldm.evaluation.measurement import check_count
from ldm.evaluation.statistics import Moments
from ldm.files import whole_file

FORMAT = 1
_KEY = "ldm.reference"


@dataclass(frozen=True, kw_only=True)
class Provenance:
    """What statistics are of. Two that differ anywhere must not be compared."""

    data: str
    """The data set's fingerprint (`Source.fingerprint`), with which part of it was taken."""
    count: int
    """Images."""
    resolution: int
    """Their side in pixels."""
    extractor: str
    weights: str
    extractor_resolution: int
    resize_filter: str


@dataclass(frozen=True)
class Reference:
    """Features of the reference images and their moments, and where they come from."""

    name: str
    """What a reader calls the set, such as `validation images of configs/demo`."""
    provenance: Provenance
    rows: Tensor
    """[n, D] pooled features, float32."""
    pooled: Moments
    spatial: Moments | None

    def __len__(self) -> int:
        return self.provenance.count


def provenance_of(extractor: FeatureExtractor, data: str, count: int, resolution: int) -> Provenance:
    """What statistics of `count` images of `data` through `extractor` would say of themselves."""
    return Provenance(
        data=data,
        count=count,
        resolution=resolution,
        extractor=extractor.name,
        weights=extractor.weights,
        extractor_resolution=extractor.resolution,
        resize_filter=extractor.resize_filter,
    )


def make_reference(found: FeatureSet, name: str, data: str) -> Reference:
    """The statistics of a set of images with the fingerprint `data`. Raises `UserError` for fewer than two images."""
    check_count(f"reference {name}", len(found), 2, "reference statistics")
    provenance = Provenance(
        data=data,
        count=len(found),
        resolution=found.resolution,
        extractor=found.extractor,
        weights=found.weights,
        extractor_resolution=found.extractor_resolution,
        resize_filter=found.resize_filter,
    )
    features = found.features
    spatial = None if features.spatial is None else Moments.of(features.spatial)
    return Reference(name, provenance, features.pooled, Moments.of(features.pooled), spatial)


def save_reference(path: str | Path, reference: Reference) -> None:
    """Write one safetensors file whose header holds the provenance, whole or not at all. Raises `UserError`."""
    tensors = {"rows": reference.rows.float().contiguous(), **_packed("pooled", reference.pooled)}
    if reference.spatial is not None:
        tensors |= _packed("spatial", reference.spatial)
    header = {"format": FORMAT, "name": reference.name, **asdict(reference.provenance)}
    with whole_file(path) as partial:
        save_file(tensors, partial, metadata={_KEY: json.dumps(header)})


def load_reference(path: str | Path, expected: Provenance) -> Reference:
    """The statistics in `path`, if they are what `expected` says. Raises `UserError` naming what differs."""
    path = Path(path)
    with (
        user_input(f"reference statistics {path}", OSError, SafetensorError, json.JSONDecodeError),
        safe_open(path, "pt") as file,
    ):
        header = json.loads((file.metadata() or {}).get(_KEY, "{}"))
        tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118 - it is no dict
    for field, wanted in {"format": FORMAT, **asdict(expected)}.items():
        if header.get(field) != wanted:
            raise UserError(
                f"reference statistics {path}: made with {field} = {header.get(field)}, this run has {wanted}; "
                "delete the file to make it anew, or name another"
            )
    with user_input(f"reference statistics {path}: incomplete; delete the file to make it anew", KeyError):
        spatial = _unpacked("spatial", tensors) if "spatial.mean" in tensors else None
        return Reference(header["name"], expected, tensors["rows"], _unpacked("pooled", tensors), spatial)


def cached_reference(path: str | Path, expected: Provenance, make: Callable[[], Reference]) -> Reference:
    """The statistics in `path`, made by `make` and saved first if there is no such file.

    Raises `UserError` if the file is of something else.
    """
    if Path(path).exists():
        return load_reference(path, expected)
    reference = make()
    if reference.provenance != expected:
        raise UserError(
            f"reference statistics {path}: found {reference.provenance}; expected {expected}; "
            "`ldm data check` lists images that cannot be read"
        )
    save_reference(path, reference)
    return reference


def check_same(samples: FeatureSet, reference: Reference) -> None:
    """Raise `UserError`, naming it, for anything in which the samples were seen otherwise than the reference."""
    mine = reference.provenance
    for field, found, wanted in (
        ("resolution", samples.resolution, mine.resolution),
        ("extractor", samples.extractor, mine.extractor),
        ("weights", samples.weights, mine.weights),
        ("extractor_resolution", samples.extractor_resolution, mine.extractor_resolution),
        ("resize_filter", samples.resize_filter, mine.resize_filter),
    ):
        if found != wanted:
            raise UserError(
                f"{field}: found {found} for the samples and {wanted} for the reference {reference.name}; "
                "allowed is the same; make the reference anew with these samples' setting"
            )


def _packed(name: str, moments: Moments) -> dict[str, Tensor]:
    return {
        f"{name}.count": torch.tensor([moments.count]),
        f"{name}.mean": moments.mean.contiguous(),
        f"{name}.scatter": moments.scatter.contiguous(),
    }


def _unpacked(name: str, tensors: dict[str, Tensor]) -> Moments:
    moments = Moments(len(tensors[f"{name}.mean"]))
    moments.count = int(tensors[f"{name}.count"])
    moments.mean, moments.scatter = tensors[f"{name}.mean"], tensors[f"{name}.scatter"]
    return moments
