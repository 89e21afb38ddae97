"""Does a model of photographs learn a class that it has never seen from 20 images, and keep those that it knows?

    python benchmarks/tenth_class.py --data ../shared/data/clothing --out runs/tenth

A small model is trained on the photographs of all classes but one (`configs/photographs/ldm.yaml`), then on 20 of that
one with their captions, in several ways. A classifier of all classes judges what is drawn before and after: trained on
the real photographs as the autoencoder reproduces them, so that blur tells it nothing, and tested on others. Writes
OUT/tenth_class.json, tenth_class.md and tenth_class.png; what is finished is not done again.
"""

from __future__ import annotations

import argparse
import json
import shutil
import subprocess
import sys
from collections.abc import Mapping
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from typing import Any

import torch
from PIL import Image
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from torch.nn import functional as F
from tqdm import tqdm

from ldm.data.fixed_batches import fixed_samples, spread_indices
from ldm.data.sources import DataConfig, open_source
from ldm.interchange.opening import open_pipeline
from ldm.picture import grid, save_png, to_pil
from ldm.pipeline import LatentDiffusionPipeline

ROOT = Path(__file__).parents[1]
LORA = {
    "optimiser.lr": 1e-3,
    "optimiser.warmup_steps": 20,
    "lora.target": "[all-linear+conv]",
    "lora.text_encoder": True,
}
METHODS: dict[str, tuple[str, dict[str, Any]]] = {
    "lora": ("lora", LORA),
    "lora-prior": ("lora", LORA),
    "full-prior": ("dreambooth", {"optimiser.lr": 1e-4, "conditions.text.dropout": 0.1}),
}
"""Name -> the config in configs/finetune, and what a small model learns with. A prior is images of known classes."""
RESOLUTION = 64
PICTURES = 4


@dataclass(frozen=True)
class Task:
    """What is drawn and asked: the caption of each class by its name, the names as the classifier numbers them."""

    classes: tuple[str, ...]
    captions: Mapping[str, str]
    new: str

    def prompts(self, new: int, old: int) -> list[tuple[str, int]]:
        """The new class so often, each of the others so often, with the number of the class."""
        often = [(name, new if name == self.new else old) for name in self.classes]
        return [(self.captions[name], self.classes.index(name)) for name, count in often for _ in range(count)]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, required=True, help="folder with train/ and validation/ of classes")
    parser.add_argument("--autoencoder", type=Path, default=Path("runs/photographs/vae/autoencoder"))
    parser.add_argument("--out", type=Path, default=Path("runs/tenth"))
    parser.add_argument("--new", default="pants", help="the class that the model is not shown at first")
    parser.add_argument("--images", type=int, default=20, help="images of it, and of each other class in a prior")
    parser.add_argument("--first-steps", type=int, default=1000, help="training steps of the model without the class")
    parser.add_argument("--steps", type=int, default=250, help="training steps of each method")
    parser.add_argument("--batch-size", type=int, default=16)
    parser.add_argument("--count", type=int, default=48, help="pictures drawn of the new class")
    parser.add_argument("--old-count", type=int, default=10, help="pictures drawn of each other class")
    parser.add_argument("--methods", nargs="+", choices=METHODS, default=list(METHODS))
    arguments = parser.parse_args()
    out: Path = arguments.out
    task = split(arguments.data / "train", out / "data", arguments.new, arguments.images)
    first = {
        "out": out / "nine",
        "autoencoder": arguments.autoencoder,
        "data.root": out / "data" / "nine",
        "training.steps": arguments.first_steps,
    }
    train(ROOT / "configs" / "photographs" / "ldm.yaml", first)
    judge, accuracy = classifier(open_pipeline(out / "nine"), arguments.data, task, out / "classifier.safetensors")
    results = {"before": measure(judge, task, out / "nine", out / "before", arguments)}
    for method in arguments.methods:
        name, changes = METHODS[method]
        train(ROOT / "configs" / "finetune" / f"{name}.yaml", values_for(method, changes, task, arguments))
        results[method] = measure(judge, task, out / method, out / method / "score", arguments)
        report(task, accuracy, results, arguments)


def split(source: Path, out: Path, new: str, count: int) -> Task:
    """Copy all classes but the new one to OUT/nine, `count` images of it to OUT/tenth, of each other to OUT/prior."""
    rows = [json.loads(line) for line in (source / "metadata.jsonl").read_text(encoding="utf-8").splitlines()]
    task = Task(tuple(sorted({row["label"] for row in rows})), {row["label"]: row["text"] for row in rows}, new)

    def spread(name: str) -> list[dict[str, str]]:
        of_it = [row for row in rows if row["label"] == name]
        return [of_it[index] for index in spread_indices(len(of_it), count)]

    parts = {
        "nine": [row for row in rows if row["label"] != new],
        "tenth": spread(new),
        "prior": [row for name in task.classes if name != new for row in spread(name)],
    }
    for name, chosen in parts.items():
        if (out / name / "metadata.jsonl").exists():
            continue
        for row in chosen:
            (out / name / row["file_name"]).parent.mkdir(parents=True, exist_ok=True)
            shutil.copy(source / row["file_name"], out / name / row["file_name"])
        lines = "".join(json.dumps(row) + "\n" for row in chosen)
        (out / name / "metadata.jsonl").write_text(lines, encoding="utf-8")
    return task


def values_for(method: str, changes: Mapping[str, Any], task: Task, arguments: argparse.Namespace) -> dict[str, Any]:
    """What is set for a fine-tuning."""
    out, half = arguments.out, max(1, arguments.steps // 2)
    values: dict[str, Any] = {
        "out": out / method,
        "model": out / "nine" / "pipeline",
        "data.root": out / "data" / "tenth",
        "data.resolution": RESOLUTION,
        "data.flip": True,
        "unet.gradient_checkpointing": False,
        "cache.batch_size": 32,
        "preview.prompts": json.dumps(list(task.captions.values())),
        "preview.guidance_scale": 3.0,
        "preview.num_inference_steps": 25,
        "preview.loss_images": 0,
        "training.steps": arguments.steps,
        "training.batch_size": arguments.batch_size,
        "training.workers": 0,
        "training.checkpoint_every": half,
        "training.validate_every": half,
        **changes,
    }
    if method.endswith("prior"):
        values["prior.folder"] = out / "data" / "prior"  # real images: nothing is drawn
    return values


def train(config: Path, values: Mapping[str, Any]) -> None:
    """Run `train_ldm.py`, which goes on where it was stopped; nothing to do once its pipeline is there."""
    if not (Path(values["out"]) / "pipeline").exists():
        overrides = [f"{key}={value}" for key, value in values.items()]
        subprocess.run([sys.executable, ROOT / "train_ldm.py", config, *overrides], check=True)


def classifier(
    pipeline: LatentDiffusionPipeline, data: Path, task: Task, path: Path
) -> tuple[nn.Module, dict[str, float]]:
    """The classifier, and of the held-out images: share right, and of the new class share found (recall) and right."""
    torch.manual_seed(0)
    widths = (3, 16, 32, 64, 128)
    layers: list[nn.Module] = []
    for before, after in pairwise(widths):
        layers += [nn.Conv2d(before, after, 3, stride=2, padding=1), nn.BatchNorm2d(after), nn.ReLU()]
    network = nn.Sequential(*layers, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(widths[-1], len(task.classes)))
    if path.exists():
        network.load_state_dict(load_file(path))
    else:
        fit(network, *reproduced(pipeline, data / "train", task))
        save_file(network.state_dict(), path)
    images, labels = reproduced(pipeline, data / "validation", task)
    found, new = judged(network, images), task.classes.index(task.new)
    return network, {
        "images": len(labels),
        "accuracy": share(found == labels),
        "recall": share(found[labels == new] == new),
        "precision": share(labels[found == new] == new),
    }


def reproduced(pipeline: LatentDiffusionPipeline, folder: Path, task: Task) -> tuple[Tensor, Tensor]:
    """The images of a folder as the autoencoder gives them back, [N, 3, H, W] in [-1, 1], and their classes [N]."""
    config = DataConfig(root=str(folder), resolution=RESOLUTION)
    source = open_source(config)
    images, labels = [], []
    for sample, tensors in tqdm(fixed_samples(source, config, len(source)), str(folder), len(source), unit="image"):
        if tensors.image is not None and sample.label is not None:
            images.append(tensors.image)
            labels.append(task.classes.index(source.classes[sample.label]))
    parts = [pipeline.decode_latents(pipeline.encode_images(part)) for part in torch.stack(images).split(64)]
    return torch.cat(parts).clamp(-1, 1), torch.tensor(labels)


def fit(network: nn.Module, images: Tensor, labels: Tensor, epochs: int = 25, batch_size: int = 64) -> None:
    """Cross entropy; images are mirrored and moved by up to 6 pixels."""
    generator = torch.Generator().manual_seed(0)
    steps = epochs * len(images) // batch_size
    optimiser = torch.optim.AdamW(network.parameters(), lr=2e-3, weight_decay=0.05)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimiser, 2e-3, total_steps=steps)
    padded = F.pad(images, (6, 6, 6, 6), mode="replicate")
    for _ in tqdm(range(steps), "classifier", unit="step"):
        chosen = torch.randint(len(images), (batch_size,), generator=generator)
        top, left, mirrored = (int(torch.randint(most, (), generator=generator)) for most in (13, 13, 2))
        batch = padded[chosen, :, top : top + images.shape[-2], left : left + images.shape[-1]]
        loss = F.cross_entropy(network(batch.flip(-1) if mirrored else batch), labels[chosen], label_smoothing=0.1)
        optimiser.zero_grad()
        loss.backward()
        optimiser.step()
        schedule.step()


@torch.no_grad()
def judged(network: nn.Module, images: Tensor) -> Tensor:
    """The class of each image, int64 [N]."""
    network.eval()
    return torch.cat([(network(part) + network(part.flip(-1))).argmax(1) for part in images.split(256)])


def share(right: Tensor) -> float:
    """Of a boolean tensor, how much is true."""
    return right.float().mean().item()


def measure(judge: nn.Module, task: Task, model: Path, folder: Path, arguments: argparse.Namespace) -> dict[str, float]:
    """Draw all classes, keep the first pictures of each, and judge."""
    path = folder / "score.json"
    if path.exists():
        return json.loads(path.read_text(encoding="utf-8"))
    folder.mkdir(parents=True, exist_ok=True)
    pairs = task.prompts(arguments.count, arguments.old_count)
    prompts, labels = [text for text, _ in pairs], torch.tensor([label for _, label in pairs])
    pipeline = open_pipeline(model)
    parts = []
    for start in tqdm(range(0, len(prompts), 48), f"{model.name}: drawing"):
        texts = prompts[start : start + 48]
        seeds = list(range(start, start + len(texts)))
        settings = {"num_inference_steps": 25, "guidance_scale": 3.0, "scheduler": "ddim", "output_type": "pt"}
        parts.append(pipeline(texts, seed=seeds, **settings).images)  # type: ignore[arg-type]
    images = torch.cat(parts) * 2 - 1  # [N, 3, H, W] in [-1, 1]
    found, new = judged(judge, images), task.classes.index(task.new)
    for label, name in enumerate(task.classes):
        for index, picture in enumerate(to_pil(images[labels == label][:PICTURES])):
            save_png(picture, folder / f"{name}-{index}.png")
    others = labels != new
    scores = {
        "new": share(found[~others] == new),
        "old": share(found[others] == labels[others]),
        "old taken for new": share(found[others] == new),
    }
    scores |= {name: share(found[labels == label] == label) for label, name in enumerate(task.classes)}
    path.write_text(json.dumps(scores, indent=2) + "\n", encoding="utf-8")
    return scores


def report(
    task: Task, accuracy: Mapping[str, float], results: Mapping[str, Mapping[str, float]], arguments: argparse.Namespace
) -> None:
    """The table, the figures, and a picture with a row for each method."""
    out: Path = arguments.out
    rows = ["method | drawn as new | old classes right | old taken for new", "---|---:|---:|---:"]
    rows += [f"{name} | {s['new']:.1%} | {s['old']:.1%} | {s['old taken for new']:.1%}" for name, s in results.items()]
    table = "".join(f"| {row} |\n" for row in rows)
    print(json.dumps(accuracy, indent=2), table, sep="\n")
    settings = {name: str(value) for name, value in vars(arguments).items()}
    figures = {"settings": settings, "classifier": accuracy, "results": results}
    (out / "tenth_class.json").write_text(json.dumps(figures, indent=2) + "\n", encoding="utf-8")
    (out / "tenth_class.md").write_text(table, encoding="utf-8")
    shown = [(task.new, index) for index in range(min(PICTURES, arguments.count))]
    shown += [(name, 0) for name in task.classes if name != task.new][:PICTURES]
    pictures, words = [], []
    for method in results:
        folder = out / "before" if method == "before" else out / method / "score"
        pictures += [Image.open(folder / f"{name}-{index}.png").copy() for name, index in shown]
        words += [f"{method}: {task.captions[name].removeprefix('a photo of ')}" for name, _ in shown]
    picture = grid(pictures, captions=words, columns=len(shown))
    save_png(picture.quantize(128), out / "tenth_class.png")  # a third of the size


if __name__ == "__main__":
    main()
