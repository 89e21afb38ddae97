"""Built-in scenes: pure functions of their index, honest captions and maps, and combinations kept out of training."""

from __future__ import annotations

import dataclasses
import itertools
import json
import math
import pickle
import re
from pathlib import Path

import numpy as np
import pytest
from PIL import Image
from scene_pictures import needs_font

from ldm.data import scene_rendering
from ldm.data.scene_rendering import (
    BACKGROUNDS,
    EMOJI,
    PALETTE,
    PHRASINGS,
    PLACED_PHRASINGS,
    RELATIONS,
    SHAPE_COLOURS,
    SHAPES,
    Scene,
    SceneObject,
    caption,
    captions,
    render,
    shape_mask,
)
from ldm.data.scenes import (
    MARGIN,
    SLANT,
    ScenesConfig,
    ScenesSource,
    describe,
    held_out_pairs,
    held_out_prompts,
    held_out_singles,
    is_held_out,
    scene_at,
    trained_prompts,
)
from ldm.data.scenes_folder import write_scenes
from ldm.errors import UserError

FEW = {
    "objects": ("circle", "square", "triangle", "star"),
    "colours": ("red", "green", "blue", "yellow"),
    "backgrounds": ("white", "black", "grey", "yellow"),
}
CONFIGS = {
    "one": ScenesConfig(),
    "few": ScenesConfig(**FEW, sizes=("large",)),
    "few, their one size said": ScenesConfig(**FEW, sizes=("large",), size_words="always"),
    "two": ScenesConfig(min_objects=2, max_objects=2),
    "to three": ScenesConfig(max_objects=3, relations=False),
    "three of few": ScenesConfig(**FEW, min_objects=3, max_objects=3, held_out=0.3),
    "emoji": ScenesConfig(kind="emoji"),
    "emoji to two": ScenesConfig(kind="emoji", max_objects=2, sizes=("small",)),
}
each_config = pytest.mark.parametrize("config", CONFIGS.values(), ids=list(CONFIGS))


def single(scene: Scene, thing: SceneObject) -> tuple[str, ...]:
    return (thing.name, thing.colour, scene.background) if thing.colour else (thing.name, scene.background)


# --- A pure function of the index ------------------------------------------------------------------------------------


def test_reading_is_a_pure_function_of_seed_and_index() -> None:
    config = ScenesConfig(max_objects=3, count=40)
    source = ScenesSource(config, 48)
    copy = pickle.loads(pickle.dumps(source))
    for index in reversed(range(40)):  # another order than the first pass below
        copy.read(index)
    for index in range(40):
        first, second = source.read(index), copy.read(index)
        assert np.array_equal(first.image, second.image)
        assert np.array_equal(first.semantic, second.semantic)
        assert (first.key, first.captions, first.extra) == (second.key, second.captions, second.extra)
    assert copy.fingerprint == source.fingerprint


def test_scenes_are_these_for_ever() -> None:
    """A change of these lines changes everyone's data: then raise `VERSION`."""
    scene = scene_at(ScenesConfig(), 0)
    assert caption(scene) == "a small blue half circle on a grey background"
    assert describe(scene)["boxes"] == [[0.0509, 0.4727, 0.3952]]
    assert (
        caption(scene_at(ScenesConfig(min_objects=2, max_objects=2, seed=7), 123))
        == "a small orange crescent to the right of a small orange heart on a light green background"
    )
    held = held_out_singles(ScenesConfig(**FEW))
    assert sorted(held) == [
        ("circle", "red", "grey"),
        ("square", "red", "black"),
        ("square", "yellow", "grey"),
        ("star", "red", "white"),
        ("triangle", "red", "yellow"),
        ("triangle", "yellow", "grey"),
    ]
    assert held_out_pairs(ScenesConfig(max_objects=2)) == {
        ("hourglass", "triangle"),
        ("diamond", "heart"),
        ("crescent", "ring"),
        ("circle", "half circle"),
    }


def test_other_seeds_and_indices_give_other_scenes() -> None:
    config = ScenesConfig()
    scenes = {scene_at(config, index) for index in range(300)}
    others = {scene_at(dataclasses.replace(config, seed=1), index) for index in range(300)}
    assert len(scenes) == len(others) == 300
    assert not scenes & others


def test_a_scene_is_the_same_at_every_resolution_and_without_its_picture() -> None:
    config = ScenesConfig(max_objects=2)
    small, large = ScenesSource(config, 32).read(5), ScenesSource(config, 96).read(5, with_image=False)
    assert (small.captions, small.extra) == (large.captions, large.extra)
    assert large.image is None and small.image is not None and small.image.size == (32, 32)
    assert large.semantic is not None and large.semantic.size == (96, 96)
    assert set(np.unique(small.semantic)) == set(np.unique(large.semantic))


def test_the_source_says_what_it_holds() -> None:
    one, two = ScenesSource(ScenesConfig(**FEW, count=9), 32), ScenesSource(ScenesConfig(**FEW, max_objects=2), 32)
    assert len(one) == 9
    assert one.semantic_classes == two.semantic_classes == ("background", "circle", "square", "triangle", "star")
    assert one.classes == FEW["objects"] and two.classes == ()
    for index in range(9):
        sample = one.read(index)
        assert sample.label is not None and one.classes[sample.label] in sample.captions[0]
    assert two.read(0).label is None
    for index in (-1, 9):
        with pytest.raises(IndexError, match=r"outside 0\.\.8"):
            one.read(index)


def test_the_fingerprint_changes_with_anything_that_changes_the_data() -> None:
    changes = [{}, {"seed": 1}, {"count": 5}, {"held_out": 0.2}, {"max_objects": 2}, {"sizes": ("large",)}]
    prints = [ScenesSource(ScenesConfig(**change), 32).fingerprint for change in changes]
    prints.append(ScenesSource(ScenesConfig(), 64).fingerprint)
    assert len(set(prints)) == len(prints)


# --- Held-out combinations -------------------------------------------------------------------------------------------


@each_config
def test_training_never_shows_what_is_held_out_and_shows_every_value(config: ScenesConfig) -> None:
    singles, pairs = held_out_singles(config), held_out_pairs(config)
    scenes = [scene_at(config, index) for index in range(2500)]
    assert singles.isdisjoint(single(scene, thing) for scene in scenes for thing in scene.objects)
    names = [sorted(thing.name for thing in scene.objects) for scene in scenes]
    assert pairs.isdisjoint(pair for group in names for pair in itertools.combinations(group, 2))

    things = [thing for scene in scenes for thing in scene.objects]
    assert {thing.name for thing in things} == set(config.object_names)
    assert {thing.colour for thing in things} - {None} == set(config.colour_names)
    assert {thing.size for thing in things} == set(config.sizes)
    assert {scene.background for scene in scenes} == set(config.background_names)
    assert {len(scene.objects) for scene in scenes} == set(range(config.min_objects, config.max_objects + 1))


@each_config
def test_the_held_out_split_shows_nothing_else(config: ScenesConfig) -> None:
    held = dataclasses.replace(config, split="held_out")
    for index in range(300):
        scene = scene_at(held, index)
        assert is_held_out(config, scene)
        names = sorted(thing.name for thing in scene.objects)
        assert any(single(scene, thing) in held_out_singles(config) for thing in scene.objects) or any(
            pair in held_out_pairs(config) for pair in itertools.combinations(names, 2)
        )


def test_what_is_held_out_depends_on_the_names_alone() -> None:
    config = ScenesConfig(max_objects=2)
    other = dataclasses.replace(config, seed=5, count=3, split="held_out", sizes=("small",), min_objects=2)
    assert held_out_singles(config) == held_out_singles(other)
    assert held_out_pairs(config) == held_out_pairs(other)
    share = len(held_out_singles(config)) / (len(SHAPES) * len(SHAPE_COLOURS) * len(BACKGROUNDS))
    assert share == pytest.approx(0.1, abs=0.02)
    more = held_out_singles(dataclasses.replace(config, held_out=0.3))
    assert held_out_singles(config) < more
    assert not held_out_singles(dataclasses.replace(config, held_out=0.0))


@pytest.mark.parametrize("share", [0.01, 0.25, 0.5])
@pytest.mark.parametrize("numbers", itertools.product((1, 2, 3), repeat=3))
def test_every_value_is_left_in_training_however_few_there_are(numbers: tuple[int, int, int], share: float) -> None:
    objects, colours, backgrounds = SHAPES[: numbers[0]], SHAPE_COLOURS[: numbers[1]], BACKGROUNDS[: numbers[2]]
    config = ScenesConfig(objects=objects, colours=colours, backgrounds=backgrounds, held_out=share)
    held = held_out_singles(config)
    left = set(itertools.product(objects, colours, backgrounds)) - held
    assert [set(values) for values in zip(*left, strict=True)] == [set(objects), set(colours), set(backgrounds)]
    assert bool(held) == (max(numbers) > 1 and sorted(numbers)[1] > 1)  # something is held out wherever it can be


def test_three_objects_are_left_to_draw_from_three_kinds() -> None:
    config = ScenesConfig(objects=SHAPES[:3], min_objects=3, max_objects=3, held_out=0.5)
    assert not held_out_pairs(config)
    assert len(scene_at(config, 0).objects) == 3


def test_held_out_prompts_differ_and_then_repeat_evenly() -> None:
    config = ScenesConfig(**FEW, sizes=("large",), held_out=0.2)
    number = len(held_out_singles(config))
    prompts = held_out_prompts(config, 3 * len(PHRASINGS) * number, seed=1)
    texts = [text for text, _ in prompts]
    assert {texts.count(text) for text in texts} == {3}
    assert len(set(texts[: len(PHRASINGS) * number])) == len(PHRASINGS) * number
    for position, (text, scene) in enumerate(prompts):
        assert text == caption(scene, position // number % len(PHRASINGS))
        assert is_held_out(config, scene)
    assert held_out_prompts(config, 5, seed=1) == prompts[:5] != held_out_prompts(config, 5, seed=2)
    with pytest.raises(UserError, match=r"held-out prompts: split: found held_out, but held_out is 0\.0"):
        held_out_prompts(dataclasses.replace(config, held_out=0.0), 4)


def test_trained_prompts_are_of_what_training_shows_in_other_scenes() -> None:
    config = ScenesConfig(**FEW, held_out=0.2, max_objects=2, count=100)
    prompts = trained_prompts(config, 40, seed=1)
    assert len({text for text, _ in prompts}) == 40
    assert not any(is_held_out(config, scene) for _, scene in prompts)
    assert not {scene for _, scene in prompts} & {scene_at(config, index) for index in range(100)}
    assert trained_prompts(config, 5, seed=1) == prompts[:5] != trained_prompts(config, 5, seed=2)


# --- Captions --------------------------------------------------------------------------------------------------------


def alternatives(names: tuple[str, ...]) -> str:
    return "|".join(sorted(names, key=len, reverse=True))


@each_config
def test_captions_say_what_the_scene_shows(config: ScenesConfig) -> None:
    """The canonical caption is parsed by a grammar of its own and must give the scene back."""
    size = "(?:(small|large) )" if config.says_sizes() else "()"
    colour = f"(?:({alternatives(tuple(PALETTE))}) )" if config.kind == "shapes" else "()"
    noun = re.compile(f"an? {size}{colour}({alternatives(config.object_names)})")
    relation = re.compile(f" ({alternatives(tuple(RELATIONS))}) ")
    for index in range(400):
        scene = scene_at(config, index)
        match = re.fullmatch(r"(.+) on an? (.+) background", caption(scene))
        assert match is not None and match[2] == scene.background
        parts = re.split(f"{relation.pattern}|, | and ", match[1])
        stated = [part for part in parts[1::2] if part]
        assert stated == ([scene.relation] if scene.relation else [])
        for text, thing in zip(parts[::2], scene.objects, strict=True):
            words = noun.fullmatch(text)
            assert words is not None, text
            assert words[1] == (thing.size if config.says_sizes() else "")
            assert words[2] == (thing.colour or "") and words[3] == thing.name


def test_the_other_phrasings_say_the_same() -> None:
    objects = (SceneObject("star", "orange", "small"), SceneObject("ring", "red", "large"))
    one = Scene("shapes", "light blue", objects[:1], None, False)
    assert captions(one) == (
        "an orange star on a light blue background",
        "light blue background with an orange star",
        "orange star, light blue background",
        "a picture of an orange star on light blue",
    )
    two = Scene("shapes", "white", objects, "to the left of", True)
    assert captions(two) == (
        "a small orange star to the left of a large red ring on a white background",
        "white background with a small orange star to the left of a large red ring",
        "a large red ring to the right of a small orange star on a white background",
        "a picture of a small orange star to the left of a large red ring on white",
    )
    three = Scene(
        "emoji", "orange", tuple(SceneObject(n, None, "large") for n in ("ewe", "owl", "unicorn")), None, False
    )
    assert captions(three)[0] == "a ewe, an owl and a unicorn on an orange background"
    assert captions(three)[2] == "a unicorn, an owl and a ewe on an orange background"
    assert len(captions(one)) == len(PHRASINGS)
    with pytest.raises(ValueError, match="phrasing: found 6; allowed is 0 to 5"):
        caption(one, 6)


def test_placed_phrasings_say_of_both_objects_where_they_are() -> None:
    objects = (SceneObject("star", "orange", "small"), SceneObject("ring", "red", "large"))
    told = {
        relation: captions(Scene("shapes", "white", objects, relation, True), PLACED_PHRASINGS)
        for relation in ("to the left of", "below")
    }
    assert told == {
        "to the left of": (
            "a small orange star left and a large red ring right on a white background",
            "white background with a large red ring right and a small orange star left",
        ),
        "below": (
            "a small orange star below and a large red ring above on a white background",
            "white background with a large red ring above and a small orange star below",
        ),
    }
    for scene in (
        Scene("shapes", "white", objects[:1], None, True),
        Scene("shapes", "white", objects, None, False),
    ):
        assert caption(scene, 4) == caption(scene)  # no relation is stated, so there is no place to tell


def test_the_phrasings_of_a_source_are_those_asked_for() -> None:
    config = ScenesConfig(min_objects=2, max_objects=2, phrasings=(0, 4))
    usual = dataclasses.replace(config, phrasings=PHRASINGS)
    sample = ScenesSource(config, 64).read(3)
    assert sample.captions == captions(scene_at(config, 3), (0, 4))
    assert scene_at(config, 3) == scene_at(usual, 3), "words do not change the picture"
    assert ScenesSource(config, 64).fingerprint != ScenesSource(usual, 64).fingerprint
    for wrong in ((), (0, 6), (1, 1)):
        with pytest.raises(ValueError, match=r"phrasings: found .*; allowed are 0 to 5, each once"):
            ScenesConfig(phrasings=wrong)


def test_relations_are_stated_only_when_asked_for_and_between_two() -> None:
    for index in range(100):
        assert scene_at(ScenesConfig(min_objects=2, max_objects=2, relations=False), index).relation is None
        scene = scene_at(ScenesConfig(max_objects=3), index)
        assert (scene.relation is not None) == (len(scene.objects) == 2)
    assert {RELATIONS[RELATIONS[relation]] == relation for relation in RELATIONS} == {True}


# --- Geometry --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("resolution", [16, 32, 64, 97])
@each_config
def test_objects_lie_inside_apart_and_as_stated(config: ScenesConfig, resolution: int) -> None:
    for index in range(150):
        scene = scene_at(config, index)
        boxes = [thing.pixels(resolution) for thing in scene.objects]
        for left, top, side in boxes:
            assert side >= 3 and min(left, top) >= 1
            assert max(left, top) + side <= resolution - (resolution >= 32)
        for (x, y, w), (u, v, z) in itertools.combinations(boxes, 2):
            apart = max(u - (x + w), x - (u + z), v - (y + w), y - (v + z))
            assert apart >= (1 if resolution >= 32 else 0)
        if scene.relation:
            (x, y), (u, v) = (
                (thing.box[0] + thing.box[2] / 2, thing.box[1] + thing.box[2] / 2) for thing in scene.objects
            )
            along, across = {
                "to the left of": (u - x, v - y),
                "to the right of": (x - u, v - y),
                "above": (v - y, x - u),
                "below": (y - v, x - u),
            }[scene.relation]
            assert along > 0 and abs(across) <= SLANT * along + 1e-9


@pytest.mark.parametrize("grid", [8, 16, 24])
def test_on_a_grid_objects_lie_inside_beside_each_other_and_as_stated(grid: int) -> None:
    config = ScenesConfig(max_objects=3, grid=grid)
    seen: set[tuple[float, ...]] = set()
    for index in range(1500):
        scene = scene_at(config, index)
        boxes = [thing.box for thing in scene.objects]
        for left, top, side in boxes:
            assert all(float(value * grid).is_integer() for value in (left, top, side))
            assert min(left, top) >= MARGIN and max(left, top) + side <= 1 - MARGIN
        for (x, y, w), (u, v, z) in itertools.combinations(boxes, 2):
            assert max(u - (x + w), x - (u + z), v - (y + w), y - (v + z)) >= 0
        if scene.relation:
            first, second = (thing.box for thing in scene.objects)
            x, y = (first[k] + first[2] / 2 - second[k] - second[2] / 2 for k in (0, 1))
            sign = {"to the left of": -x, "to the right of": x, "above": -y, "below": y}[scene.relation]
            assert sign > 0 and min(abs(x), abs(y)) <= SLANT * sign + 1e-9 and sign == max(abs(x), abs(y))
        seen.update(boxes)
    inner = sum((grid * (1 - side) - 1) ** 2 for side in {box[2] for box in seen})
    assert grid > 8 or len(seen) == inner  # every place that is allowed occurs


def test_equal_sizes_take_both_sizes_and_leave_all_else_of_a_scene_as_it_was() -> None:
    plain = ScenesConfig(min_objects=2, max_objects=3, grid=8)
    equal = dataclasses.replace(plain, equal_sizes=True)
    pairs = [(scene_at(plain, index), scene_at(equal, index)) for index in range(200)]
    assert {frozenset(thing.size for thing in scene.objects) for _, scene in pairs} == {
        frozenset({"small"}),
        frozenset({"large"}),
    }
    for free, bound in pairs:
        assert [thing.name for thing in bound.objects] == [thing.name for thing in free.objects]
        assert (bound.background, bound.relation) == (free.background, free.relation)
        assert bound.objects[0].size == free.objects[0].size
        assert all(bound.objects[0].size in caption(bound).split(f" {thing.name}")[0] for thing in bound.objects)
    assert ScenesSource(equal, 64).fingerprint != ScenesSource(plain, 64).fingerprint


def test_a_grid_is_checked_and_leaves_other_scenes_and_their_caches_as_they_were() -> None:
    with pytest.raises(ValueError, match=r"grid: found 5, of which no multiple is as large as a small object"):
        ScenesConfig(max_objects=2, grid=5)
    with pytest.raises(ValueError, match="grid: found -1; allowed is 0"):
        ScenesConfig(grid=-1)
    assert ScenesSource(ScenesConfig(), 32).fingerprint == "98867bfbcd6a8f8b"
    assert ScenesSource(ScenesConfig(grid=8), 32).fingerprint != ScenesSource(ScenesConfig(grid=16), 32).fingerprint


def test_sizes_differ_as_their_words_say() -> None:
    for config in (ScenesConfig(), ScenesConfig(max_objects=3)):
        sides: dict[str, list[float]] = {"small": [], "large": []}
        for index in range(300):
            for thing in scene_at(config, index).objects:
                sides[thing.size].append(thing.box[2])
        assert max(sides["small"]) * 1.2 < min(sides["large"])


@pytest.mark.parametrize("resolution", [32, 64])
@pytest.mark.parametrize("config", [CONFIGS[name] for name in ("one", "few", "two", "to three", "three of few")])
def test_the_semantic_map_is_what_the_picture_shows(config: ScenesConfig, resolution: int) -> None:
    """A pixel is an object's where the picture is at least half way from the background to the object's colour."""
    names = config.object_names
    for index in range(60):
        scene = scene_at(config, index)
        image, semantic = (np.asarray(part, dtype=float) for part in render(scene, resolution, names))
        ground = np.array(PALETTE[scene.background], dtype=float)
        expected, sure = np.zeros_like(semantic), np.ones_like(semantic, dtype=bool)
        for thing in scene.objects:
            left, top, side = thing.pixels(resolution)
            ray = np.array(PALETTE[str(thing.colour)]) - ground
            window = np.s_[top : top + side, left : left + side]
            coverage = (image[window] - ground) @ ray / (ray @ ray)
            expected[window] = np.where(coverage >= 0.5, names.index(thing.name) + 1, 0)
            sure[window] = abs(coverage - 0.5) > 0.02  # colours are rounded to whole numbers
        assert np.array_equal(semantic[sure], expected[sure])
        outside = np.ones_like(sure)
        for thing in scene.objects:
            left, top, side = thing.pixels(resolution)
            outside[top : top + side, left : left + side] = False
        assert np.all(image[outside] == ground)


@needs_font
def test_the_semantic_map_of_emoji_is_where_they_are_drawn() -> None:
    """Drawn on two backgrounds, an emoji's own pixels are alike in both and the others are not."""
    config = CONFIGS["emoji to two"]
    for index in range(40):
        scene = scene_at(config, index)
        pictures = [
            np.asarray(render(dataclasses.replace(scene, background=ground), 64, config.object_names)[0], dtype=float)
            for ground in ("white", "black")
        ]
        coverage = 1 - abs(pictures[0] - pictures[1]).mean(axis=2) / 243  # white and black are 243 apart
        semantic = np.asarray(render(scene, 64, config.object_names)[1])
        sure = abs(coverage - 0.5) > 0.02
        assert np.array_equal((semantic > 0)[sure], (coverage > 0.5)[sure])
        expected = {config.object_names.index(thing.name) + 1 for thing in scene.objects}
        assert set(np.unique(semantic)) == expected | {0}


@pytest.mark.parametrize("size", [11, 20, 41])
def test_shapes_have_their_geometry(size: int) -> None:
    """Areas in closed form, as a share of the square."""
    areas = {
        "circle": math.pi / 4,
        "square": 0.88**2,
        "triangle": 0.44,
        "cross": 0.64 - 0.32**2,
        "ring": math.pi * (0.25 - 0.27**2),
        "diamond": 0.36,
        "half circle": math.pi / 8,
        "star": 5 * 0.5 * 0.2 * math.sin(math.pi / 5) / 0.951**2,
    }
    for name, area in areas.items():
        mask = np.asarray(shape_mask(name, size), dtype=float) / 255
        assert mask.shape == (size, size)
        assert mask.mean() == pytest.approx(area, abs=0.6 / size), name
    centres = (np.arange(size) + 0.5) / size - 0.5
    radius = np.hypot(*np.meshgrid(centres, centres))
    disc = np.asarray(shape_mask("circle", size))
    assert np.all(disc[radius < 0.5 - 1 / size] == 255) and np.all(disc[radius > 0.5 + 1 / size] == 0)


@pytest.mark.parametrize("size", [11, 12])
def test_shapes_can_be_told_apart_when_small(size: int) -> None:
    masks = {name: np.asarray(shape_mask(name, size), dtype=float) / 255 for name in SHAPES}
    assert len(masks) >= 8
    for (name, a), (other, b) in itertools.combinations(masks.items(), 2):
        assert np.minimum(a, b).sum() / np.maximum(a, b).sum() < 0.85, (name, other)


def test_colours_are_well_apart() -> None:
    assert len(BACKGROUNDS) >= 12 and len(SHAPE_COLOURS) >= 6
    for name, other in itertools.combinations(PALETTE, 2):
        assert math.dist(PALETTE[name], PALETTE[other]) > 60, (name, other)


@needs_font
def test_emoji_are_drawn_and_all_differ() -> None:
    assert len(EMOJI) >= 48
    pictures = set()
    for name in EMOJI:
        sprite = scene_rendering.emoji_sprite(name, 24)
        alpha = np.asarray(sprite.getchannel("A"))
        assert alpha.max() == 255 and max(np.ptp(axis) for axis in np.nonzero(alpha)) >= 22, name
        pictures.add(sprite.tobytes())
    assert len(pictures) == len(EMOJI)


# --- Bad input -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"kind": "photos"}, "kind: found 'photos'; allowed is shapes or emoji"),
        ({"split": "test"}, "split: found 'test'; allowed is train or held_out"),
        ({"objects": ("circel",)}, "objects: found 'circel'; allowed is circle, .*; did you mean 'circle'"),
        ({"objects": ("star", "star")}, "objects: found star, star; each may be named once"),
        ({"kind": "emoji", "objects": ("circle",)}, "objects: found 'circle'; allowed is dog, "),
        ({"kind": "emoji", "colours": ("red",)}, "colours: found red for kind emoji"),
        ({"colours": ("puce",)}, "colours: found 'puce'"),
        ({"backgrounds": ("whit",)}, "backgrounds: found 'whit'.*did you mean 'white'"),
        ({"sizes": ()}, "sizes: found none"),
        ({"size_words": "never"}, "size_words: found 'never'; allowed is if_both or always"),
        ({"sizes": ("huge",)}, "sizes: found 'huge'; allowed is small, large"),
        ({"count": 0}, "count: found 0"),
        ({"held_out": 0.6}, "held_out: found 0.6; allowed is 0 to 0.5"),
        ({"held_out": math.nan}, "held_out: found nan"),
        ({"min_objects": 0}, "min_objects: found 0"),
        ({"min_objects": 3, "max_objects": 2}, r"max_objects: found 2; allowed is min_objects \(3\) to 3"),
        ({"max_objects": 4}, "max_objects: found 4"),
        ({"objects": ("star",), "max_objects": 2}, "max_objects: found 2 with 1 kinds of object"),
        ({"colours": ("white",), "backgrounds": ("white",)}, "colours: found white, which no scene can show"),
        ({"colours": ("white",), "backgrounds": ("white", "black")}, "backgrounds: found white, which no scene can"),
        ({"split": "held_out", "held_out": 0.0}, "split: found held_out, but held_out is 0.0"),
    ],
)
def test_a_bad_config_is_refused_in_one_line(fields: dict[str, object], message: str) -> None:
    with pytest.raises(ValueError, match=f"^{message}") as caught:
        ScenesConfig(**fields)  # type: ignore[arg-type]
    assert "\n" not in str(caught.value)


def test_a_missing_font_is_named_with_its_package(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(scene_rendering, "EMOJI_FONT", Path("/nowhere/NotoColorEmoji.ttf"))
    with pytest.raises(UserError, match="apt-get install fonts-noto-color-emoji"):
        ScenesSource(ScenesConfig(kind="emoji"), 32)
    ScenesSource(ScenesConfig(), 32)  # shapes need no font


def test_too_small_a_resolution_is_refused() -> None:
    with pytest.raises(UserError, match="resolution: found 8; scenes need 16"):
        ScenesSource(ScenesConfig(), 8)


# --- On disk ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["one", "two", pytest.param("emoji", marks=needs_font)])
def test_written_scenes_are_the_scenes(name: str, tmp_path: Path) -> None:
    config, out = CONFIGS[name], tmp_path / "new" / "scenes"
    write_scenes(config, 32, out, 12, progress=False)
    source = ScenesSource(config, 32)
    rows = [json.loads(line) for line in (out / "metadata.jsonl").read_text().splitlines()]
    assert len(rows) == 12
    assert tuple((out / "classes.txt").read_text().splitlines()) == source.semantic_classes
    for index, row in enumerate(rows):
        sample = source.read(index)
        assert row["file_name"] == f"images/{index:06d}.png"
        with Image.open(out / row["file_name"]) as image, Image.open(out / row["semantic"]) as semantic:
            assert (image.mode, semantic.mode) == ("RGB", "P")
            assert np.array_equal(image, sample.image)
            assert np.array_equal(semantic, sample.semantic)
        assert row["text"] == list(sample.captions)
        assert {key: row[key] for key in sample.extra} == sample.extra
        assert ("label" in row) == (config.max_objects == 1)
    assert [path.name for path in out.parent.iterdir()] == ["scenes"]


def test_writing_refuses_a_folder_that_holds_something(tmp_path: Path) -> None:
    (tmp_path / "mine.txt").write_text("keep me")
    with pytest.raises(UserError, match="it exists and is not an empty folder; nothing was written"):
        write_scenes(ScenesConfig(), 32, tmp_path, 3, progress=False)
    with pytest.raises(UserError, match="not an empty folder"):
        write_scenes(ScenesConfig(), 32, tmp_path / "mine.txt", 3, progress=False)
    assert [path.name for path in tmp_path.iterdir()] == ["mine.txt"]
    empty = tmp_path / "empty"
    empty.mkdir()
    write_scenes(ScenesConfig(), 32, empty, 3, progress=False)
    assert len(list((empty / "images").iterdir())) == 3


def test_a_failed_write_leaves_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    saved = Image.Image.save

    def full_disk(self: Image.Image, path: Path) -> None:
        if path.name == "000002.png":
            raise OSError(28, "No space left on device")
        saved(self, path)

    monkeypatch.setattr(Image.Image, "save", full_disk)
    with pytest.raises(UserError, match="scenes: cannot be written: No space left"):
        write_scenes(ScenesConfig(), 32, tmp_path / "scenes", 5, progress=False)
    assert not list(tmp_path.iterdir())
