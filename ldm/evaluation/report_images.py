"""The report's figures of generated pictures: FID and friends through each extractor, and the pictures themselves."""

from __future__ import annotations

from collections.abc import Iterable, Sequence

from PIL import Image
from torch import Tensor

from ldm.evaluation.features import FeatureExtractor, extract_features
from ldm.evaluation.image_metrics import measure_images
from ldm.evaluation.measurement import Measurement
from ldm.evaluation.page import Shown, gallery, note, paragraph
from ldm.evaluation.page_charts import Bar, bar_chart
from ldm.evaluation.page_text import Html
from ldm.evaluation.reference import Reference
from ldm.evaluation.report import Section, figures_table, interval_text

SHARES = ("precision", "recall", "density", "coverage")
OWN_EYES = (
    "These figures are seen through the model's own autoencoder. It needs no download and orders models that share it, "
    "but it is not Inception: do not compare its FID with published ones, nor with those of another autoencoder."
)
SCENE_EYES = (
    "These features are what the exact scorer measures: backgrounds, objects, colours, places. They tell whether the "
    "model draws everything as often as the data does, not how clean the drawing is."
)


def samples_section(pictures: Sequence[Image.Image], captions: Sequence[str], flags: Sequence[str], of: int) -> Section:
    """The first pictures as they came, none chosen."""
    shown = [Shown(*each) for each in zip(pictures, captions, flags, strict=True)]
    told = f"The first {len(shown)} of {of} pictures, in the order of their seeds; none was chosen."
    return Section(name="samples", title="Pictures", content=Html(paragraph(told) + gallery(shown)))


def image_section(
    extractor: FeatureExtractor, samples: Iterable[Tensor], reference: Reference, name: str, seed: int
) -> Section:
    """Every figure that `extractor` allows of the `samples` against a reference seen through it too."""
    figures = measure_images(extract_features(extractor, samples, "samples"), reference, seed=seed)
    return Section(
        name=f"image_metrics_{name}",
        title=f"Against real images, through {extractor.name}",
        content=image_content(figures, extractor.name),
        figures=tuple(figures),
        verdict=image_verdict(figures),
    )


def image_content(figures: Sequence[Measurement], extractor: str) -> Html:
    """The table, bars of the shares, and what the extractor cannot see."""
    eyes = {"autoencoder latents": OWN_EYES, "scene attributes": SCENE_EYES}.get(extractor)
    by_name = {figure.name: figure for figure in figures}
    bars = [
        Bar(by_name[name].label, by_name[name].value, by_name[name].estimate.low, by_name[name].estimate.high)
        for name in SHARES
        if name in by_name
    ]
    chart = bar_chart(bars, title="Do they lie among real images, and everywhere?", x_label="share (density: ratio)")
    explained = note(
        "Precision: share of pictures that lie among real images. Recall: share of real images that lie among the "
        "pictures. Density and coverage ask the same less sensitively to outliers. Intervals are over the images that "
        "are asked, the reference held fixed."
    )
    return Html("".join([note(eyes) if eyes else "", figures_table(figures), chart, explained]))


def image_verdict(figures: Sequence[Measurement]) -> str:
    """FID with its interval and warning, precision and recall."""
    by_name = {figure.name: figure for figure in figures}
    fid = by_name["fid"]
    shares = ", ".join(f"{name} {interval_text(by_name[name])}" for name in ("precision", "recall") if name in by_name)
    warnings = [words for words in fid.estimate.notes if words.startswith("warning")]
    of = f"n = {fid.setting.n} against {fid.setting.reference_n} of {fid.setting.reference}"
    return "; ".join([f"FID {interval_text(fid)} ({of})", shares, *warnings])
