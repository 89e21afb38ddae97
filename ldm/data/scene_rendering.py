"""A scene, its picture and its words; and what it is drawn with: shapes, emoji, named colours, sprites.

Shapes are polygons in the unit square, drawn at eight times the size and averaged. Emoji come from the bitmaps of
the Noto Color Emoji font and are called by their Unicode CLDR short names. Sprites are cached in each process.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import lru_cache
from pathlib import Path
from typing import Literal

from PIL import Image, ImageDraw, ImageFont

from ldm.errors import UserError

EMOJI_FONT = Path("/usr/share/fonts/truetype/noto/NotoColorEmoji.ttf")
_STRIKE = 109  # the only bitmap size the font holds
_SUPERSAMPLING = 8

Point = tuple[float, float]
Polygon = tuple[bool, list[Point]]  # (ink or hole, corners in the unit square with y pointing down)

# Any two of these are at least 60 apart in RGB, so that the nearest one is never in doubt (a test checks it).
PALETTE: dict[str, tuple[int, int, int]] = {
    "red": (222, 28, 36),
    "green": (30, 160, 60),
    "blue": (36, 84, 230),
    "yellow": (252, 222, 30),
    "purple": (130, 40, 180),
    "orange": (250, 132, 20),
    "pink": (250, 96, 180),
    "cyan": (30, 205, 225),
    "brown": (128, 76, 34),
    "lime": (150, 225, 40),
    "white": (255, 255, 255),
    "black": (12, 12, 12),
    "grey": (128, 128, 128),
    "light blue": (150, 210, 255),
    "light green": (160, 240, 160),
    "light pink": (255, 190, 205),
    "lavender": (205, 175, 255),
    "beige": (232, 205, 150),
    "navy": (18, 28, 96),
    "dark green": (10, 78, 36),
    "maroon": (112, 10, 40),
    "teal": (0, 124, 130),
    "dark grey": (68, 68, 76),
}
# Relation of the first object to the second -> of the second to the first.
RELATIONS = {
    "to the left of": "to the right of",
    "to the right of": "to the left of",
    "above": "below",
    "below": "above",
}
# Relation of an object to another -> its place, in one word.
PLACES = {"to the left of": "left", "to the right of": "right", "above": "above", "below": "below"}
PHRASINGS = (0, 1, 2, 3)  # those of captions and prompts
PLACED_PHRASINGS = (4, 5)  # that say of each of two objects where it is, right behind its name
Size = Literal["small", "large"]

SHAPE_COLOURS = tuple(PALETTE)[:10]
BACKGROUNDS = tuple(PALETTE)[10:]

# Code point -> CLDR short name. Singular countable names only, so that captions can say "a" or "an".
_EMOJI_TABLE = """
1F415 dog, 1F408 cat, 1F40E horse, 1F404 cow, 1F416 pig, 1F411 ewe, 1F418 elephant, 1F407 rabbit, 1F413 rooster,
1F427 penguin, 1F989 owl, 1F986 duck, 1F422 turtle, 1F40D snake, 1F438 frog, 1F433 spouting whale, 1F42C dolphin,
1F41F fish, 1F419 octopus, 1F980 crab, 1F98B butterfly, 1F41D honeybee, 1F41E lady beetle, 1F40C snail, 1F981 lion,
1F42F tiger face, 1F43C panda, 1F43B bear, 1F98A fox, 1F435 monkey face, 1F984 unicorn, 1F335 cactus,
1F332 evergreen tree, 1F334 palm tree, 1F33B sunflower, 1F339 rose, 1F337 tulip, 1F340 four leaf clover,
1F341 maple leaf, 1F344 mushroom, 1F34E red apple, 1F34C banana, 1F353 strawberry, 1F34B lemon, 1F349 watermelon,
1F34D pineapple, 1F955 carrot, 1F33D ear of corn, 1F346 eggplant, 1F951 avocado, 1F345 tomato, 1F355 pizza,
1F354 hamburger, 1F369 doughnut, 1F382 birthday cake, 1F366 soft ice cream, 1F9C1 cupcake, 1F36D lollipop,
1F950 croissant, 1F968 pretzel, 1F697 automobile, 1F68C bus, 1F69C tractor, 1F6B2 bicycle, 2708 airplane,
1F680 rocket, 26F5 sailboat, 1F681 helicopter, 1F682 locomotive, 1F692 fire engine, 1F388 balloon, 2693 anchor,
26BD soccer ball, 1F3C0 basketball, 1F3B8 guitar, 1F3BA trumpet, 1F941 drum, 1F511 key, 1F4A1 light bulb,
2602 umbrella, 23F0 alarm clock, 1F4D6 open book, 270F pencil, 1F528 hammer, 1F381 wrapped gift, 1F3C6 trophy,
1F451 crown, 1F48E gem stone, 1F514 bell, 1F4F7 camera, 1F4F1 mobile phone, 1FA91 chair, 1F3A9 top hat, 1F455 t-shirt,
1F457 dress, 1F3E0 house, 26FA tent, 1F3F0 castle, 1F916 robot, 2603 snowman, 1F47B ghost, 1F383 jack-o-lantern,
2600 sun, 2B50 star, 1F319 crescent moon, 1F308 rainbow, 2601 cloud, 2744 snowflake, 1F525 fire,
2764 red heart
"""
EMOJI: dict[str, str] = {
    name: chr(int(code, 16))
    for code, name in (" ".join(entry.split()).split(" ", 1) for entry in _EMOJI_TABLE.split(","))
}


@dataclass(frozen=True)
class SceneObject:
    """One object: what it is, its colour (None for emoji), its size word, and the square it is drawn in."""

    name: str
    colour: str | None
    size: Size
    box: tuple[float, float, float] = (0.0, 0.0, 0.0)  # left, top, side: fractions of the image's side

    def pixels(self, resolution: int) -> tuple[int, int, int]:
        """Left, top and side in whole pixels. Rounded so that boxes that are apart stay apart."""
        left, top, side = (value * resolution for value in self.box)
        return math.ceil(left), math.ceil(top), max(1, math.floor(side))


@dataclass(frozen=True)
class Scene:
    """What one picture shows: exact ground truth."""

    kind: Literal["shapes", "emoji"]
    background: str
    objects: tuple[SceneObject, ...]
    relation: str | None  # where the first object lies from the second; None when captions do not say it
    sized: bool  # captions say the sizes


def _circle(
    radius: float = 0.5, x: float = 0.5, y: float = 0.5, turns: tuple[float, float] = (0.0, 1.0)
) -> list[Point]:
    start, end = turns
    angles = [2 * math.pi * (start + (end - start) * step / 64) for step in range(65)]
    return [(x + radius * math.cos(angle), y + radius * math.sin(angle)) for angle in angles]


def _star() -> list[Point]:
    radii = [0.5, 0.2] * 5
    return [
        (0.5 + r * math.sin(math.pi * k / 5) / 0.951, 0.5 - (r * math.cos(math.pi * k / 5) - 0.048) / 0.951)
        for k, r in enumerate(radii)
    ]


def _heart() -> list[Point]:
    angles = [2 * math.pi * step / 96 for step in range(96)]
    return [
        (
            0.5 + math.sin(t) ** 3 / 2,
            0.42 - (13 * math.cos(t) - 5 * math.cos(2 * t) - 2 * math.cos(3 * t) - math.cos(4 * t)) / 32,
        )
        for t in angles
    ]


_OUTLINES: dict[str, Callable[[], list[Polygon]]] = {
    "circle": lambda: [(True, _circle())],
    "square": lambda: [(True, [(0.06, 0.06), (0.94, 0.06), (0.94, 0.94), (0.06, 0.94)])],
    "triangle": lambda: [(True, [(0.5, 0.04), (1, 0.92), (0, 0.92)])],
    "star": lambda: [(True, _star())],
    "cross": lambda: [
        (True, [(0.34, 0), (0.66, 0), (0.66, 1), (0.34, 1)]),
        (True, [(0, 0.34), (1, 0.34), (1, 0.66), (0, 0.66)]),
    ],
    "ring": lambda: [(True, _circle()), (False, _circle(0.27))],
    "heart": lambda: [(True, _heart())],
    "diamond": lambda: [(True, [(0.5, 0), (0.86, 0.5), (0.5, 1), (0.14, 0.5)])],
    "crescent": lambda: [(True, _circle()), (False, _circle(0.42, 0.78, 0.42))],
    "arrow": lambda: [
        (True, [(0, 0.35), (0.5, 0.35), (0.5, 0.08), (1, 0.5), (0.5, 0.92), (0.5, 0.65), (0, 0.65)]),
    ],
    "hourglass": lambda: [(True, [(0.1, 0), (0.9, 0), (0.58, 0.5), (0.9, 1), (0.1, 1), (0.42, 0.5)])],
    "half circle": lambda: [(True, _circle(0.5, 0.5, 0.75, (0.5, 1.0)))],
}
SHAPES = tuple(_OUTLINES)


@lru_cache(maxsize=4096)
def shape_mask(name: str, size: int) -> Image.Image:
    """The coverage of a shape, mode L, `size` x `size` pixels. Cached: do not change it."""
    scale = size * _SUPERSAMPLING
    canvas = Image.new("L", (scale, scale))
    draw = ImageDraw.Draw(canvas)
    for ink, corners in _OUTLINES[name]():
        draw.polygon([(x * (scale - 1), y * (scale - 1)) for x, y in corners], fill=255 if ink else 0)
    return canvas.reduce(_SUPERSAMPLING)


def require_emoji_font() -> None:
    """Raise `UserError` when the emoji font is not installed."""
    if not EMOJI_FONT.is_file():
        raise UserError(
            f"kind: emoji scenes need the font {EMOJI_FONT}, which is missing; run "
            "`apt-get install fonts-noto-color-emoji`, or choose kind: shapes"
        )


@lru_cache(maxsize=256)
def _emoji_glyph(name: str) -> Image.Image:
    """The font's own bitmap, RGBA, cropped to its ink and centred on a square."""
    require_emoji_font()
    font = ImageFont.truetype(str(EMOJI_FONT), _STRIKE)
    canvas = Image.new("RGBA", (2 * _STRIKE, 2 * _STRIKE))
    ImageDraw.Draw(canvas).text((20, 20), EMOJI[name], font=font, embedded_color=True)
    ink = canvas.crop(canvas.getchannel("A").getbbox())
    side = max(ink.size)
    glyph = Image.new("RGBA", (side, side))
    glyph.paste(ink, ((side - ink.width) // 2, (side - ink.height) // 2))
    return glyph


@lru_cache(maxsize=4096)
def emoji_sprite(name: str, size: int) -> Image.Image:
    """An emoji, RGBA, `size` x `size` pixels. Cached: do not change it."""
    return _emoji_glyph(name).resize((size, size), Image.Resampling.LANCZOS)


@lru_cache(maxsize=4096)
def object_coverage(name: str, size: int, *, emoji: bool) -> Image.Image:
    """The coverage of a shape or an emoji, mode L, `size` x `size` pixels. Cached: do not change it."""
    return emoji_sprite(name, size).getchannel("A") if emoji else shape_mask(name, size)


@lru_cache(maxsize=4096)
def object_stencil(name: str, size: int, *, emoji: bool) -> Image.Image:
    """The pixels that an object owns in the semantic map (coverage of at least a half), 0 or 255."""
    return object_coverage(name, size, emoji=emoji).point([0] * 128 + [255] * 128)


def render(scene: Scene, resolution: int, objects: tuple[str, ...]) -> tuple[Image.Image, Image.Image]:
    """The picture (RGB) and the semantic map (L, classes in the order of `objects`, 0 = background)."""
    return render_image(scene, resolution), render_semantic(scene, resolution, objects)


def render_image(scene: Scene, resolution: int) -> Image.Image:
    """The picture, RGB, `resolution` x `resolution` pixels."""
    image = Image.new("RGB", (resolution, resolution), PALETTE[scene.background])
    for thing in scene.objects:
        left, top, side = thing.pixels(resolution)
        if thing.colour is None:
            sprite = emoji_sprite(thing.name, side)
            image.paste(sprite, (left, top), sprite)
        else:
            image.paste(PALETTE[thing.colour], (left, top, left + side, top + side), shape_mask(thing.name, side))
    return image


def render_semantic(scene: Scene, resolution: int, objects: tuple[str, ...]) -> Image.Image:
    """The semantic map, L: 0 = background, i = the i-th of `objects` (from 1 on) covers at least half the pixel."""
    semantic = Image.new("L", (resolution, resolution))
    for thing in scene.objects:
        left, top, side = thing.pixels(resolution)
        stencil = object_stencil(thing.name, side, emoji=thing.colour is None)
        semantic.paste(objects.index(thing.name) + 1, (left, top, left + side, top + side), stencil)
    return semantic


def caption(scene: Scene, phrasing: int = 0) -> str:
    """What the scene shows, in words; phrasing 0 is the one to prompt with.

    Raises `ValueError` for a phrasing that is neither of `PHRASINGS` nor of `PLACED_PHRASINGS`.
    """
    if phrasing not in PHRASINGS + PLACED_PHRASINGS:
        allowed = f"0 to {max(PLACED_PHRASINGS)}"
        raise ValueError(f"phrasing: found {phrasing}; allowed is {allowed}; choose one of them")
    ground = scene.background
    if phrasing == 2 and len(scene.objects) == 1:
        return f"{_noun(scene, scene.objects[0])}, {ground} background"
    text = _things(_turned(scene) if phrasing in (2, 5) else scene, placed=phrasing in PLACED_PHRASINGS)
    if phrasing in (1, 5):
        return f"{ground} background with {text}"
    if phrasing == 3:
        return f"a picture of {text} on {ground}"
    return f"{text} on {_with_article(ground)} background"


def captions(scene: Scene, phrasings: Sequence[int] = PHRASINGS) -> tuple[str, ...]:
    """The scene in each of these phrasings."""
    return tuple(caption(scene, phrasing) for phrasing in phrasings)


def _turned(scene: Scene) -> Scene:
    return replace(scene, objects=scene.objects[::-1], relation=RELATIONS[scene.relation] if scene.relation else None)


def _things(scene: Scene, *, placed: bool) -> str:
    """The objects with their relation, if one is stated: "a dog above a key", placed "a dog above and a key below"."""
    nouns = [_noun(scene, thing) for thing in scene.objects]
    if scene.relation is None:
        return _listed(nouns)
    first, second = (_with_article(noun) for noun in nouns)
    if placed:
        return f"{first} {PLACES[scene.relation]} and {second} {PLACES[RELATIONS[scene.relation]]}"
    return f"{first} {scene.relation} {second}"


def _noun(scene: Scene, thing: SceneObject) -> str:
    return " ".join(word for word in (thing.size if scene.sized else None, thing.colour, thing.name) if word)


def _listed(things: list[str]) -> str:
    articled = [_with_article(thing) for thing in things]
    return articled[0] if len(articled) == 1 else f"{', '.join(articled[:-1])} and {articled[-1]}"


def _with_article(noun: str) -> str:
    vowel = noun.startswith(("a", "e", "i", "o", "um", "hour")) and not noun.startswith("ewe")
    return f"an {noun}" if vowel else f"a {noun}"
