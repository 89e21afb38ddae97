"""Score and feature distance of runs against the images they have seen, from the checkpoints that they kept.

    python benchmarks/learning_curve.py ours=runs/reference/ldm plain=runs/baseline/ldm-emoji --out runs/curves

Runs of train_ldm.py on built-in scenes that kept their checkpoints (`training.keep_checkpoints=100`). The averaged
weights of each checkpoint draw the same held-out prompts with the same seeds, and the exact scorer measures them; the
feature distance is to exact drawings of the same scenes. Writes OUT/curves.html and curves.json, which also has the
factor: how many times fewer images the first run needs for what the last checkpoint of another run scores. What
curves.json has of the same checkpoint and prompts is not drawn again.
"""

from __future__ import annotations

import argparse
import hashlib
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from PIL import Image
from safetensors.torch import load_file

from ldm.config import load
from ldm.data.scene_rendering import render_image
from ldm.data.scenes import held_out_prompts
from ldm.data.sources import DataConfig, open_source
from ldm.device import choose_dtype
from ldm.evaluation.frechet import frechet_distance
from ldm.evaluation.page import page, plots
from ldm.evaluation.plots import Series, line_plot
from ldm.evaluation.scene_features import SceneExtractor
from ldm.evaluation.scenes import rates, score_each
from ldm.evaluation.statistics import Moments
from ldm.pipeline import LatentDiffusionPipeline
from ldm.sampling import make_scheduler
from ldm.training.networks import build_networks
from ldm.training.stage2_config import Stage2Config

FIGURES = {
    "objects": "every named object there",
    "everything": "all that the prompt says",
    "distance": "Frechet distance through scene attributes",
}
BATCH = 64
Point = dict[str, Any]
"""`images`, `checkpoint` (a hash of it), and what `Judge` measures."""


def open_checkpoint(
    config: Stage2Config, checkpoint: Path, *, averaged: bool = True, dtype: str = "fp32"
) -> LatentDiffusionPipeline:
    """What draws with a checkpoint's averaged weights; with those of the last step if asked to, or if none are kept.

    `dtype` is as in `choose_dtype`: "auto" is the machine's own, in which users draw too.
    """
    nets = build_networks(config, open_source(config.data))
    average = checkpoint / "unet.ema.safetensors"
    tensors = load_file(average if averaged and average.is_file() else checkpoint / "unet.safetensors")
    for prefix, module in {"unet.": nets.unet, "encoders.": nets.encoders}.items():
        own = {name.removeprefix(prefix): tensor for name, tensor in tensors.items() if name.startswith(prefix)}
        lacking = set(dict(module.named_parameters())) - set(own)
        if lacking or module.load_state_dict(own, strict=False).unexpected_keys:
            raise SystemExit(f"{checkpoint}: is not of {config.out}: {sorted(lacking)[:3]}")
    pipeline = LatentDiffusionPipeline(
        nets.autoencoder,
        nets.encoders.text,
        nets.unet,
        make_scheduler("ddim", nets.noise),
        semantic_encoder=nets.encoders.semantic,
        label_encoder=nets.encoders.label,
    )
    return pipeline.to(dtype=choose_dtype(dtype, torch.device("cpu")))


class Judge:
    """Has the same prompts drawn by any model, and measures the pictures."""

    def __init__(self, data: DataConfig, count: int, steps: int, guidance: float) -> None:
        self._vocabulary = data.scenes
        self._extractor = SceneExtractor(data.scenes, data.resolution)
        told = held_out_prompts(data.scenes, count)
        self._prompts, self._scenes = [prompt for prompt, _ in told], [scene for _, scene in told]
        self._drawing = {"num_inference_steps": steps, "guidance_scale": guidance}
        self._wanted = self._moments([render_image(scene, data.resolution) for scene in self._scenes])

    def measure(self, pipeline: LatentDiffusionPipeline) -> Point:
        """Shares of right statements, all and by the number of objects, and the feature distance."""
        pictures: list[Image.Image] = []
        for start in range(0, len(self._prompts), BATCH):
            part = self._prompts[start : start + BATCH]
            pictures += pipeline(part, seed=list(range(start, start + len(part))), **self._drawing).images
        scores = score_each(pictures, self._scenes, self._vocabulary)
        values = {name: value for name, value in rates(scores).items() if name != "images"}
        for number in sorted({len(score.found) for score in scores}):
            right = [score.objects for score in scores if len(score.found) == number]
            values[f"objects_of_{number}"] = sum(right) / len(right)
        return {**values, "distance": frechet_distance(self._moments(pictures), self._wanted)}

    def _moments(self, pictures: Sequence[Image.Image]) -> Moments:
        return Moments.of(torch.stack([self._extractor.measure(picture) for picture in pictures]))


def measured_run(run: Path, judge: Judge, known: Sequence[Point], *, averaged: bool = True) -> list[Point]:
    """A point for each checkpoint, in the order of training."""
    config = load(Stage2Config, run / "config.yaml")
    batch, points = config.training.batch_size * config.training.accumulation, []
    steps = sorted(int(folder.name.removeprefix("step-")) for folder in (run / "checkpoints").glob("step-*"))
    for step in steps:
        folder = run / "checkpoints" / f"step-{step}"
        checkpoint = hashlib.sha256((folder / "manifest.json").read_bytes()).hexdigest()[:16]
        point = next((old for old in known if old["checkpoint"] == checkpoint), None)
        if point is None:
            measured = judge.measure(open_checkpoint(config, folder, averaged=averaged, dtype="auto"))
            point = {"images": step * batch, "checkpoint": checkpoint, **measured}
        points.append(point)
        print(run, ", ".join(f"{name} {point[name]:.4g}" for name in ("images", *FIGURES)), flush=True)
    return points


def images_to_reach(points: Sequence[Point], figure: str, wanted: float) -> float | None:
    """Images at which a curve, straight between its points, is first as good as `wanted`; None if it never is."""
    sign = -1.0 if figure == "distance" else 1.0
    before: Point | None = None
    for point in points:
        gained = sign * (point[figure] - wanted)
        if gained >= 0 and before is None:
            return point["images"]
        if gained >= 0 and before is not None:
            missing = sign * (wanted - before[figure])
            return before["images"] + missing / (missing + gained) * (point["images"] - before["images"])
        before = point
    return None


def factors(curves: dict[str, list[Point]]) -> dict[str, dict[str, float | None]]:
    """Of every run but the first: its images over the first run's for the same figures, None where that falls short."""
    (_, first), *others = ((name, points) for name, points in curves.items() if points)
    found: dict[str, dict[str, float | None]] = {}
    for name, points in others:
        needed = {figure: images_to_reach(first, figure, points[-1][figure]) for figure in FIGURES}
        found[name] = {figure: points[-1]["images"] / images if images else None for figure, images in needed.items()}
    return found


def page_of(curves: dict[str, list[Point]]) -> str:
    """One page with a plot for each figure."""
    drawn = []
    for figure, title in FIGURES.items():
        series = [
            Series(label=name, x=[p["images"] for p in points], y=[p[figure] for p in points], dots=True)
            for name, points in curves.items()
        ]
        drawn.append(line_plot(series, title=title, x_label="images seen", y_label=figure))
    words = "held-out prompts"
    return page("Learning curves", words, [], [("curves", "Against the images seen", plots(*drawn))])


def named_run(text: str) -> tuple[str, Path]:
    """`ours=runs/x` -> its name and folder. Raises what argparse tells in one line."""
    name, _, run = text.partition("=")
    if not (name and run and (Path(run) / "config.yaml").is_file() and any(Path(run).glob("checkpoints/step-*"))):
        raise argparse.ArgumentTypeError(f"found {text!r}; allowed is NAME=RUN, a run of train_ldm.py with checkpoints")
    return name, Path(run)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("runs", nargs="+", type=named_run, metavar="NAME=RUN")
    parser.add_argument("--count", type=int, default=256, metavar="N", help="pictures for each checkpoint")
    parser.add_argument("--steps", type=int, default=20, metavar="N")
    parser.add_argument("--guidance", type=float, default=3.0, metavar="SCALE")
    parser.add_argument(
        "--last-weights", action="append", default=[], metavar="NAME", help="draw NAME with these, not their average"
    )
    parser.add_argument("--out", type=Path, required=True, metavar="FOLDER")
    arguments = parser.parse_args()
    runs = dict(arguments.runs)
    if unknown := set(arguments.last_weights) - set(runs):
        parser.error(f"--last-weights: found {', '.join(sorted(unknown))}; allowed is {', '.join(runs)}")
    settings: dict[str, Any] = {"count": arguments.count, "steps": arguments.steps, "guidance": arguments.guidance}
    judge = Judge(load(Stage2Config, next(iter(runs.values())) / "config.yaml").data, **settings)
    settings["last_weights"] = sorted(arguments.last_weights)
    settings["dtype"] = str(choose_dtype("auto", torch.device("cpu")))  # points of another precision are drawn again
    path = arguments.out / "curves.json"
    old = json.loads(path.read_text(encoding="utf-8")) if path.is_file() else {}
    known = old["curves"] if old.get("settings") == settings else {}
    arguments.out.mkdir(parents=True, exist_ok=True)
    curves = {name: known.get(name, []) for name in runs}
    for name, run in runs.items():
        curves[name] = measured_run(run, judge, known.get(name, []), averaged=name not in arguments.last_weights)
        found = {"settings": settings, "curves": curves, "factors": factors(curves)}
        path.write_text(json.dumps(found, indent=2) + "\n", encoding="utf-8")
        (arguments.out / "curves.html").write_text(page_of(curves), encoding="utf-8")
    print(json.dumps(found["factors"], indent=2))


if __name__ == "__main__":
    main()
