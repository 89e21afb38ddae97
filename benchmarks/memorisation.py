"""Does the copying check see a model that has learned its training images by heart, and clear one that has not?

    python benchmarks/memorisation.py --run runs/scenes/ldm --out runs/memorisation

The run's model is trained further on 50 scenes alone, which it has not seen, until it reproduces them. Then the check
that `ldm evaluate` makes is asked about what this model draws from the captions of those 50, about what the run's own
model draws from them, and about fresh scenes.
Writes OUT/memorisation.json, memorisation.md and memorisation.png; what is finished is not done again.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from statistics import median

import torch
from PIL import Image
from torch import Tensor

from conditioning.text import TextConfig
from ldm.config import dump, load
from ldm.data.fixed_batches import fixed_images
from ldm.data.share import Share
from ldm.data.sources import DataConfig
from ldm.evaluation.bootstrap import wilson_interval
from ldm.evaluation.copying import Pair
from ldm.evaluation.latent_features import LatentExtractor
from ldm.evaluation.report_copying import CopySearch, search_copies, through_autoencoder
from ldm.evaluation.report_data import ReportData, open_data, told_samples
from ldm.evaluation.report_drawing import Drawing, draw_all
from ldm.interchange.fingerprint import base_model_hash
from ldm.interchange.opening import open_pipeline
from ldm.picture import grid, save_png, strip, to_pil
from ldm.pipeline import LatentDiffusionPipeline
from ldm.training.conditions import ConditionsConfig
from ldm.training.learner import OptimiserConfig
from ldm.training.loop import TrainingConfig
from ldm.training.preview import PreviewConfig
from ldm.training.stage2_config import Stage2Config

ROOT = Path(__file__).parents[1]
LEARNED_BY_HEART, OWN_MODEL, FRESH = (
    "the memoriser, its captions",
    "the run's model, the same captions",
    "fresh scenes, decoded",
)
BATCH = 25
SHOWN = 8
"""Pairs of each set in the picture."""


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--run", type=Path, default=Path("runs/scenes/ldm"), help="a stage 2 run on scenes of shapes")
    parser.add_argument("--out", type=Path, default=Path("runs/memorisation"))
    parser.add_argument("--images", type=int, default=50, help="training images of the memoriser")
    parser.add_argument("--steps", type=int, default=2000, help="training steps on them")
    parser.add_argument("--batch-size", type=int, default=25)
    parser.add_argument("--lr", type=float, default=1e-3)
    parser.add_argument("--count", type=int, default=100, help="pictures that each model draws")
    parser.add_argument("--fresh", type=int, default=300, help="fresh scenes")
    arguments = parser.parse_args()
    config = load(Stage2Config, arguments.run / "config.yaml")
    scenes = config.data.scenes
    few = replace(config.data, scenes=replace(scenes, seed=scenes.seed + 1, count=arguments.images))
    train(arguments, few)
    data = ReportData(name="fresh scenes", config=few, vocabulary=scenes, training=few).at(config.data.resolution)
    pipeline = open_pipeline(arguments.out / "run", dtype="fp32")
    sets = {
        LEARNED_BY_HEART: draw(arguments, pipeline, data, arguments.out / "run"),
        OWN_MODEL: draw(arguments, open_pipeline(arguments.run, dtype="fp32"), data, arguments.run),
        FRESH: fresh(pipeline, data.config, arguments.fresh),
    }
    eyes = LatentExtractor(pipeline.vae, data.config.resolution)
    images = (batch for batches in sets.values() for batch in batches)
    search = search_copies(eyes, images, data, autoencoder=pipeline.vae, most=10_000, seed=0)
    report(arguments, search, {name: to_pil(torch.cat(batches)) for name, batches in sets.items()})


def train(arguments: argparse.Namespace, few: DataConfig) -> None:
    """Run `train_ldm.py`, which goes on where it was stopped; nothing to do once its pipeline is there."""
    run = arguments.out / "run"
    if (run / "pipeline").exists():
        return
    steps = arguments.steps
    config = Stage2Config(
        out=str(run),
        model=str(arguments.run / "pipeline"),
        data=few,
        conditions=ConditionsConfig(text=TextConfig(encoder="model", dropout=0.0)),
        optimiser=OptimiserConfig(lr=arguments.lr, betas=(0.9, 0.99), schedule="cosine", warmup_steps=10),
        ema_decay=0.95,
        preview=PreviewConfig(count=4, num_inference_steps=10, guidance_scale=1.0, loss_images=16),
        training=TrainingConfig(
            steps=steps,
            batch_size=arguments.batch_size,
            workers=0,
            checkpoint_every=max(1, steps // 4),
            validate_every=steps,
        ),
    )
    arguments.out.mkdir(parents=True, exist_ok=True)
    path = arguments.out / "memoriser.yaml"
    path.write_text(dump(config), encoding="utf-8")
    subprocess.run([sys.executable, ROOT / "train_ldm.py", path], check=True)


def draw(
    arguments: argparse.Namespace, pipeline: LatentDiffusionPipeline, data: ReportData, model: Path
) -> list[Tensor]:
    """What a model draws from the captions of the few images, in turn, each from a seed of its own: batches."""
    side = data.config.resolution
    told = told_samples(pipeline, open_data(data.config), data.config, arguments.count, 0)
    drawing = Drawing(count=len(told), steps=20, guidance=1.0, scheduler=None, batch=BATCH, seed=0)
    folder = arguments.out / "images" / model.name
    made = draw_all(pipeline, told, drawing, side, folder, Share(), base_model_hash(model))[""]
    return list(made.folder.batches(told, BATCH))


def fresh(pipeline: LatentDiffusionPipeline, few: DataConfig, count: int) -> list[Tensor]:
    """Scenes drawn as the few were, put through the autoencoder as a model's pictures are: batches."""
    config = replace(few, scenes=replace(few.scenes, seed=few.scenes.seed + 1, count=count))
    through = through_autoencoder(pipeline.vae)
    return [through(images) for images in fixed_images(open_data(config), config, count, BATCH)]


def report(arguments: argparse.Namespace, search: CopySearch, pictures: Mapping[str, Sequence[Image.Image]]) -> None:
    """The share of each set that is flagged, and its most suspicious pairs."""
    rows = ["| samples | n | flagged | median distance from the nearest training image |", "|---|---:|---:|---:|"]
    figures, shown, words, first = {}, [], [], 0
    for name, images in pictures.items():
        pairs = [pair for pair in search.report.pairs if first <= pair.sample < first + len(images)]
        flagged = sum(pair.flagged for pair in pairs)
        low, high = (100 * edge for edge in wilson_interval(flagged, len(pairs)))
        distance = median(pair.pixel_distance for pair in pairs)
        share = 100 * flagged / len(pairs)
        rows.append(f"| {name} | {len(pairs)} | {share:.1f} % [{low:.1f}, {high:.1f}] | {distance:.1f}/255 |")
        figures[name] = {"flagged": flagged, "n": len(pairs), "median_distance": distance}
        for pair in different(pairs)[:SHOWN]:
            shown.append(strip([images[pair.sample - first], search.training(pair.training)]))
            words.append(f"{name}: {pair.pixel_distance:.1f}/255 apart{', flagged' if pair.flagged else ''}")
        first += len(images)
    print("\n".join(rows))
    print(f"planted copies found: {search.report.planted:.1%}; held-out images: {search.report.held_out}")
    settings = {name: str(value) for name, value in vars(arguments).items()}
    values = json.dumps({"settings": settings, "planted": search.report.planted, "sets": figures}, indent=2)
    (arguments.out / "memorisation.json").write_text(values + "\n", encoding="utf-8")
    (arguments.out / "memorisation.md").write_text("\n".join(rows) + "\n", encoding="utf-8")
    save_png(grid(shown, captions=words, columns=SHOWN), arguments.out / "memorisation.png")


def different(pairs: Sequence[Pair]) -> list[Pair]:
    """The most suspicious first, each of another training image; then the rest."""
    first = {pair.training: pair for pair in reversed(pairs)}
    return sorted(pairs, key=lambda pair: first[pair.training] is not pair)


if __name__ == "__main__":
    main()
