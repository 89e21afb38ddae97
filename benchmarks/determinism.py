"""How far bits move when nothing but the machine's settings changes: threads, batch size, memory layout, compilation.

    python benchmarks/determinism.py --model runs/demo/ldm/pipeline --out runs/determinism.json

Pictures from the same prompts and seeds, and the weights after a few updates of both stages (the tiny ones of
benchmarks/soak.py), each against the plain run: one thread, four pictures at once, channels last, not compiled. In
float32. Twice the same must give the same bits.
"""

from __future__ import annotations

import argparse
import json
import tempfile
from collections.abc import Callable
from pathlib import Path

import torch
import yaml
from safetensors.torch import load_file
from soak import LDM, ROOT, VAE, preload  # this folder is the first that a script looks in

UPDATES = 5
PROMPTS = ("a red circle on a white background", "a blue square on a black background")


def draw(
    model: Path, steps: int, *, threads: int = 1, batch: int = 4, contiguous: bool = False, compiled: bool = False
):
    """Pictures [4, 3, H, W] in [0, 1]."""
    from ldm.interchange.opening import open_pipeline

    torch.set_num_threads(threads)
    pipeline = open_pipeline(model, dtype="fp32", device="cpu")
    if contiguous:
        pipeline.unet.to(memory_format=torch.contiguous_format)
        pipeline.vae.to(memory_format=torch.contiguous_format)
    if compiled:
        pipeline.unet.compile()
    places = [list(range(start, min(start + batch, 4))) for start in range(0, 4, batch)]
    settings = {"num_inference_steps": steps, "guidance_scale": 4.0, "scheduler": "ddim", "output_type": "pt"}
    parts = [pipeline([PROMPTS[i % 2] for i in part], seed=part, **settings).images for part in places]
    return torch.cat([torch.as_tensor(part) for part in parts])


def train(stage: str, config: dict, folder: Path, *, threads: int = 1, **changes: object) -> dict[str, torch.Tensor]:
    """The weights of a run's last checkpoint."""
    import train_ldm
    import train_vae

    torch.set_num_threads(threads)
    out = Path(tempfile.mkdtemp(dir=folder)) / "run"
    training = {
        **config["training"],
        "steps": UPDATES,
        "workers": 0,
        "validate_every": 1000,
        **changes.pop("training", {}),
    }
    runtime = {"trackers": [], "precision": "fp32", **changes}
    path = folder / "config.yaml"
    path.write_text(yaml.safe_dump({**config, "training": training, "runtime": runtime, "out": str(out)}))
    {"vae": train_vae.train_autoencoder, "ldm": train_ldm.train_diffusion}[stage](path, [])
    return load_file(
        out / "checkpoints" / f"step-{UPDATES}" / ("autoencoder.safetensors" if stage == "vae" else "unet.safetensors")
    )


def pictures_apart(found: torch.Tensor, plain: torch.Tensor) -> dict[str, float]:
    levels = ((found * 255).round() - (plain * 255).round()).abs()
    return {
        "most_of_1": (found - plain).abs().max().item(),
        "pixels_that_change": (levels > 0).float().mean().item(),
        "most_levels_of_255": levels.max().item(),
    }


def weights_apart(found: dict[str, torch.Tensor], plain: dict[str, torch.Tensor]) -> dict[str, float]:
    """How far all weights are apart, relative to their norm, and the share that is not the same."""
    far = sum((found[name] - plain[name]).double().square().sum() for name in plain) ** 0.5
    size = sum(plain[name].double().square().sum() for name in plain) ** 0.5
    return {
        "relative_distance": float(far / size),
        "weights_that_change": sum((found[name] != plain[name]).sum().item() for name in plain)
        / sum(weight.numel() for weight in plain.values()),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", type=Path, required=True)
    parser.add_argument("--steps", type=int, default=25)
    parser.add_argument("--compile", action="store_true", help="torch.compile too, which takes minutes")
    parser.add_argument("--out", type=Path, required=True, help="a JSON file")
    arguments = parser.parse_args()
    preload()
    model, steps = arguments.model.absolute(), arguments.steps
    plain = draw(model, steps)
    cases: dict[str, Callable[[], torch.Tensor]] = {
        "the same again": lambda: draw(model, steps),
        "2 threads": lambda: draw(model, steps, threads=2),
        "1 picture at once": lambda: draw(model, steps, batch=1),
        "channels first": lambda: draw(model, steps, contiguous=True),
    }
    if arguments.compile:
        cases["compiled"] = lambda: draw(model, steps, compiled=True)
    figures: dict[str, dict[str, float]] = {}

    def note(name: str, numbers: dict[str, float]) -> None:
        figures[name] = numbers
        print(f"{name}: {', '.join(f'{key} {value:.3g}' for key, value in numbers.items())}", flush=True)

    for name, case in cases.items():
        note(f"pictures, {name}", pictures_apart(case(), plain))
    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(temporary)
        autoencoder = ROOT / "runs/demo/vae/autoencoder"
        for stage, config in (("vae", VAE), ("ldm", {**LDM, "autoencoder": str(autoencoder)})):
            before = train(stage, config, folder)
            for told, changes in {
                "the same again": {},
                "2 threads": {"threads": 2},
                "channels first": {"channels_last": False},
                "no accumulation": {"training": {"accumulation": 1}},
            }.items():
                note(f"{stage} trained, {told}", weights_apart(train(stage, config, folder, **changes), before))
    arguments.out.write_text(json.dumps(figures, indent=2) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
