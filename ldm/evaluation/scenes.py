"""An exact scorer for the built-in scenes: does the picture show what its prompt says?

No network is asked: a scene has few free parts, so each is measured. The background is the palette colour nearest to
the border. A shape is a connected part that differs from the background; its colour is the palette's nearest to the
part's core and its name that of the template with the greatest overlap (soft Dice coefficient). An emoji is the
template that explains most of the squared difference from the background, the matched filter with a free amplitude.
Templates are tried at every position (by FFT) and at every size that the config draws.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from functools import lru_cache

import numpy as np
from PIL import Image
from tqdm import tqdm

from ldm.data.scene_rendering import PALETTE, Scene, SceneObject, emoji_sprite, shape_mask
from ldm.data.scenes import ScenesConfig

NOTHING = "nothing"  # found in place of an object: no object, or none that is like a template
_LARGEST = 64  # larger pictures are scored at this side: more pixels tell the same objects apart no better
_LEAST_DICE = 0.7
_LEAST_CORRELATION = 0.5
_LEAST_AMPLITUDE = 0.3

Array = np.ndarray


@dataclass(frozen=True)
class Found:
    """One object in a picture: its name (`NOTHING` if unlike all templates), colour, centre and side (fractions)."""

    name: str
    colour: str | None
    x: float
    y: float
    side: float
    match: float  # Dice coefficient or correlation with the template, 0 to 1


@dataclass(frozen=True)
class SceneScore:
    """Which statements of the prompt the picture bears out; None where the prompt makes none."""

    background: bool
    objects: bool  # every object that was named is there
    colours: bool | None  # every object, whatever its shape, has the colour of the one that was named; None for emoji
    sizes: bool | None
    relation: bool | None
    found: tuple[tuple[str, str], ...]  # for each object that was named: its name, and the name of what was found

    @property
    def everything(self) -> bool:
        """Whether all that the prompt states is right."""
        return False not in (self.background, self.objects, self.colours, self.sizes, self.relation)


def score_image(image: Image.Image, scene: Scene, config: ScenesConfig) -> SceneScore:
    """Compare a square picture with the scene that it should show. Raises `ValueError` if it is not square."""
    readings = read_scene(image, scene, config)
    right = {part: all(named == found for named, found in pairs) for part, pairs in readings.items()}
    return SceneScore(
        background=right["background"],
        objects=right["objects"],
        colours=right.get("colours"),
        sizes=right.get("sizes"),
        relation=right.get("relation"),
        found=tuple(readings["objects"]),
    )


def read_scene(image: Image.Image, scene: Scene, config: ScenesConfig) -> dict[str, list[tuple[str, str]]]:
    """(What the prompt names, what the picture shows) by the part of the prompt, for each object where that has one.

    Parts are those of `SceneScore` that the prompt states. What is not there is `NOTHING`.
    """
    pixels = pixels_of(image)
    background, colour = find_background(pixels, config)
    pairs = _assign(scene, find_objects(pixels, background, colour, config))
    readings = {
        "background": [(scene.background, background)],
        "objects": [(thing.name, found.name if found else NOTHING) for thing, found in pairs],
    }
    if scene.kind == "shapes":
        readings["colours"] = [(str(thing.colour), str(found.colour) if found else NOTHING) for thing, found in pairs]
    if scene.sized:
        sizes = [_size_word(found.side, config) if found else NOTHING for _, found in pairs]
        readings["sizes"] = [(thing.size, size) for (thing, _), size in zip(pairs, sizes, strict=True)]
    if scene.relation is not None:
        readings["relation"] = [(scene.relation, relation_of(pairs[0][1], pairs[1][1]))]
    return readings


def score_each(
    images: Sequence[Image.Image], scenes: Sequence[Scene], config: ScenesConfig, *, progress: bool = False
) -> list[SceneScore]:
    """Score every picture against its scene."""
    pairs = zip(images, scenes, strict=True)
    bar = tqdm(pairs, total=len(images), desc="scoring", unit="image", disable=not progress)
    return [score_image(image, scene, config) for image, scene in bar]


def rates(scores: Sequence[SceneScore]) -> dict[str, float]:
    """Share of the pictures, 0 to 1, in which each statement is right, among those whose prompt makes it.

    Keys: `images` (their number), `background`, `objects`, `colours`, `sizes`, `relation`, `everything`; without those
    that no prompt stated.
    """
    result: dict[str, float] = {"images": float(len(scores))}
    for part in ("background", "objects", "colours", "sizes", "relation", "everything"):
        answers = [answer for score in scores if (answer := getattr(score, part)) is not None]
        if answers:
            result[part] = sum(answers) / len(answers)
    return result


def score_images(
    images: Sequence[Image.Image], scenes: Sequence[Scene], config: ScenesConfig, *, progress: bool = False
) -> dict[str, float]:
    """`rates` of `score_each`."""
    return rates(score_each(images, scenes, config, progress=progress))


def confusion_matrix(scores: Sequence[SceneScore]) -> dict[str, dict[str, int]]:
    """How often which object was found where which was named: `matrix[named][found]`."""
    return counted(itertools.chain.from_iterable(score.found for score in scores))


def counted(pairs: Iterable[tuple[str, str]]) -> dict[str, dict[str, int]]:
    """The confusion matrix of (named, found): `matrix[named][found]`."""
    matrix: dict[str, dict[str, int]] = {}
    for named, found in pairs:
        row = matrix.setdefault(named, {})
        row[found] = row.get(found, 0) + 1
    return matrix


# --- Parts of a picture ----------------------------------------------------------------------------------------------


def pixels_of(image: Image.Image) -> Array:
    """RGB values 0 to 255, [side, side, 3]."""
    if image.width != image.height:
        raise ValueError(f"image: found {image.width} x {image.height}; scenes are square; score them uncropped")
    image = image.convert("RGB")
    if image.width > _LARGEST:
        image = image.resize((_LARGEST, _LARGEST), Image.Resampling.BOX)
    return np.asarray(image, dtype=np.float32)


def find_background(pixels: Array, config: ScenesConfig) -> tuple[str, Array]:
    """The config's background nearest to most of the border, and the colour that the border really has, [3]."""
    width = max(1, round(0.04 * len(pixels)))  # scenes keep this margin free
    inner = np.ones(pixels.shape[:2], dtype=bool)
    inner[width:-width, width:-width] = False
    border = pixels[inner]  # [pixels, 3]
    names = config.background_names
    nearest = colour_distances(border, names).argmin(axis=1)
    winner = int(np.bincount(nearest, minlength=len(names)).argmax())
    return names[winner], np.median(border[nearest == winner], axis=0)


def colour_distances(colours: Array, names: Sequence[str]) -> Array:
    """RGB distances [pixels, names] of colours [pixels, 3] from those of the palette."""
    palette = np.array([PALETTE[name] for name in names], dtype=np.float32)
    return np.linalg.norm(colours[:, None] - palette, axis=2)


def find_objects(pixels: Array, background: str, colour: Array, config: ScenesConfig) -> list[Found]:
    """The objects of a picture with this background, at most as many as the config draws."""
    finder = find_shapes if config.kind == "shapes" else _find_emoji
    return finder(pixels, background, colour, config)


def find_shapes(pixels: Array, background: str, colour: Array, config: ScenesConfig) -> list[Found]:
    """The connected parts that differ from the background, the largest contrast first."""
    candidates = [name for name in config.colour_names if name != background]
    contrast = np.linalg.norm(pixels - colour, axis=2)  # [H, W]
    nearest = colour_distances(np.array([PALETTE[background]], dtype=np.float32), candidates).min()
    areas = shape_bank(config.object_names, object_sides(config, len(pixels))[0], len(pixels))[2]
    parts = [part for part in connected_parts(contrast > min(60.0, nearest / 2)) if part.sum() > 0.4 * areas.min()]
    parts.sort(key=lambda part: float(contrast[part].sum()), reverse=True)
    found = []
    for part in parts[: config.max_objects]:
        core = np.median(pixels[part & (contrast >= np.median(contrast[part]))], axis=0)  # free of antialiased edges
        name = candidates[int(colour_distances(core[None], candidates).argmin())]
        ray = core - colour
        coverage = np.clip((pixels - colour) @ ray / (ray @ ray), 0, 1) * grown_by_one(part)  # [H, W]
        found.append(_best_shape(coverage, name, config))
    return found


def _best_shape(coverage: Array, colour: str, config: ScenesConfig) -> Found:
    """The template b with the greatest soft Dice coefficient 2<a, b> / (|a|^2 + |b|^2) with the coverage a."""
    resolution = len(coverage)
    spectrum, energy = np.fft.rfft2(coverage), float((coverage**2).sum())
    best = Found(NOTHING, colour, 0.5, 0.5, 0.0, 0.0)
    for side in object_sides(config, resolution):
        templates, squares, _ = shape_bank(config.object_names, side, resolution)
        overlap, left, top = match_peaks(spectrum * templates, side, resolution)
        dice = 2 * overlap / (energy + squares)
        i = int(dice.argmax())
        if dice[i] > best.match:
            best = _found(config.object_names[i], colour, int(left[i]), int(top[i]), side, resolution, float(dice[i]))
    return best if best.match >= _LEAST_DICE else replace(best, name=NOTHING)


def _find_emoji(pixels: Array, background: str, colour: Array, config: ScenesConfig) -> list[Found]:
    """The emoji that are there, `NOTHING` for what is like none of them."""
    found = explain_by_emoji(pixels, background, colour, config)
    return [one if one.match >= _LEAST_CORRELATION else replace(one, name=NOTHING) for one in found]


def explain_by_emoji(pixels: Array, background: str, colour: Array, config: ScenesConfig) -> list[Found]:
    """The best template, however bad, then the best for what it leaves unexplained, until what is left is faint."""
    residual = pixels - colour  # [H, W, 3]
    found: list[Found] = []
    for _ in range(config.max_objects):
        best = _best_emoji(residual, np.array(PALETTE[background], dtype=np.float32), config)
        if best is None:
            break
        found.append(best)
        residual = residual * _outside(best, len(pixels))[..., None]
    return found


def _best_emoji(residual: Array, background: Array, config: ScenesConfig) -> Found | None:
    """The template D (an emoji less the background) that explains most of the residual R: <R, D>^2 / |D|^2 is greatest.

    None if even that one is there only faintly.
    """
    resolution = len(residual)
    spectra = np.fft.rfft2(residual, axes=(0, 1)).transpose(2, 0, 1)  # [3, H, W/2+1]
    spectra = np.concatenate([spectra, -np.tensordot(background, spectra, 1)[None]]).astype(np.complex64)
    best, most, strength = None, 0.0, 0.0
    for side in object_sides(config, resolution):
        templates, moments = _emoji_bank(config.object_names, side, resolution)
        squares = moments @ np.array([1.0, *(-2 * background), background @ background])  # |D|^2, [N]
        overlap, left, top = match_peaks(np.einsum("nchw,chw->nhw", templates, spectra), side, resolution)
        explained = np.maximum(overlap, 0) ** 2 / squares
        i = int(explained.argmax())
        if explained[i] > most:
            most, strength = float(explained[i]), float(overlap[i] / squares[i])
            window = residual[top[i] : top[i] + side, left[i] : left[i] + side]
            match = math.sqrt(most / float((window**2).sum()))
            best = _found(config.object_names[i], None, int(left[i]), int(top[i]), side, resolution, match)
    return best if strength >= _LEAST_AMPLITUDE else None


def _found(name: str, colour: str | None, left: int, top: int, side: int, resolution: int, match: float) -> Found:
    return Found(name, colour, (left + side / 2) / resolution, (top + side / 2) / resolution, side / resolution, match)


def match_peaks(products: Array, side: int, resolution: int) -> tuple[Array, Array, Array]:
    """Of correlations with spectra [N, H, W/2+1]: the greatest value, and the left and top where it is, each [N]."""
    span = resolution - side + 1  # corners at which the template lies inside the picture
    correlation = np.fft.irfft2(products, s=(resolution, resolution))[:, :span, :span].reshape(len(products), -1)
    position = correlation.argmax(axis=1)
    return correlation.max(axis=1), position % span, position // span


# --- Templates -------------------------------------------------------------------------------------------------------


def object_sides(config: ScenesConfig, resolution: int) -> list[int]:
    """The sides in pixels that the config's objects can have, ascending."""
    ranges = config.size_ranges().values()
    return sorted({side for low, high in ranges for side in range(int(low * resolution), int(high * resolution) + 1)})


@lru_cache(maxsize=256)
def shape_bank(names: tuple[str, ...], side: int, resolution: int) -> tuple[Array, Array, Array]:
    """Conjugate spectra of the coverages [N, H, W/2+1], their sums of squares [N] and their areas [N]."""
    masks = np.stack([np.asarray(shape_mask(name, side), dtype=np.float32) / 255 for name in names])
    spectra = np.fft.rfft2(masks, s=(resolution, resolution)).conj().astype(np.complex64)
    return spectra, (masks**2).sum(axis=(1, 2)), masks.sum(axis=(1, 2))


@lru_cache(maxsize=64)
def _emoji_bank(names: tuple[str, ...], side: int, resolution: int) -> tuple[Array, Array]:
    """Conjugate spectra [N, 4, H, W/2+1] of coverage x (red, green, blue, 1), and moments [N, 5].

    The moments are the sums of coverage^2 x (|colour|^2, red, green, blue, 1).
    """
    sprites = np.stack([np.asarray(emoji_sprite(name, side), dtype=np.float32) for name in names])  # [N, s, s, 4]
    coverage, colour = sprites[..., 3:] / 255, sprites[..., :3]
    parts = np.concatenate([coverage * colour, coverage], axis=3).transpose(0, 3, 1, 2)  # [N, 4, s, s]
    factors = np.concatenate([(colour**2).sum(axis=3, keepdims=True), colour, np.ones_like(coverage)], axis=3)
    moments = (coverage**2 * factors).sum(axis=(1, 2))
    return np.fft.rfft2(parts, s=(resolution, resolution)).conj().astype(np.complex64), moments


# --- Regions ---------------------------------------------------------------------------------------------------------


def connected_parts(mask: Array) -> list[Array]:
    """The 8-connected parts of a mask [H, W], each a mask."""
    labels = np.where(mask, np.arange(1, mask.size + 1).reshape(mask.shape), 0)
    while True:  # every pixel takes its neighbours' greatest label until nothing changes
        spread = np.where(mask, grown_by_one(labels), 0)
        if np.array_equal(spread, labels):
            return [labels == label for label in np.unique(labels) if label]
        labels = spread


def grown_by_one(values: Array) -> Array:
    """The greatest of every value [H, W] and its eight neighbours; a mask with all pixels that touch it."""
    padded = np.pad(values, 1)
    rows = np.maximum(np.maximum(padded[:-2], padded[1:-1]), padded[2:])
    return np.maximum(np.maximum(rows[:, :-2], rows[:, 1:-1]), rows[:, 2:])


def _outside(found: Found, resolution: int) -> Array:
    """1 outside the object's square and a pixel around it, 0 inside, [H, W]."""
    mask = np.ones((resolution, resolution), dtype=np.float32)
    left, top = (max(0, round((centre - found.side / 2) * resolution) - 1) for centre in (found.x, found.y))
    reach = round(found.side * resolution) + 2
    mask[top : top + reach, left : left + reach] = 0
    return mask


# --- Comparing with the scene ----------------------------------------------------------------------------------------


def _assign(scene: Scene, found: Sequence[Found]) -> list[tuple[SceneObject, Found | None]]:
    """Give each object of the scene one of those found, so that most names, then most colours, agree."""

    def agreement(order: tuple[Found | None, ...]) -> int:
        pairs = [(thing, other) for thing, other in zip(scene.objects, order, strict=True) if other is not None]
        names = sum(thing.name == other.name for thing, other in pairs)
        colours = sum(thing.colour == other.colour for thing, other in pairs)
        return 100 * names + 10 * colours + len(pairs)

    candidates: list[Found | None] = [*found, *[None] * len(scene.objects)]
    best = max(itertools.permutations(candidates, len(scene.objects)), key=agreement)
    return list(zip(scene.objects, best, strict=True))


def relation_of(first: Found | None, second: Found | None) -> str:
    """How the first lies from the second, one of the four relations; `NOTHING` if one is missing."""
    if first is None or second is None:
        return NOTHING
    x, y = first.x - second.x, first.y - second.y
    if abs(x) > abs(y):
        return "to the left of" if x < 0 else "to the right of"
    return "above" if y < 0 else "below"


def _size_word(side: float, config: ScenesConfig) -> str:
    """The size whose range is nearest to this side (a fraction of the picture's)."""
    return min(config.size_ranges().items(), key=lambda item: abs(sum(item[1]) / 2 - side))[0]
