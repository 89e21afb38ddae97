"""The scene scorer: right about true scenes, also when they are degraded, and right about wrong ones."""

from __future__ import annotations

import dataclasses
import random

import numpy as np
import pytest
from PIL import Image, ImageFilter
from scene_pictures import needs_font

from ldm.data.scene_rendering import EMOJI, PALETTE, Scene, SceneObject, render_image
from ldm.data.scenes import ScenesConfig, scene_at
from ldm.evaluation.scenes import (
    NOTHING,
    SceneScore,
    confusion_matrix,
    find_background,
    find_shapes,
    rates,
    score_each,
    score_image,
    score_images,
)

DEMO = ScenesConfig(
    objects=("circle", "square", "triangle", "star"),
    colours=("red", "green", "blue", "yellow", "purple", "orange"),
    backgrounds=("white", "black", "grey", "light blue", "light pink", "beige"),
    sizes=("large",),
    held_out=0.2,
)
ONE = ScenesConfig()
TWO = ScenesConfig(max_objects=2)
THREE = ScenesConfig(min_objects=3, max_objects=3)
SOME_EMOJI = tuple(EMOJI)[::5]
EMOJI_ONE = ScenesConfig(kind="emoji")
EMOJI_TWO = ScenesConfig(kind="emoji", objects=SOME_EMOJI, max_objects=2)
EMOJI_THREE = ScenesConfig(kind="emoji", objects=SOME_EMOJI, min_objects=3, max_objects=3)


def pictures(config: ScenesConfig, resolution: int, count: int) -> tuple[list[Image.Image], list[Scene]]:
    scenes = [scene_at(config, index) for index in range(count)]
    return [render_image(scene, resolution) for scene in scenes], scenes


def degraded(image: Image.Image, seed: int, blur: float = 0.6, noise: float = 4.0) -> Image.Image:
    """Slightly blurred (pixels) and noisy (of 255), as generated pictures are."""
    blurred = np.asarray(image.filter(ImageFilter.GaussianBlur(blur)), dtype=float)
    noisy = blurred + np.random.default_rng(seed).normal(0, noise, blurred.shape)
    return Image.fromarray(noisy.clip(0, 255).round().astype(np.uint8))


@pytest.mark.parametrize("split", ["train", "held_out"])
@pytest.mark.parametrize(
    ("config", "resolution", "count"),
    [
        pytest.param(DEMO, 32, 120, id="demo-32"),
        pytest.param(ONE, 32, 120, id="one-32"),
        pytest.param(TWO, 64, 100, id="two-64"),
        pytest.param(THREE, 64, 40, id="three-64"),
        pytest.param(EMOJI_ONE, 32, 40, id="emoji-32", marks=needs_font),
        pytest.param(EMOJI_TWO, 64, 40, id="emoji-two-64", marks=needs_font),
        pytest.param(EMOJI_THREE, 64, 20, id="emoji-three-64", marks=needs_font),
    ],
)
def test_true_scenes_are_found_right(config: ScenesConfig, resolution: int, count: int, split: str) -> None:
    config = dataclasses.replace(config, split=split)
    result = score_images(*pictures(config, resolution, count), config)
    assert result.pop("images") == count
    parts = {"background", "objects", "everything"}
    parts |= {"colours"} if config.kind == "shapes" else set()
    parts |= {"sizes"} if config.says_sizes() else set()
    parts |= {"relation"} if config.max_objects == 2 else set()
    assert set(result) == parts
    assert min(result.values()) >= 0.99, result


@pytest.mark.parametrize(
    ("config", "resolution", "count"),
    [(DEMO, 32, 100), (ONE, 32, 100), (TWO, 64, 60), pytest.param(EMOJI_TWO, 64, 30, marks=needs_font)],
    ids=["demo-32", "one-32", "two-64", "emoji-two-64"],
)
def test_degraded_scenes_are_found_right(config: ScenesConfig, resolution: int, count: int) -> None:
    images, scenes = pictures(config, resolution, count)
    result = score_images([degraded(image, index) for index, image in enumerate(images)], scenes, config)
    assert min(result.values()) >= 0.97, result


@pytest.mark.parametrize(
    ("config", "resolution"),
    [(DEMO, 32), (ONE, 32), pytest.param(EMOJI_ONE, 32, marks=needs_font)],
    ids=["demo", "one", "emoji"],
)
def test_shuffled_scenes_score_exactly_their_coincidences(config: ScenesConfig, resolution: int) -> None:
    """Right only where the two scenes happen to agree, and there always."""
    images, scenes = pictures(config, resolution, 120)
    order = random.Random(0).sample(range(120), 120)
    shown, scores = [scenes[index] for index in order], score_each([images[index] for index in order], scenes, config)
    for score, real, prompted in zip(scores, shown, scenes, strict=True):
        thing, named = real.objects[0], prompted.objects[0]
        assert score.background == (real.background == prompted.background)
        assert score.objects == (thing.name == named.name)
        assert score.colours == (None if config.kind == "emoji" else thing.colour == named.colour)
        assert score.sizes == (thing.size == named.size if prompted.sized else None)
        assert score.found == ((named.name, thing.name),)
    result = rates(scores)
    assert result["background"] == pytest.approx(1 / len(config.background_names), abs=0.12)
    assert result["objects"] == pytest.approx(1 / len(config.object_names), abs=0.12)
    assert result["everything"] < 0.1


def test_shuffled_pairs_score_near_chance() -> None:
    config = ScenesConfig(min_objects=2, max_objects=2)
    images, scenes = pictures(config, 64, 100)
    result = score_images(images[1:] + images[:1], scenes, config)
    assert result["background"] < 0.2 and result["objects"] < 0.08 and result["colours"] < 0.1
    assert 0.1 < result["relation"] < 0.42  # one of four
    assert result["everything"] == 0


def changed(scene: Scene, part: str, config: ScenesConfig) -> Scene:
    """The scene with one thing about its first object, or the background, changed to another of the config's."""
    first = scene.objects[0]
    if part == "background":
        used = {scene.background, *(thing.colour for thing in scene.objects)}
        return dataclasses.replace(scene, background=next(n for n in config.background_names if n not in used))
    if part == "objects":
        used = {thing.name for thing in scene.objects}
        first = dataclasses.replace(first, name=next(name for name in config.object_names if name not in used))
    if part == "colours":
        used = {scene.background, first.colour}
        first = dataclasses.replace(first, colour=next(name for name in config.colour_names if name not in used))
    if part == "sizes":
        left, top, side = first.box
        to = 0.24 if first.size == "large" else 0.37
        first = dataclasses.replace(first, box=(left + (side - to) / 2, top + (side - to) / 2, to))
    return dataclasses.replace(scene, objects=(first, *scene.objects[1:]))


@pytest.mark.parametrize("part", ["background", "objects", "colours", "sizes", "relation"])
def test_one_wrong_thing_makes_just_that_part_wrong(part: str) -> None:
    config = ScenesConfig(min_objects=2, max_objects=2)
    checked = 0
    for index in range(60):
        scene = scene_at(config, index)
        if part == "relation":
            boxes = [thing.box for thing in scene.objects]
            swapped = [dataclasses.replace(t, box=b) for t, b in zip(scene.objects, boxes[::-1], strict=True)]
            if scene.objects[0].size != scene.objects[1].size:
                continue  # their boxes do not fit each other
            wrong = dataclasses.replace(scene, objects=tuple(swapped))
        else:
            wrong = changed(scene, part, config)
            (left, top, side), other = wrong.objects[0].box, wrong.objects[1].box
            gap = max(
                left - other[0] - other[2], other[0] - left - side, top - other[1] - other[2], other[1] - top - side
            )
            if gap < 0.05 or min(left, top) < 0.04 or max(left, top) + side > 0.96:
                continue  # grown into the other or over the margin
        score = score_image(render_image(wrong, 64), scene, config)
        parts = {name: getattr(score, name) for name in ("background", "objects", "colours", "sizes", "relation")}
        assert [name for name, right in parts.items() if not right] == [part], (index, score)
        assert not score.everything
        checked += 1
    assert checked >= 15


@pytest.mark.parametrize("config", [ONE, TWO, pytest.param(EMOJI_ONE, marks=needs_font)], ids=["one", "two", "emoji"])
@pytest.mark.parametrize("noise", [0.0, 4.0])
def test_an_empty_picture_shows_nothing(config: ScenesConfig, noise: float) -> None:
    scene = scene_at(config, 0)
    empty = degraded(Image.new("RGB", (32, 32), PALETTE[scene.background]), 0, 0, noise)
    score = score_image(empty, scene, config)
    assert score.background and not score.objects and not score.everything
    assert score.found == tuple((thing.name, NOTHING) for thing in scene.objects)


def test_noise_without_a_picture_is_not_an_object() -> None:
    generator = np.random.default_rng(0)
    for index in range(20):
        noise = Image.fromarray(generator.integers(0, 256, (32, 32, 3), dtype=np.uint8))
        assert score_image(noise, scene_at(ONE, index), ONE).found[0][1] == NOTHING


def test_the_background_is_the_borders_and_its_real_colour_is_told() -> None:
    scene = dataclasses.replace(scene_at(DEMO, 3), background="light blue")
    pixels = np.asarray(render_image(scene, 32), dtype=np.float32) - 7
    name, colour = find_background(pixels, DEMO)
    assert name == "light blue"
    assert colour.tolist() == [value - 7 for value in PALETTE["light blue"]]


def test_larger_pictures_are_scored_too_and_others_refused() -> None:
    images, scenes = pictures(TWO, 256, 12)
    assert score_images(images, scenes, TWO)["everything"] == 1
    with pytest.raises(ValueError, match="image: found 32 x 31; scenes are square"):
        score_image(images[0].resize((32, 31)), scenes[0], TWO)
    with pytest.raises(ValueError, match="zip"):
        score_images(images, scenes[1:], TWO)


def test_a_missing_object_is_told_from_a_wrong_one() -> None:
    config = ScenesConfig(min_objects=2, max_objects=2, relations=True)
    for index in range(20):
        scene = scene_at(config, index)
        half = dataclasses.replace(scene, objects=scene.objects[1:])
        score = score_image(render_image(half, 64), scene, config)
        names = [thing.name for thing in scene.objects]
        assert score.found == ((names[0], NOTHING), (names[1], names[1]))
        assert (score.objects, score.colours, score.sizes, score.relation) == (False, False, False, False)


def result(*found: tuple[str, str], background: bool = True, relation: bool | None = None) -> SceneScore:
    return SceneScore(background, all(a == b for a, b in found), None, None, relation, found)


def test_rates_count_only_what_prompts_state() -> None:
    scores = [
        result(("star", "star")),
        result(("star", "ring"), background=False),
        result(("star", "star"), ("ring", "ring"), relation=False),
        result(("ring", NOTHING)),
    ]
    assert rates(scores) == {"images": 4, "background": 0.75, "objects": 0.5, "relation": 0, "everything": 0.25}
    assert rates([]) == {"images": 0}


def test_the_confusion_matrix() -> None:
    scores = [result(("star", "star"), ("ring", NOTHING)), result(("star", "ring")), result(("star", "star"))]
    assert confusion_matrix(scores) == {"star": {"star": 2, "ring": 1}, "ring": {NOTHING: 1}}


def test_objects_are_located_to_the_pixel() -> None:
    scene = Scene("shapes", "white", (SceneObject("star", "red", "large", (0.25, 0.125, 0.375)),), None, True)
    pixels = np.asarray(render_image(scene, 64), dtype=np.float32)
    (found,) = find_shapes(pixels, *find_background(pixels, TWO), TWO)
    assert (found.name, found.colour) == ("star", "red")
    assert (found.x, found.y, found.side) == pytest.approx((0.25 + 0.1875, 0.125 + 0.1875, 0.375))
    assert found.match == pytest.approx(1, abs=0.01)
