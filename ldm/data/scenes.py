"""Built-in scenes: a procedural, captioned dataset with semantic maps and exact ground truth (DESIGN.md 6).

A scene is one to three objects on a named background colour. It is a pure function of (seed, split, index), holds
fractions of the image side rather than pixels, and so is the same picture at every resolution. Combinations chosen by
a hash, for ever and whatever the seed, are held out of the training split: they measure composition, not memory.
"""

from __future__ import annotations

import dataclasses
import difflib
import hashlib
import itertools
import json
import math
import random
from collections.abc import Callable
from dataclasses import dataclass
from functools import lru_cache
from typing import Literal, TypeVar

from ldm.data.sample import Sample
from ldm.data.scene_rendering import (
    BACKGROUNDS,
    EMOJI,
    EMOJI_FONT,
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
    render_image,
    render_semantic,
    require_emoji_font,
)
from ldm.errors import UserError, user_input
from ldm.randomness import derive_seed

VERSION = 1  # part of the fingerprint: raise it when the same config would draw other pictures or captions
SIZES = ("small", "large")
Split = Literal["train", "held_out"]
Box = tuple[float, float, float]  # left, top, side: fractions of the picture's side
_T = TypeVar("_T")

MARGIN = 0.04  # of the side: between an object and the border
GAP = 0.06  # of the side: between two objects
# Least and greatest side of an object as a fraction of the image's, where every scene has one object, and elsewhere.
ALONE: dict[str, tuple[float, float]] = {"small": (0.36, 0.42), "large": (0.56, 0.66)}
AMONG_OTHERS: dict[str, tuple[float, float]] = {"small": (0.22, 0.27), "large": (0.34, 0.40)}
SLANT = 0.6  # greatest ratio of two objects' distance across to that along, so that their relation is never in doubt
_ATTEMPTS = 100_000
_PROMPT_SEARCH = 50  # scenes drawn per prompt before we take it that there are no further combinations


@dataclass(frozen=True, kw_only=True)
class ScenesConfig:
    """What the scenes show. Empty `objects`, `colours`, `backgrounds` mean all there are."""

    kind: Literal["shapes", "emoji"] = "shapes"
    count: int = 10_000
    seed: int = 0
    objects: tuple[str, ...] = ()
    colours: tuple[str, ...] = ()  # of the shapes; emoji have their own
    backgrounds: tuple[str, ...] = ()
    min_objects: int = 1
    max_objects: int = 1
    sizes: tuple[Literal["small", "large"], ...] = ("small", "large")
    size_words: Literal["if_both", "always"] = "if_both"  # captions say the size: where both are there, or in any case
    equal_sizes: bool = False  # a scene's objects are all small or all large: no size tells which of them is where
    relations: bool = True  # captions of two objects say where the first lies
    phrasings: tuple[int, ...] = PHRASINGS  # of the captions; 4 and 5 are "a dog above and a key below", turned in 5
    held_out: float = 0.1  # share of the combinations that never occur in the split "train"
    split: Split = "train"
    grid: int = 0  # corners and sides of objects are multiples of 1 / grid of the picture's side; 0: as they fall

    def __post_init__(self) -> None:
        """Check every field; raise `ValueError` naming it."""
        _check_choice("kind", self.kind, ("shapes", "emoji"))
        _check_choice("split", self.split, ("train", "held_out"))
        _check_names("objects", self.objects, SHAPES if self.kind == "shapes" else tuple(EMOJI))
        _check_names("colours", self.colours, tuple(PALETTE))
        _check_names("backgrounds", self.backgrounds, tuple(PALETTE))
        _check_names("sizes", self.sizes, SIZES)
        _check_choice("size_words", self.size_words, ("if_both", "always"))
        if self.kind == "emoji" and self.colours:
            raise ValueError(
                f"colours: found {', '.join(self.colours)} for kind emoji, which have their own; remove it"
            )
        if not self.sizes:
            raise ValueError("sizes: found none; allowed are small, large or both; name at least one")
        if self.count < 1:
            raise ValueError(f"count: found {self.count}; allowed is 1 or more; set the number of scenes")
        if not 0.0 <= self.held_out <= 0.5:
            raise ValueError(
                f"held_out: found {self.held_out}; allowed is 0 to 0.5; set the share held out of training"
            )
        self._check_phrasings()
        self._check_numbers_of_objects()
        self._check_combinations()
        self._check_grid()

    def _check_phrasings(self) -> None:
        allowed = PHRASINGS + PLACED_PHRASINGS
        if (
            not self.phrasings
            or len(set(self.phrasings)) < len(self.phrasings)
            or not set(allowed) >= {*self.phrasings}
        ):
            found = ", ".join(map(str, self.phrasings)) or "none"
            allowed_text = f"{min(allowed)} to {max(allowed)}, each once"
            raise ValueError(f"phrasings: found {found}; allowed are {allowed_text}; name some of them")

    def _check_grid(self) -> None:
        if self.grid < 0:
            raise ValueError(f"grid: found {self.grid}; allowed is 0 (none) or more; 8 and 16 are usual")
        for size, (low, high) in self.size_ranges().items() if self.grid else ():
            if not _multiples(low, high, self.grid):
                raise ValueError(
                    f"grid: found {self.grid}, of which no multiple is as large as a {size} object ({low} to {high} of "
                    "the picture's side); choose a multiple of 8"
                )

    def _check_numbers_of_objects(self) -> None:
        if not 1 <= self.min_objects <= 3:
            raise ValueError(f"min_objects: found {self.min_objects}; allowed is 1 to 3; set one of them")
        if not self.min_objects <= self.max_objects <= 3:
            allowed = f"min_objects ({self.min_objects}) to 3"
            raise ValueError(f"max_objects: found {self.max_objects}; allowed is {allowed}; set one of them")
        if self.max_objects > len(self.object_names):
            found = f"{self.max_objects} with {len(self.object_names)} kinds of object"
            raise ValueError(f"max_objects: found {found}; a scene shows each once; lower it or name more objects")

    def _check_combinations(self) -> None:
        combinations = _all_singles(self)
        for field, position, names in (
            ("colours", 1, self.colour_names if self.kind == "shapes" else ()),
            ("backgrounds", len(combinations[0]) - 1 if combinations else 0, self.background_names),
        ):
            for name in names:
                if all(combination[position] != name for combination in combinations):
                    raise ValueError(
                        f"{field}: found {name}, which no scene can show because a shape never has the colour of its "
                        "background; add another colour or background"
                    )
        if self.split == "held_out" and not held_out_singles(self) and not held_out_pairs(self):
            raise ValueError(
                f"split: found held_out, but held_out is {self.held_out} and holds none of these few combinations "
                "back from training; raise held_out or name more objects and colours"
            )

    @property
    def object_names(self) -> tuple[str, ...]:
        """The objects that scenes show; their order gives the classes of the semantic map, from 1 on."""
        return self.objects or (SHAPES if self.kind == "shapes" else tuple(EMOJI))

    @property
    def colour_names(self) -> tuple[str, ...]:
        """The colours of the shapes; none for emoji."""
        return (self.colours or SHAPE_COLOURS) if self.kind == "shapes" else ()

    @property
    def background_names(self) -> tuple[str, ...]:
        """The colours of the background."""
        return self.backgrounds or BACKGROUNDS

    def says_sizes(self) -> bool:
        """Whether captions say small and large."""
        return len(self.sizes) > 1 or self.size_words == "always"

    def size_ranges(self) -> dict[str, tuple[float, float]]:
        """Size word -> least and greatest side of an object, as a fraction of the image's."""
        ranges = ALONE if self.max_objects == 1 else AMONG_OTHERS
        return {size: ranges[size] for size in SIZES if size in self.sizes}


# --- Held-out combinations -------------------------------------------------------------------------------------------


@lru_cache(maxsize=64)
def held_out_singles(config: ScenesConfig) -> frozenset[tuple[str, ...]]:
    """The (shape, colour, background) triples, or (emoji, background) pairs, that no training scene holds.

    Those with a hash below `held_out`, or the lowest one if there are none. If that took every combination of an
    object, a colour or a background, the one of them with the highest hash is given back to training.
    """
    combinations = _all_singles(config)
    return frozenset(_hold_out({single: tuple(enumerate(single)) for single in combinations}, config.held_out))


@lru_cache(maxsize=64)
def held_out_pairs(config: ScenesConfig) -> frozenset[tuple[str, ...]]:
    """The pairs of objects (names sorted) that no training scene holds together; none if scenes hold one object."""
    if config.max_objects < 2:
        return frozenset()
    names = sorted(config.object_names)
    pairs: list[tuple[str, ...]] = list(itertools.combinations(names, 2))
    held = _hold_out({pair: tuple((0, name) for name in pair) for pair in pairs}, config.held_out)
    return frozenset(_keep_groups_possible(held, names, config.max_objects))


def _all_singles(config: ScenesConfig) -> list[tuple[str, ...]]:
    if config.kind == "emoji":
        return list(itertools.product(config.object_names, config.background_names))
    everything = itertools.product(config.object_names, config.colour_names, config.background_names)
    return [combination for combination in everything if combination[1] != combination[2]]


def _hold_out(values: dict[tuple[str, ...], tuple[tuple[int, str], ...]], share: float) -> set[tuple[str, ...]]:
    """The combinations (keys) whose hash is below `share`, such that of each value's combinations one is left."""
    if share == 0.0 or not values:
        return set()
    held = {combination for combination in values if _rank(combination) < share} or {min(values, key=_rank)}
    groups: dict[tuple[int, str], list[tuple[str, ...]]] = {}
    for combination, parts in values.items():
        for part in parts:
            groups.setdefault(part, []).append(combination)
    for group in groups.values():
        if held.issuperset(group):
            held.discard(max(group, key=_rank))
    return held


def _keep_groups_possible(held: set[tuple[str, ...]], names: list[str], size: int) -> set[tuple[str, ...]]:
    """Give pairs back, highest hash first, until every object fits in some group of `size` with no held-out pair."""
    for name in names:
        others = [other for other in names if other != name]
        while not any(
            held.isdisjoint(itertools.combinations(sorted((name, *group)), 2))
            for group in itertools.combinations(others, size - 1)
        ):
            held.discard(max((pair for pair in held if name in pair), default=max(held, key=_rank), key=_rank))
    return held


def _rank(combination: tuple[str, ...]) -> float:
    """A number in [0, 1) that depends on the names alone."""
    digest = hashlib.blake2b("|".join(combination).encode(), digest_size=8).digest()
    return int.from_bytes(digest, "little") / 2**64


def is_held_out(config: ScenesConfig, scene: Scene) -> bool:
    """Whether the scene holds a combination that training never shows."""
    return _holds(scene, held_out_singles(config), held_out_pairs(config))


def _holds(scene: Scene, singles: frozenset[tuple[str, ...]], pairs: frozenset[tuple[str, ...]]) -> bool:
    for thing in scene.objects:
        single = (thing.name, thing.colour, scene.background) if thing.colour else (thing.name, scene.background)
        if single in singles:
            return True
    return any(pair in pairs for pair in itertools.combinations(sorted(thing.name for thing in scene.objects), 2))


# --- Drawing a scene from its index ----------------------------------------------------------------------------------


def scene_at(config: ScenesConfig, index: int) -> Scene:
    """The scene of this index in the config's split. Any index >= 0 will do: `count` is not looked at."""
    # Only random() is used: its numbers are the same in every Python version.
    draw = random.Random(derive_seed(config.seed, "scene", config.split, index)).random
    singles, pairs, wanted = held_out_singles(config), held_out_pairs(config), config.split == "held_out"
    for _ in range(_ATTEMPTS):
        scene = _draw_content(config, draw)
        if _holds(scene, singles, pairs) == wanted:
            return place_objects(config, scene, draw)
    raise UserError(f"held_out: found {config.held_out}, which leaves no scene in the split {config.split}; change it")


def _draw_content(config: ScenesConfig, draw: Callable[[], float]) -> Scene:
    number = config.min_objects + int(draw() * (config.max_objects - config.min_objects + 1))
    background = _pick(config.background_names, draw)
    colours = tuple(colour for colour in config.colour_names if colour != background)
    names = list(config.object_names)
    things: list[SceneObject] = []
    for _ in range(number):
        name = names.pop(int(draw() * len(names)))
        colour = _pick(colours, draw) if colours else None
        size = _pick(config.sizes, draw)
        things.append(SceneObject(name, colour, things[0].size if config.equal_sizes and things else size))
    relation = _pick(tuple(RELATIONS), draw) if number == 2 and config.relations else None
    return Scene(config.kind, background, tuple(things), relation, config.says_sizes())


def _pick(choices: tuple[_T, ...], draw: Callable[[], float]) -> _T:
    return choices[int(draw() * len(choices))]


def place_objects(config: ScenesConfig, scene: Scene, draw: Callable[[], float]) -> Scene:
    """Give every object its square: inside the margin, apart from the others, in the relation that is stated.

    On a grid, squares may touch each other.
    """
    for _ in range(_ATTEMPTS):
        boxes = _boxes(config, scene, draw)
        if not config.grid:
            break
        boxes = [_on_grid(box, config.grid) for box in boxes]
        if _fits(boxes):
            break
    else:
        raise UserError(f"grid: found {config.grid}, which leaves no place for {caption(scene)!r}; choose a finer one")
    objects = tuple(dataclasses.replace(thing, box=box) for thing, box in zip(scene.objects, boxes, strict=True))
    return dataclasses.replace(scene, objects=objects)


def _boxes(config: ScenesConfig, scene: Scene, draw: Callable[[], float]) -> list[Box]:
    """Left, top and side of every object, as fractions of the picture's side."""
    ranges = config.size_ranges()
    sides = [_side(*ranges[thing.size], config.grid, draw) for thing in scene.objects]
    if len(sides) == 1:
        span = MARGIN, 1 - MARGIN - sides[0]
        corners = [(_between(*span, draw), _between(*span, draw))]
    elif len(sides) == 2:
        corners = _two_corners(sides, scene.relation or _pick(tuple(RELATIONS), draw), draw)
    else:
        corners = _cell_corners(sides, draw)
    return [(left, top, side) for (left, top), side in zip(corners, sides, strict=True)]


def _side(low: float, high: float, grid: int, draw: Callable[[], float]) -> float:
    return _pick(_multiples(low, high, grid), draw) if grid else _between(low, high, draw)


def _multiples(low: float, high: float, grid: int) -> tuple[float, ...]:
    return tuple(step / grid for step in range(math.ceil(low * grid), math.floor(high * grid) + 1))


def _on_grid(box: Box, grid: int) -> Box:
    left, top, side = (round(value * grid) / grid for value in box)
    return left, top, side


def _fits(boxes: list[Box]) -> bool:
    """Whether squares moved to a grid are still inside the margin, do not overlap, and two stand clearly related."""
    inside = all(MARGIN <= start <= 1 - MARGIN - side for left, top, side in boxes for start in (left, top))
    pairs = list(itertools.combinations(boxes, 2))
    apart = all(max(u - x - w, x - u - z, v - y - w, y - v - z) >= 0 for (x, y, w), (u, v, z) in pairs)
    distances = [sorted(abs(a + w / 2 - b - z / 2) for a, b in ((x, u), (y, v))) for (x, y, w), (u, v, z) in pairs]
    return inside and apart and (len(boxes) != 2 or all(near <= SLANT * far for near, far in distances))


def _two_corners(sides: list[float], relation: str, draw: Callable[[], float]) -> list[tuple[float, float]]:
    """Left-top corners of two squares of which the first lies in `relation` to the second, clearly so."""
    first, second = (0, 1) if relation in ("to the left of", "above") else (1, 0)
    free = 1 - 2 * MARGIN - GAP - sum(sides)
    near, far = sorted((draw(), draw()))
    along = [0.0, 0.0]
    along[first] = MARGIN + free * near
    along[second] = MARGIN + sides[first] + GAP + free * far
    centres = [start + side / 2 for start, side in zip(along, sides, strict=True)]
    reach = SLANT * abs(centres[0] - centres[1])
    across = _between(MARGIN, 1 - MARGIN - sides[0], draw)
    middle = across + (sides[0] - sides[1]) / 2  # where the second square's corner is when the centres are level
    other = _between(max(MARGIN, middle - reach), min(1 - MARGIN - sides[1], middle + reach), draw)
    pairs = list(zip(along, (across, other), strict=True))
    return pairs if relation in ("to the left of", "to the right of") else [(x, y) for y, x in pairs]


def _cell_corners(sides: list[float], draw: Callable[[], float]) -> list[tuple[float, float]]:
    """Left-top corners of up to four squares, each somewhere in its own quarter of the picture."""
    cell = (1 - 2 * MARGIN - GAP) / 2
    quarters = [(MARGIN + x * (cell + GAP), MARGIN + y * (cell + GAP)) for x in (0, 1) for y in (0, 1)]
    corners = []
    for side in sides:
        left, top = quarters.pop(int(draw() * len(quarters)))
        corners.append((left + draw() * (cell - side), top + draw() * (cell - side)))
    return corners


def _between(low: float, high: float, draw: Callable[[], float]) -> float:
    return low + (high - low) * draw()


# --- The dataset -----------------------------------------------------------------------------------------------------


class ScenesSource:
    """The scenes of a config as a `Source`: random access, a pure function of (seed, split, index), nothing stored.

    Scenes of one object have its index as their label.
    """

    def __init__(self, config: ScenesConfig, resolution: int) -> None:
        """Raises `UserError` when the resolution is too small or the emoji font is missing."""
        if resolution < 16:
            raise UserError(f"resolution: found {resolution}; scenes need 16 pixels or more; raise it")
        if config.kind == "emoji":
            require_emoji_font()
        self.config = config
        self.resolution = resolution
        self.classes: tuple[str, ...] = config.object_names if config.max_objects == 1 else ()
        self.semantic_classes: tuple[str, ...] = ("background", *config.object_names)
        self.fingerprint = _fingerprint(config, resolution)

    def __len__(self) -> int:
        return self.config.count

    def size(self, index: int) -> tuple[int, int]:
        """All are squares."""
        return self.resolution, self.resolution

    def read(self, index: int, *, with_image: bool = True) -> Sample:
        """The sample of this index, 0 <= index < len; `with_image=False` leaves the picture undrawn."""
        if not 0 <= index < len(self):
            raise IndexError(f"scene {index} is outside 0..{len(self) - 1}")
        scene = scene_at(self.config, index)
        names = self.config.object_names
        return Sample(
            key=f"{self.config.split}-{self.config.seed}-{index:06d}",
            image=render_image(scene, self.resolution) if with_image else None,
            captions=captions(scene, self.config.phrasings),
            semantic=render_semantic(scene, self.resolution, names),
            mask=None,
            label=names.index(scene.objects[0].name) if self.classes else None,
            extra=describe(scene),
        )


def describe(scene: Scene) -> dict[str, object]:
    """The ground truth as plain values: columns of metadata.jsonl."""
    colours = {} if scene.kind == "emoji" else {"colours": [thing.colour for thing in scene.objects]}
    return {
        "background": scene.background,
        "objects": [thing.name for thing in scene.objects],
        **colours,
        "sizes": [thing.size for thing in scene.objects],
        "boxes": [[round(value, 4) for value in thing.box] for thing in scene.objects],
        "relation": scene.relation,
    }


def _fingerprint(config: ScenesConfig, resolution: int) -> str:
    font = EMOJI_FONT.stat().st_size if config.kind == "emoji" else 0  # another font draws other pictures
    content = dataclasses.asdict(config)
    for later, default in (("grid", 0), ("size_words", "if_both"), ("equal_sizes", False), ("phrasings", PHRASINGS)):
        if content[later] == default:
            del content[later]  # so that what was cached before there was such a field is found again
    text = json.dumps([VERSION, resolution, font, content], sort_keys=True)
    return hashlib.sha256(text.encode()).hexdigest()[:16]


def held_out_prompts(config: ScenesConfig, count: int, seed: int = 0) -> list[tuple[str, Scene]]:
    """`count` prompts of held-out combinations and what each should show; the config's split is not used.

    First every combination in phrasing 0, then in the other phrasings, so that all prompts differ as far as there are
    so many; after that they repeat in turn. Raises `UserError` when nothing is held out.
    """
    return _split_prompts(config, "held_out", count, seed, "held-out prompts")


def trained_prompts(config: ScenesConfig, count: int, seed: int = 0) -> list[tuple[str, Scene]]:
    """The same of combinations that training shows, in other scenes than training's."""
    return _split_prompts(config, "train", count, seed, "trained prompts")


def _split_prompts(config: ScenesConfig, split: Split, count: int, seed: int, name: str) -> list[tuple[str, Scene]]:
    with user_input(name, ValueError):
        config = dataclasses.replace(config, split=split, seed=derive_seed(seed, name))
    found: dict[str, Scene] = {}
    for index in range(_PROMPT_SEARCH * count):
        scene = scene_at(config, index)
        found.setdefault(caption(scene), scene)
        if len(found) == count:
            break
    scenes = list(found.values())
    prompts = [(caption(scene, phrasing), scene) for phrasing in PHRASINGS for scene in scenes]
    return [prompts[position % len(prompts)] for position in range(count)]


# --- Checks of the config --------------------------------------------------------------------------------------------


def _check_choice(field: str, value: str, allowed: tuple[str, ...]) -> None:
    if value not in allowed:
        raise ValueError(f"{field}: found {value!r}; allowed is {' or '.join(allowed)}; choose one of them")


def _check_names(field: str, names: tuple[str, ...], allowed: tuple[str, ...]) -> None:
    for name in names:
        if name not in allowed:
            near = difflib.get_close_matches(str(name), allowed, 1)
            advice = f"did you mean {near[0]!r}?" if near else "choose some of them"
            names_allowed = ", ".join(allowed) if len(allowed) < 30 else f"{', '.join(allowed[:8])} and others"
            raise ValueError(f"{field}: found {name!r}; allowed is {names_allowed}; {advice}")
    if len(set(names)) < len(names):
        raise ValueError(f"{field}: found {', '.join(names)}; each may be named once; remove the repetition")
