"""Scenes with one thing changed: what a condition should change in a picture, and nothing else."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import replace

from ldm.data.scene_rendering import Scene, SceneObject
from ldm.data.scenes import ScenesConfig, is_held_out, place_objects

_PLACEMENTS = 8  # tried for each changed map; the one that moves the objects most is taken


def recoloured(scene: Scene, config: ScenesConfig, draw: Callable[[], float]) -> Scene:
    """One object in another colour, or, as emoji have their own, another background; held out if possible."""
    if config.kind == "emoji":
        return on_another_background(scene, config, draw)
    which = int(draw() * len(scene.objects))
    old = scene.objects[which].colour
    colours = [colour for colour in config.colour_names if colour not in (old, scene.background)]
    return _choose([_exchange(scene, which, colour=colour) for colour in colours], config, draw)


def with_another_object(
    scene: Scene, config: ScenesConfig, draw: Callable[[], float], *, unlike: Scene | None = None
) -> Scene:
    """The first object replaced by another of another colour, also another than in `unlike`; held out if possible."""
    taken = {thing.name for thing in (*scene.objects, *(unlike.objects if unlike else ()))}
    names = [name for name in config.object_names if name not in taken]
    if config.kind == "emoji":
        choices = [_exchange(scene, 0, name=name) for name in names]
    else:
        colours = [c for c in config.colour_names if c not in (scene.objects[0].colour, scene.background)]
        choices = [_exchange(scene, 0, name=name, colour=colour) for name in names for colour in colours]
    return _choose(choices, config, draw)


def on_another_background(scene: Scene, config: ScenesConfig, draw: Callable[[], float]) -> Scene:
    """The same objects on another background; held out if possible."""
    taken = {scene.background, *(thing.colour for thing in scene.objects)}
    grounds = [ground for ground in config.background_names if ground not in taken]
    return _choose([replace(scene, background=ground) for ground in grounds], config, draw)


def rearranged(scene: Scene, config: ScenesConfig, draw: Callable[[], float]) -> Scene:
    """The same objects, of the same sizes and in the same relation, at other places."""

    def moved(other: Scene) -> float:
        pairs = zip(scene.objects, other.objects, strict=True)
        return min(math.dist(_centre(old), _centre(new)) for old, new in pairs)

    return max((place_objects(config, scene, draw) for _ in range(_PLACEMENTS)), key=moved)


def _centre(thing: SceneObject) -> tuple[float, float]:
    left, top, side = thing.box
    return left + side / 2, top + side / 2


def _exchange(scene: Scene, which: int, **values: str) -> Scene:
    things = list(scene.objects)
    things[which] = replace(things[which], **values)  # type: ignore[arg-type]
    return replace(scene, objects=tuple(things))


def _choose(choices: Sequence[Scene], config: ScenesConfig, draw: Callable[[], float]) -> Scene:
    preferred = [scene for scene in choices if is_held_out(config, scene)] or choices
    return preferred[int(draw() * len(preferred))]
