"""How often is the exact scorer of scenes right about true scenes, and what does it take for what?

    python benchmarks/scene_scorer.py --out runs/scene-scorer

Scenes of both kinds with one, two and three objects at 32, 48 and 64 px, half of them of held-out combinations. Writes
OUT/scorer.md, a table of the share right of every part of the prompt, and OUT/report.html with the confusion matrices.
"""

from __future__ import annotations

import argparse
from collections import defaultdict
from dataclasses import replace
from pathlib import Path

from tqdm import tqdm

from ldm.data.scene_rendering import render_image
from ldm.data.scenes import ScenesConfig, scene_at
from ldm.evaluation.page import plots
from ldm.evaluation.page_charts import heat_map
from ldm.evaluation.page_text import Html
from ldm.evaluation.report import Report, Section
from ldm.evaluation.scenes import NOTHING, counted, read_scene

SIDES = (32, 48, 64)
PARTS = ("background", "objects", "colours", "sizes", "relation")
Pairs = dict[str, list[tuple[str, str]]]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=Path("runs/scene-scorer"))
    parser.add_argument("--count", type=int, default=200, help="scenes of each kind, number of objects and size")
    arguments = parser.parse_args()
    rows = [f"| scenes | px | {' | '.join(PARTS)} | everything |", f"|---|---:|{'---:|' * (len(PARTS) + 1)}"]
    matrices: dict[str, Pairs] = {kind: defaultdict(list) for kind in ("shapes", "emoji")}
    for kind, found in matrices.items():
        for objects in (1, 2, 3):
            config = ScenesConfig(kind=kind, min_objects=objects, max_objects=objects)  # type: ignore[arg-type]
            for side in SIDES:
                pairs, right = measure(config, side, arguments.count)
                shares = [share([one == other for one, other in pairs[part]]) for part in PARTS]
                rows.append(f"| {kind}, {objects} | {side} | {' | '.join(shares)} | {share(right)} |")
                print(rows[-1])
                for part, some in pairs.items():
                    found[part] += some
    arguments.out.mkdir(parents=True, exist_ok=True)
    (arguments.out / "scorer.md").write_text("\n".join(rows) + "\n", encoding="utf-8")
    sections = tuple(section(kind, found) for kind, found in matrices.items())
    settings = {"count": arguments.count, "sides": SIDES}
    Report(title="The exact scorer on true scenes", subtitle="", settings=settings, sections=sections).write(
        arguments.out
    )


def measure(config: ScenesConfig, side: int, count: int) -> tuple[Pairs, list[bool]]:
    """(Named, found) of every part, and whether all of a scene is right."""
    pairs: Pairs = defaultdict(list)
    right = []
    for index in tqdm(range(count), desc=f"{config.kind}, {config.max_objects} objects, {side} px", leave=False):
        split = replace(config, split="held_out" if index % 2 else "train")
        scene = scene_at(split, index)
        readings = read_scene(render_image(scene, side), scene, split)
        right.append(all(named == found for some in readings.values() for named, found in some))
        for part, some in readings.items():
            pairs[part] += some
    return pairs, right


def share(right: list[bool]) -> str:
    """`99.5 %`, or a dash where nothing is stated."""
    return f"{100 * sum(right) / len(right):.1f} %" if right else "–"


def section(kind: str, found: Pairs) -> Section:
    """A confusion matrix for every part of the prompt."""
    drawn = [
        heat_map(counted(found[part]), title=f"{kind}: {part}", row_label="named", column_label="found", last=NOTHING)
        for part in PARTS
        if found[part]
    ]
    matrices = {part: counted(some) for part, some in found.items()}
    return Section(name=kind, title=kind.capitalize(), content=Html(plots(*drawn)), values=matrices)


if __name__ == "__main__":
    main()
