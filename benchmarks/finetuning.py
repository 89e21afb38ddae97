"""Does fine-tuning teach, and what does it cost? Measured with the exact scorer of the built-in scenes.

    python benchmarks/finetuning.py --run runs/scenes/ldm --out runs/finetuning
    python benchmarks/finetuning.py ... --methods lora dreambooth --set lora:optimiser.lr=5e-4

A model of scenes is shown 20 images of a shape that it has never seen, under a new word, by every way of fine-tuning
that `configs/finetune` has for it. Then pictures are drawn and scored: does the word draw the shape, and do prompts of
the old shapes (combinations held out of its training) still draw what they say? The new shape is among the answers to
both. Writes OUT/finetuning.json, finetuning.md and finetuning.png; what is finished is not done again.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, replace
from itertools import cycle, islice
from pathlib import Path
from typing import Any

from PIL import Image
from tqdm import tqdm

from ldm.config import load
from ldm.data.scene_rendering import PHRASINGS, Scene, caption, captions, render_image
from ldm.data.scenes import ScenesConfig, held_out_prompts, scene_at
from ldm.evaluation.scenes import score_images
from ldm.interchange.opening import open_pipeline
from ldm.picture import grid, save_png
from ldm.training.stage2_config import Stage2Config

ROOT = Path(__file__).parents[1]
SMALL = {
    "optimiser.lr": 5e-4,
    "optimiser.schedule": "cosine",
    "optimiser.warmup_steps": 20,
    "ema_decay": 0.99,
    "conditions.text.dropout": 0.1,
}
TEXT = {"conditions.text.finetune": True}
LORA = {
    "optimiser.lr": 2e-3,
    "optimiser.warmup_steps": 20,
    "ema_decay": 0.99,
    "lora.rank": 32,
    "lora.target": "[all-linear+conv]",
    "lora.text_encoder": True,
}
DRAWN = {"prior.num_inference_steps": 25, "prior.guidance_scale": 4.0, "prior.batch_size": 32}
OWN = {"prior.folder": "own-images"}
METHODS: dict[str, tuple[str, dict[str, Any]]] = {
    "full-alone": ("full", {**SMALL, "optimiser.lr": 2e-4}),
    "full": ("full", {**SMALL, **TEXT, **OWN}),
    "lora-alone": ("lora", LORA),
    "lora": ("lora", {**LORA, **OWN}),
    "lora-prior": ("lora", {**LORA, **DRAWN}),
    "dreambooth": ("dreambooth", {**SMALL, **TEXT, **DRAWN}),
    "textual-inversion": ("textual_inversion", {"optimiser.lr": 2e-2, "textual_inversion.vectors": 2}),
}
"""Name -> the config in configs/finetune, and what a small model learns with.

Prior preservation is with images that the model was trained on (`OWN`) or that it draws itself (`DRAWN`).
"""
PICTURE_COLUMNS = 4


@dataclass(frozen=True)
class Task:
    """What is taught and asked.

    Attributes:
        old: the scenes that the model knows.
        known: those with the new shape among them, in the same sizes.
    """

    old: ScenesConfig
    known: ScenesConfig
    shape: str
    word: str
    resolution: int

    def new_scenes(self) -> Iterator[Scene]:
        """Scenes of the new shape alone."""
        scenes = (scene_at(self.known, index) for index in range(10**6))
        return (scene for scene in scenes if [thing.name for thing in scene.objects] == [self.shape])

    def varied_scenes(self, count: int) -> Iterable[Scene]:
        """As a person would choose them: no two of the same colour on the same background."""
        scenes = {(scene.objects[0].colour, scene.background): scene for scene in islice(self.new_scenes(), 500)}
        if count > len(scenes):
            raise SystemExit(f"--images: found {count}; the new shape has {len(scenes)} looks; ask for no more")
        return islice(scenes.values(), count)

    def worded(self, text: str) -> str:
        """A caption with the new word for the shape."""
        return text.replace(self.shape, self.word)

    def prompts(self, count: int) -> dict[str, list[tuple[str, Scene]]]:
        """What is drawn: `new`, the word in every colour on every background, and `old`, combinations held out.

        When every combination has come once they come in other words, then again, with other seeds.
        """
        scenes = {caption(scene): scene for scene in islice(self.new_scenes(), 500)}.values()
        pairs = [(self.worded(caption(scene, phrasing)), scene) for phrasing in range(PHRASINGS) for scene in scenes]
        return {"new": list(islice(cycle(pairs), count)), "old": held_out_prompts(self.old, count)}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--run", type=Path, default=Path("runs/scenes/ldm"), help="a stage 2 run on scenes of shapes")
    parser.add_argument("--out", type=Path, default=Path("runs/finetuning"))
    parser.add_argument("--shape", default="star", help="the shape that is new to the model")
    parser.add_argument("--word", default="zorp", help="what the captions call it")
    parser.add_argument("--images", type=int, default=20, help="images of it")
    parser.add_argument("--class-images", type=int, default=1000, help="for prior preservation")
    parser.add_argument("--steps", type=int, default=600, help="training steps of each method")
    parser.add_argument("--batch-size", type=int, default=16)
    parser.add_argument("--count", type=int, default=96, help="pictures scored, of new and of old prompts each")
    parser.add_argument("--methods", nargs="+", choices=METHODS, default=list(METHODS))
    parser.add_argument("--set", action="append", default=[], metavar="METHOD:key=value", help="override of one method")
    arguments = parser.parse_args()
    config = load(Stage2Config, arguments.run / "config.yaml")
    old = config.data.scenes
    if arguments.shape in old.object_names:
        parser.error(f"--shape {arguments.shape}: the model knows it; take one that is not of its {old.object_names}")
    with_new = replace(old, objects=(*old.object_names, arguments.shape), held_out=0.0, seed=old.seed + 1)
    task = Task(old, with_new, arguments.shape, arguments.word, config.data.resolution)
    write_images(task.varied_scenes(arguments.images), task, arguments.out / "images")
    known = (scene_at(old, index) for index in range(arguments.class_images))
    write_images(known, task, arguments.out / "own-images")
    results = {"before": measure(task, arguments.run, arguments.out / "before", arguments.count)}
    for method in arguments.methods:
        train(task, method, arguments)
        run = arguments.out / method
        results[method] = measure(task, run, run / "score", arguments.count)
        report(task, results, arguments)


def write_images(scenes: Iterable[Scene], task: Task, folder: Path) -> None:
    """A dataset of these scenes, captioned in every phrasing, with the new word for the new shape."""
    if (folder / "metadata.jsonl").exists():
        return
    folder.mkdir(parents=True, exist_ok=True)
    rows = []
    for index, scene in enumerate(scenes):
        render_image(scene, task.resolution).save(folder / f"{index:05d}.png")
        rows.append({"file_name": f"{index:05d}.png", "text": [task.worded(text) for text in captions(scene)]})
    (folder / "metadata.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")


def train(task: Task, method: str, arguments: argparse.Namespace) -> None:
    """Run `train_ldm.py`, which goes on where it was stopped; nothing to do once its pipeline is there."""
    if (arguments.out / method / "pipeline").exists():
        return
    name, changes = METHODS[method]
    values: dict[str, Any] = {
        "out": arguments.out / method,
        "model": arguments.run / "pipeline",
        "data.root": arguments.out / "images",
        "data.resolution": task.resolution,
        "unet.gradient_checkpointing": False,
        "preview.prompts": json.dumps([text for pairs in task.prompts(4).values() for text, _ in pairs]),
        "preview.guidance_scale": 4.0,
        "preview.loss_images": 0,
        "training.steps": arguments.steps,
        "training.batch_size": arguments.batch_size,
        "training.accumulation": 1,
        "training.workers": 0,
        "training.checkpoint_every": max(1, arguments.steps // 2),
        "training.validate_every": max(1, arguments.steps // 2),
        **changes,
    }
    if "prior.folder" in changes:
        values["prior.folder"] = arguments.out / str(changes["prior.folder"])
    if "prior.batch_size" in changes:
        prompts = arguments.out / "class-prompts.txt"
        scenes = (scene_at(task.old, index) for index in range(arguments.class_images))
        prompts.write_text("".join(f"{caption(scene)}\n" for scene in scenes), encoding="utf-8")
        values |= {"prior.prompts": prompts, "prior.count": arguments.class_images}
        values |= {"prior.folder": arguments.out / "class-images"}
    if name == "textual_inversion":
        values |= {"textual_inversion.token": task.word, "textual_inversion.initial": task.old.object_names[-1]}
    chosen = [text.partition(":")[2] for text in arguments.set if text.partition(":")[0] == method]
    overrides = [*(f"{key}={value}" for key, value in values.items()), *chosen]
    config = ROOT / "configs" / "finetune" / f"{name}.yaml"
    subprocess.run([sys.executable, ROOT / "train_ldm.py", config, *overrides], check=True)


def measure(task: Task, model: Path, folder: Path, count: int) -> dict[str, dict[str, float]]:
    """Draw both kinds of prompts, keep the first pictures, and score all."""
    path = folder / f"score-{count}.json"
    if path.exists():
        return json.loads(path.read_text(encoding="utf-8"))
    folder.mkdir(parents=True, exist_ok=True)
    pipeline = open_pipeline(model)
    scores = {}
    for kind, pairs in task.prompts(count).items():
        prompts, scenes = [text for text, _ in pairs], [scene for _, scene in pairs]
        bar = tqdm(total=len(prompts), desc=f"{model.name}: {kind} prompts", unit="image")
        images: list[Image.Image] = []
        for start in range(0, len(prompts), 32):
            part = prompts[start : start + 32]
            settings = {"num_inference_steps": 25, "guidance_scale": 4.0, "scheduler": "ddim"}
            images += pipeline(part, seed=list(range(start, start + len(part))), **settings).images  # type: ignore[arg-type]
            bar.update(len(part))
        bar.close()
        for index, image in enumerate(images[:PICTURE_COLUMNS]):
            save_png(image, folder / f"{kind}-{index}.png")
        scores[kind] = score_images(images, scenes, task.known)
    path.write_text(json.dumps(scores, indent=2) + "\n", encoding="utf-8")
    return scores


def report(task: Task, results: Mapping[str, Mapping[str, Mapping[str, float]]], arguments: argparse.Namespace) -> None:
    """The table, the figures, and a picture with a row for each method."""
    names = {"new": (f'"{task.word}" draws it', "everything"), "old": ("old objects", "change", "everything")}
    head = ["method", *(title for titles in names.values() for title in titles)]
    lines = [" | ".join(head), "|".join(["---", *["---:"] * (len(head) - 1)])]
    for method, scores in results.items():
        change = 100 * (scores["old"]["objects"] - results["before"]["old"]["objects"])
        new, old = scores["new"], scores["old"]
        cells = [f"{new['objects']:.1%}", f"{new['everything']:.1%}", f"{old['objects']:.1%}"]
        lines.append(" | ".join([method, *cells, f"{change:+.1f} points", f"{old['everything']:.1%}"]))
    table = "".join(f"| {line} |\n" for line in lines)
    print(table)
    settings = {name: str(value) for name, value in vars(arguments).items()}
    figures = {"settings": settings, "results": results}
    (arguments.out / "finetuning.json").write_text(json.dumps(figures, indent=2) + "\n", encoding="utf-8")
    (arguments.out / "finetuning.md").write_text(table, encoding="utf-8")
    folders = {method: arguments.out / (method if method == "before" else f"{method}/score") for method in results}
    prompts = {kind: [text for text, _ in pairs] for kind, pairs in task.prompts(PICTURE_COLUMNS).items()}
    pictures, words = [], []
    for method, folder in folders.items():
        for kind, texts in prompts.items():
            paths = [folder / f"{kind}-{index}.png" for index in range(len(texts))]
            pictures += [Image.open(path).copy() for path in paths]
            words += [f"{method}: {text}" for text in texts]
    save_png(grid(pictures, captions=words, columns=2 * PICTURE_COLUMNS), arguments.out / "finetuning.png")


if __name__ == "__main__":
    main()
