"""The report's part on built-in scenes: what the exact scorer found right and wrong."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch

from ldm.evaluation.bootstrap import share_estimate
from ldm.evaluation.measurement import Measurement, Setting
from ldm.evaluation.page import note, plots
from ldm.evaluation.page_charts import Bar, bar_chart, heat_map
from ldm.evaluation.page_text import Html
from ldm.evaluation.report import Section, figures_table
from ldm.evaluation.scenes import NOTHING, SceneScore, confusion_matrix, rates

STATEMENTS = ("background", "objects", "colours", "sizes", "relation")
SCORER = "exact scene scorer"


def scene_figures(scores: Sequence[SceneScore], resolution: int) -> list[Measurement]:
    """The share of pictures in which each statement is right, with Wilson's interval; values as those of `rates`."""
    figures = []
    for part in (*STATEMENTS, "everything"):
        answers = [answer for score in scores if (answer := getattr(score, part)) is not None]
        if answers:
            setting = Setting(n=len(answers), resolution=resolution, extractor=SCORER, resize_filter="none")
            estimate = share_estimate(torch.tensor(answers))
            figures.append(Measurement(part, f"{part} right", "higher", estimate, setting))
    return figures


def scenes_section(scores: Sequence[SceneScore], resolution: int) -> Section:
    """Shares, and the confusion matrix of the objects."""
    figures = scene_figures(scores, resolution)
    bars = [Bar(one.name, one.value, one.estimate.low, one.estimate.high) for one in figures]
    chart = bar_chart(bars, title="Which statements of the prompt are right", x_label="share of pictures", largest=1.0)
    matrix = confusion_matrix(scores)
    heat = heat_map(
        matrix, title="Objects", row_label="named in the prompt", column_label="found in the picture", last=NOTHING
    )
    explained = note(
        "No network judges here: each statement is measured in the picture. Prompts are of combinations that were held "
        "out of training."
    )
    everything = figures[-1]
    low, high = (100 * (edge or 0.0) for edge in (everything.estimate.low, everything.estimate.high))
    return Section(
        name="scene_scores",
        title="Does the picture show what the prompt says?",
        content=Html(explained + plots(chart, heat) + figures_table(figures)),
        figures=tuple(figures),
        values={"confusion": matrix},
        verdict=f"{100 * everything.value:.1f} % of {len(scores)} pictures show all that the prompt says "
        f"[{low:.1f}, {high:.1f}]",
    )


def flag_of(score: SceneScore) -> str:
    """`wrong: objects, colours`, or nothing."""
    wrong = [part for part in STATEMENTS if getattr(score, part) is False]
    return f"wrong: {', '.join(wrong)}" if wrong else ""


def captioned(prompts: Sequence[str], scores: Sequence[SceneScore]) -> list[str]:
    """The prompts; where a picture does not show all of one, with what is wrong. Without scores the prompts alone."""
    flags = [flag_of(score) for score in scores] or [""] * len(prompts)
    return [prompt + (f"  [{flag}]" if flag else "") for prompt, flag in zip(prompts, flags, strict=True)]


def describe(result: Mapping[str, float]) -> str:
    """`64 pictures: background 95.3 %, objects ...`, of what `rates` gives."""
    parts = ", ".join(f"{name} {100 * value:.1f} %" for name, value in result.items() if name != "images")
    return f"{result['images']:.0f} pictures of held-out prompts, right are: {parts}"


def flat_scores(scores: Sequence[SceneScore]) -> dict[str, Any]:
    """The rates and the confusion matrix as metrics.json has had them from the beginning, not nested."""
    return {**rates(scores), "confusion": confusion_matrix(scores)}
