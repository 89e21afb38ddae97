"""The report's part on built-in scenes: what the exact scorer found right and wrong."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

import torch

from ldm.evaluation.bootstrap import share_estimate
from ldm.evaluation.measurement import Measurement, Setting
from ldm.evaluation.page import note, plots, table
from ldm.evaluation.page_charts import Bar, bar_chart, heat_map
from ldm.evaluation.page_text import Html
from ldm.evaluation.report import Section, figures_table, interval_text
from ldm.evaluation.scenes import NOTHING, SceneScore, confusion_matrix, rates

STATEMENTS = ("background", "objects", "colours", "sizes", "relation")
SCORER = "exact scene scorer"


def scene_figures(scores: Sequence[SceneScore], resolution: int) -> list[Measurement]:
    """The share of pictures in which each statement is right, with Wilson's interval; values as those of `rates`.

    Where the prompts name different numbers of objects, also the share for each number; and where they state relations,
    the share of relations right among the pictures that show every object. `everything` comes last.
    """
    answers = {part: [(s, getattr(s, part)) for s in scores] for part in (*STATEMENTS, "everything")}
    numbers = sorted({len(score.found) for score in scores})
    for number in numbers if len(numbers) > 1 else ():
        answers[f"objects_of_{number}"] = [(s, s.objects) for s in scores if len(s.found) == number]
    answers["relation_of_found"] = [(s, s.relation) for s in scores if s.objects]
    answers["everything"] = answers.pop("everything")
    figures = []
    for name, pairs in answers.items():
        told = [answer for _, answer in pairs if answer is not None]
        if told:
            setting = Setting(n=len(told), resolution=resolution, extractor=SCORER, resize_filter="none")
            figures.append(Measurement(name, _label(name), "higher", share_estimate(torch.tensor(told)), setting))
    return figures


def _label(name: str) -> str:
    if name == "relation_of_found":
        return "relation right where every object is there"
    number = name.removeprefix("objects_of_")
    return f"{name} right" if number == name else f"objects right, of {number} in the prompt"


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


def combinations_section(held_out: Sequence[SceneScore], trained: Sequence[SceneScore], resolution: int) -> Section:
    """How far combinations that training never showed are behind those that it did."""
    sides = [{one.name: one for one in scene_figures(scores, resolution)} for scores in (held_out, trained)]
    pairs = [(sides[0][name], sides[1][name]) for name in sides[0] if name in sides[1]]
    rows = [
        (one.label, interval_text(one), interval_text(other), f"{100 * (one.value - other.value):+.1f}")
        for one, other in pairs
    ]
    heads = ("statement", "held-out combinations", "trained ones", "points between")
    behind = {one.name: 100 * (other.value - one.value) for one, other in pairs}
    return Section(
        name="combinations",
        title="Combinations never seen in training, and those seen",
        content=Html(
            note(
                "Other scenes than training's on both sides, with as many objects; on the right every combination in "
                "them occurs there."
            )
            + table(heads, rows, numbers=(3,))
        ),
        figures=tuple(
            replace(other, name=f"trained_{other.name}", label=f"{other.label}, trained") for _, other in pairs
        ),
        values={"points_behind": behind},
        verdict=f"held-out combinations are {behind['everything']:.1f} points behind trained ones (all right), "
        f"{behind['objects']:.1f} in the objects",
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
