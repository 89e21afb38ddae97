"""Does a model obey each of its conditions, alone and together? Measured on held-out scenes by the exact scorer.

Every rate is a mean over tasks and stands beside its baseline, measured by shuffling the answers: the same rate when
each task is judged by the picture drawn for the next task. Who ignores a condition does no better than that. The rates
called "followed" change one condition and nothing else, the seed included, and count the tasks in which both pictures
show what each was told: who ignores the condition draws the same picture twice and scores 0. Where a prompt gives away
what the map shows, the map's baseline is the picture drawn with that prompt and seed for another map.
"""

from __future__ import annotations

import difflib
import random
from collections.abc import Callable, Collection, Sequence
from dataclasses import dataclass, replace
from typing import Protocol

import numpy as np
from PIL import Image

from conditioning.conditions import CONDITIONS
from ldm.data.scene_rendering import Scene, caption, render_image, render_semantic
from ldm.data.scenes import ScenesConfig, scene_at
from ldm.errors import UserError, user_input
from ldm.evaluation.condition_report import (
    Answers,
    ConditionsReport,
    Measurement,
    coloured_maps,
    hole_rows,
    map_rows,
    measurement_of,
    rates_of,
)
from ldm.evaluation.maps import mean_iou, recover_map
from ldm.evaluation.scene_edits import on_another_background, rearranged, recoloured, with_another_object
from ldm.evaluation.scene_holes import (
    continues_background,
    hole_alone,
    hole_mask,
    hole_over,
    mean_seams,
    names_in_hole,
    only_first_object,
    same_outside,
)
from ldm.evaluation.scenes import NOTHING, Array, SceneScore, score_image
from ldm.randomness import derive_seed


class Drawer(Protocol):
    """A model, or anything else that draws."""

    def __call__(
        self,
        *,
        prompt: Sequence[str],
        semantic: Sequence[Image.Image | None] | None,
        images: Sequence[Image.Image] | None,
        masks: Sequence[Image.Image] | None,
        labels: Sequence[int] | None,
        seeds: Sequence[int],
    ) -> list[Image.Image]:
        """One picture for each seed, of the measurement's resolution; the drawer splits them into batches.

        `prompt` is "" where there is no text. Maps are mode L with class indices, images RGB, masks L with 255 =
        repaint, labels indices of the scenes' objects; None = the condition is absent.
        """


def measure_conditions(
    drawer: Drawer, config: ScenesConfig, names: Collection[str], count: int, seed: int, resolution: int
) -> ConditionsReport:
    """Measure the conditions in `names`, those the drawer has, on `count` held-out scenes at `resolution` pixels.

    "text", "label", "semantic" and "inpainting" alone; "semantic+text" and "inpainting+text" if both are named. What is
    not named is not measured and not in the report. At most 13 x `count` pictures are drawn.

    Raises `UserError` for unknown names, for a vocabulary too small to change anything in a scene, and when
    nothing is held out; all before the first picture.
    """
    _check_names(names, config)
    if count < 2 or resolution < 16:
        raise UserError(f"count, resolution: found {count}, {resolution}; allowed is 2 and 16 or more; raise them")
    _check_vocabulary(config, names)
    with user_input("held-out scenes", ValueError):
        config = replace(config, split="held_out", seed=derive_seed(seed, "measured conditions"))
    seeds = tuple(derive_seed(seed, "drawn conditions", index) % 2**32 for index in range(count))
    exam = Exam(drawer, config, tuple(scene_at(config, index) for index in range(count)), seeds, resolution)
    measures: dict[tuple[str, ...], Callable[[Exam], Measurement]] = {
        ("text",): measure_text,
        ("label",): measure_label,
        ("semantic",): measure_semantic,
        ("semantic", "text"): measure_semantic_and_text,
        ("inpainting",): measure_inpainting,
        ("inpainting", "text"): measure_inpainting_and_text,
    }
    chosen = {given: measure for given, measure in measures.items() if set(given) <= set(names)}
    return ConditionsReport({"+".join(k): measure(exam) for k, measure in chosen.items()}, count, seed, resolution)


@dataclass(frozen=True)
class Exam:
    """The scenes that a drawer is asked for."""

    drawer: Drawer
    config: ScenesConfig
    scenes: tuple[Scene, ...]
    seeds: tuple[int, ...]
    resolution: int

    def draw(
        self,
        *,
        prompts: Sequence[str] | None = None,
        maps: Sequence[Image.Image] | None = None,
        images: Sequence[Image.Image] | None = None,
        masks: Sequence[Image.Image] | None = None,
        labels: Sequence[int] | None = None,
    ) -> list[Image.Image]:
        """The drawer's pictures, RGB, always for the same seeds. Raises `ValueError` for another number or size."""
        words = [""] * len(self.seeds) if prompts is None else prompts
        drawn = self.drawer(prompt=words, semantic=maps, images=images, masks=masks, labels=labels, seeds=self.seeds)
        found, wanted = {picture.size for picture in drawn}, (self.resolution, self.resolution)
        if len(drawn) != len(self.seeds) or found != {wanted}:
            raise ValueError(f"drawer: found {len(drawn)} of sizes {found}; allowed is {len(self.seeds)} of {wanted}")
        return [picture.convert("RGB") for picture in drawn]

    def images(self, scenes: Sequence[Scene]) -> list[Image.Image]:
        """The true pictures."""
        return [render_image(scene, self.resolution) for scene in scenes]

    def maps(self, scenes: Sequence[Scene]) -> list[Image.Image]:
        """The true semantic maps."""
        return [render_semantic(scene, self.resolution, self.config.object_names) for scene in scenes]

    def draws(self, name: str) -> list[Callable[[], float]]:
        """For each scene a source of random numbers in [0, 1) of its own."""
        return [random.Random(derive_seed(self.config.seed, name, i)).random for i in range(len(self.scenes))]

    def change(self, edit: Callable[[Scene, ScenesConfig, Callable[[], float]], Scene], name: str) -> list[Scene]:
        """Every scene with one thing changed."""
        return [edit(scene, self.config, draw) for scene, draw in zip(self.scenes, self.draws(name), strict=True)]


def measure_text(exam: Exam) -> Measurement:
    """Text alone: the scorer's rates; followed: with another colour in the prompt, both pictures have their colour.

    Here and below, the colour that is changed is that of a shape; with emoji, which have their own, the background's.
    """
    changed = exam.change(recoloured, "colour")
    prompts, others = _prompts(exam.scenes), _prompts(changed)
    before, after = exam.draw(prompts=prompts), exam.draw(prompts=others)

    def judge(i: int, pair: tuple[Image.Image, Image.Image]) -> Answers:
        score, other = score_image(pair[0], exam.scenes[i], exam.config), score_image(pair[1], changed[i], exam.config)
        parts = ("background", "objects", "colours", "sizes", "relation", "everything")
        return {
            **{part: getattr(score, part) for part in parts},
            "text_followed": _colour_right(score) and _colour_right(other),
        }

    rates = rates_of(list(zip(before, after, strict=True)), judge, ("text",))
    return measurement_of(("text",), rates, [(before, prompts), (after, others)])


def measure_label(exam: Exam) -> Measurement:
    """Label alone: its object is drawn; followed: another label, with the same seed, gives that label's object."""
    changed = exam.change(with_another_object, "label")
    labels, others = (
        [exam.config.object_names.index(s.objects[0].name) for s in side] for side in (exam.scenes, changed)
    )
    before, after = exam.draw(labels=labels), exam.draw(labels=others)

    def judge(i: int, pair: tuple[Image.Image, Image.Image]) -> Answers:
        right = score_image(pair[0], exam.scenes[i], exam.config).objects
        return {"object": right, "label_followed": right and score_image(pair[1], changed[i], exam.config).objects}

    rates = rates_of(list(zip(before, after, strict=True)), judge, ("label",))
    names = [[f"label: {exam.config.object_names[label]}" for label in side] for side in (labels, others)]
    return measurement_of(("label",), rates, [(before, names[0]), (after, names[1])])


def measure_semantic(exam: Exam) -> Measurement:
    """Map alone: mean IoU of the map given and the one recovered from the picture.

    Followed: with another scene's map, each of the two pictures agrees better with its own map than with the other.
    """
    others = exam.maps([scene_at(exam.config, len(exam.scenes) + index) for index in range(len(exam.scenes))])
    maps = exam.maps(exam.scenes)
    before, after = exam.draw(maps=maps), exam.draw(maps=others)

    def judge(i: int, pair: tuple[Array, Array]) -> Answers:
        overlap = _overlaps(exam, (maps[i], others[i]), pair)
        return {"map_iou": overlap[0][0], "semantic_followed": _follows(overlap)}

    recovered = [(recover_map(a, exam.config), recover_map(b, exam.config)) for a, b in zip(before, after, strict=True)]
    rates = rates_of(recovered, judge, ("semantic",))
    return measurement_of(("semantic",), rates, [*map_rows(maps, before), *map_rows(others, after)])


def measure_semantic_and_text(exam: Exam) -> Measurement:
    """Map and prompt: the map's IoU and the prompt's colours, of which the map says nothing.

    Text followed: with another colour in the prompt and the same map, both pictures have their colour. Semantic
    followed: with the same prompt and a map of the same objects at other places, each picture agrees better with its
    own map. The baseline of `map_iou` is the picture for those other places, as the prompt names the map's objects.
    """
    changed, moved = exam.change(recoloured, "colour"), exam.change(rearranged, "place")
    prompts, others, maps, places = _prompts(exam.scenes), _prompts(changed), exam.maps(exam.scenes), exam.maps(moved)
    before, after = exam.draw(prompts=prompts, maps=maps), exam.draw(prompts=others, maps=maps)
    elsewhere = exam.draw(prompts=prompts, maps=places)
    recovered = [[recover_map(picture, exam.config) for picture in side] for side in (before, elsewhere)]

    def judge(i: int, answer: tuple[Image.Image, Image.Image, Array, Array]) -> Answers:
        score, other = (
            score_image(answer[0], exam.scenes[i], exam.config),
            score_image(answer[1], changed[i], exam.config),
        )
        overlap = _overlaps(exam, (maps[i], places[i]), answer[2:])
        return {
            "map_iou": (overlap[0][0], overlap[0][1]),
            "semantic_followed": _follows(overlap),
            "background": score.background,
            "colours": score.colours,
            "text_followed": _colour_right(score) and _colour_right(other),
        }

    needs = {"map_iou": ("semantic",), "semantic_followed": ("semantic",)}
    rates = rates_of(list(zip(before, after, *recovered, strict=True)), judge, ("text",), needs)
    rows = [(coloured_maps(maps), ["map"] * len(maps)), (before, prompts), (after, others)]
    return measurement_of(("semantic", "text"), rates, [*rows, *map_rows(places, elsewhere, prompts)])


def measure_inpainting(exam: Exam) -> Measurement:
    """Inpainting alone, with a hole over one object.

    `outside_identical`: the pixels outside are the given ones, byte for byte. `background_continued`: the median colour
    along the hole's inner edge is the background's. `in_vocabulary`: so it is, and all that stands in the hole, if
    anything, is an object of the vocabulary. Followed: with the same scene on another background given, the first
    two hold for both pictures. Figure `plain`: the share of holes filled with the background alone.
    """
    holes = [hole_over(scene, exam.resolution) for scene in exam.scenes]
    given, masks = exam.images(exam.scenes), [hole_mask(hole, exam.resolution) for hole in holes]
    changed = exam.change(on_another_background, "background")
    others = exam.images(changed)
    before, after = exam.draw(images=given, masks=masks), exam.draw(images=others, masks=masks)

    def judge(i: int, pair: tuple[Image.Image, Image.Image]) -> Answers:
        sides = zip(pair, (given[i], others[i]), (exam.scenes[i], changed[i]), strict=True)
        (kept, ground), (kept_too, ground_too) = [
            (same_outside(picture, image, masks[i]), continues_background(picture, holes[i], scene))
            for picture, image, scene in sides
        ]
        names = names_in_hole(pair[0], holes[i], exam.scenes[i], exam.config)
        return {
            "outside_identical": kept,
            "background_continued": ground,
            "in_vocabulary": ground and NOTHING not in names,
            "inpainting_followed": kept and kept_too and ground and ground_too,
        }

    rates = rates_of(list(zip(before, after, strict=True)), judge, ("inpainting",))
    tasks = zip(before, holes, exam.scenes, strict=True)
    plain = np.mean([not names_in_hole(picture, hole, scene, exam.config) for picture, hole, scene in tasks])
    rows = [*hole_rows(given, masks, before), *hole_rows(others, masks, after)]
    return measurement_of(("inpainting",), rates, rows, {"plain": float(plain)})


def measure_inpainting_and_text(exam: Exam) -> Measurement:
    """A hole over one object, and a prompt that names the scene with another object of another colour there.

    `object`, `colour`: what is in the hole, judged without its surroundings. `whole`: the picture shows all that the
    prompt says, and the pixels outside are the given ones. Followed: with a third object in the prompt, each
    picture's hole holds its own. Figures: `seam_gradient` and `image_gradient`, the means of `SeamFigure.seam` and
    `.image` over the pictures (0 to 255), and the same of the true pictures of what the prompts say.
    """
    holes = [hole_over(scene, exam.resolution) for scene in exam.scenes]
    given, masks = exam.images(exam.scenes), [hole_mask(hole, exam.resolution) for hole in holes]
    targets = exam.change(with_another_object, "hole")
    drawn = zip(exam.scenes, exam.draws("hole again"), targets, strict=True)
    thirds = [with_another_object(scene, exam.config, draw, unlike=target) for scene, draw, target in drawn]
    prompts, others = _prompts(targets), _prompts(thirds)
    before = exam.draw(prompts=prompts, images=given, masks=masks)
    after = exam.draw(prompts=others, images=given, masks=masks)

    def judge(i: int, pair: tuple[Image.Image, Image.Image]) -> Answers:
        filled = [
            score_image(hole_alone(picture, holes[i], scene), only_first_object(scene), exam.config)
            for picture, scene in zip(pair, (targets[i], thirds[i]), strict=True)
        ]
        kept = same_outside(pair[0], given[i], masks[i])
        return {
            "outside_identical": kept,
            "object": filled[0].objects,
            "colour": filled[0].colours,
            "whole": kept and score_image(pair[0], targets[i], exam.config).everything,
            "text_followed": filled[0].objects and filled[1].objects,
        }

    both = ("inpainting", "text")
    rates = rates_of(list(zip(before, after, strict=True)), judge, both, {"outside_identical": ("inpainting",)})
    figures = {**mean_seams(before, masks), **mean_seams(exam.images(targets), masks, "true_")}
    rows = [*hole_rows(given, masks, before, prompts), (after, others)]
    return measurement_of(both, rates, rows, figures)


def _colour_right(score: SceneScore) -> bool:
    """Whether the picture has the colours that `recoloured` changes."""
    return score.background if score.colours is None else score.colours


def _overlaps(exam: Exam, given: Sequence[Image.Image], found: Sequence[Array]) -> list[list[float]]:
    """Mean IoU of each map given (rows) with each recovered (columns)."""
    classes = len(exam.config.object_names) + 1
    return [[mean_iou(np.asarray(wanted), seen, classes) for seen in found] for wanted in given]


def _follows(overlap: list[list[float]]) -> bool:
    """Whether each of two maps agrees better with the picture drawn for it than with the other one."""
    return overlap[0][0] > overlap[0][1] and overlap[1][1] > overlap[1][0]


def _prompts(scenes: Sequence[Scene]) -> list[str]:
    return [caption(scene) for scene in scenes]


def _check_names(names: Collection[str], config: ScenesConfig) -> None:
    if not names:
        raise UserError(f"conditions: found none; allowed are {', '.join(CONDITIONS)}; name those that the model has")
    for name in names:
        if name not in CONDITIONS:
            near = difflib.get_close_matches(name, CONDITIONS, 1)
            advice = f"did you mean {near[0]!r}?" if near else "name those that the model has"
            raise UserError(f"conditions: found {name!r}; allowed are {', '.join(CONDITIONS)}; {advice}")
    if "label" in names and config.max_objects > 1:
        raise UserError(
            f"conditions: found label with max_objects {config.max_objects}; a label says the only object of a scene; "
            "set max_objects to 1 or leave label out"
        )


def _check_vocabulary(config: ScenesConfig, names: Collection[str]) -> None:
    """Whether every scene leaves something to change it to."""
    objects, grounds, most = len(config.object_names), config.background_names, config.max_objects
    spare = min(len(set(config.colour_names) - {ground}) for ground in grounds)
    if "text" in names and config.kind == "shapes" and spare < 2:
        raise UserError("colours: found fewer than 2 on some background; a change of colour needs 2; name more")
    shared = len(set(grounds) & set(config.colour_names))
    if ("inpainting" in names or config.kind == "emoji") and len(grounds) - 1 - min(most, shared) < 1:
        raise UserError("backgrounds: found no other for some scenes; a change of background needs one; name more")
    needed = most + 2 if {"inpainting", "text"} <= set(names) else 2 if "label" in names else 1
    if objects < needed:
        raise UserError(f"objects: found {objects}; a change of object needs {needed} or more; name more")
