"""Stable Diffusion 1.5 at full width, with random weights: does it load, train a LoRA and draw, and in how much memory?

    python benchmarks/sd15.py                   # 512 px, one step of a LoRA, four steps of drawing: minutes on a CPU
    python benchmarks/sd15.py --tiny            # the same commands on a model of a few megabytes

Makes the model with diffusers' and transformers' own classes, as a folder in diffusers' layout, then runs the real
commands as processes of their own and takes their peak memory from the system. The folder is left for another run.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import sys
import time
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parents[1]
SIZES: dict[str, dict[str, Any]] = {
    "full": {
        "unet": {"block_out_channels": (320, 640, 1280, 1280), "cross_attention_dim": 768, "attention_head_dim": 8},
        "vae": {"block_out_channels": (128, 256, 512, 512), "layers_per_block": 2},
        "text": {"hidden_size": 768, "intermediate_size": 3072, "num_hidden_layers": 12, "num_attention_heads": 12},
    },
    "tiny": {
        "unet": {"block_out_channels": (32, 32, 64, 64), "cross_attention_dim": 64, "attention_head_dim": 2},
        "vae": {"block_out_channels": (32, 32, 32, 32), "layers_per_block": 1},
        "text": {"hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 2, "num_attention_heads": 2},
    },
}


@dataclass(frozen=True)
class Measured:
    """Of one command.

    Attributes:
        seconds, cpu_seconds: by the clock, and of all its threads: the second does not depend on what else runs.
        peak_gib: resident memory at most, pages of mapped files among them, which the system drops when it needs room.
        peak_anonymous_gib: without those; 0 where there is no /proc.
    """

    seconds: float
    cpu_seconds: float
    peak_gib: float
    peak_anonymous_gib: float


def main() -> None:
    """Make, run, measure, print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--tiny", action="store_true", help="a model of a few megabytes")
    parser.add_argument("--folder", type=Path, default=Path("/tmp/ldm-sd15"), help="where everything goes")
    parser.add_argument("--resolution", type=int, default=512)
    parser.add_argument("--steps", type=int, default=4, help="of drawing")
    parser.add_argument("--single-file", action="store_true", help="export it as one file, too, and draw from that")
    parser.add_argument("--options", nargs="*", default=[], help="further overrides of the training config")
    args = parser.parse_args()
    size = "tiny" if args.tiny else "full"
    model, runs = args.folder / f"model-{size}", args.folder / f"runs-{size}"
    if not (model / "model_index.json").is_file():
        make_model(model, SIZES[size])
    shutil.rmtree(runs, ignore_errors=True)  # a run that is there would go on, and has nothing left to do
    results = {"train": train(model, runs / "lora", args.resolution, args.options)}
    lora = runs / "lora" / "lora.safetensors"
    results["generate"] = generate(model, lora, runs / "out", args.steps, args.resolution)
    if args.single_file:
        file = runs / "model.safetensors"
        results["export"] = run("-m", "ldm.cli.main", "export", model, "--to", "single-file", "--out", file)
        results["generate from one file"] = generate(file, lora, runs / "out-file", args.steps, args.resolution)
    print(json.dumps({name: asdict(result) for name, result in results.items()}, indent=2))


def make_model(folder: Path, sizes: dict[str, Any]) -> None:
    """A folder that is Stable Diffusion 1.5's but for its random weights (and, tiny, its widths)."""
    import torch
    from diffusers import AutoencoderKL, PNDMScheduler, StableDiffusionPipeline, UNet2DConditionModel
    from transformers import CLIPTextConfig, CLIPTextModel

    from conditioning.clip_tokenizer import clip_vocabulary_tokenizer

    torch.manual_seed(0)
    levels = len(sizes["vae"]["block_out_channels"])
    StableDiffusionPipeline(
        vae=AutoencoderKL(
            down_block_types=("DownEncoderBlock2D",) * levels,
            up_block_types=("UpDecoderBlock2D",) * levels,
            latent_channels=4,
            sample_size=512,
            scaling_factor=0.18215,
            **sizes["vae"],
        ),
        text_encoder=CLIPTextModel(CLIPTextConfig(vocab_size=49408, projection_dim=768, **sizes["text"])),
        tokenizer=clip_vocabulary_tokenizer(77),
        unet=UNet2DConditionModel(sample_size=64, layers_per_block=2, **sizes["unet"]),
        scheduler=PNDMScheduler(
            beta_schedule="scaled_linear", beta_start=0.00085, beta_end=0.012, skip_prk_steps=True, steps_offset=1
        ),
        safety_checker=None,
        feature_extractor=None,
        requires_safety_checker=False,
    ).save_pretrained(folder)


def train(model: Path, out: Path, resolution: int, options: list[str]) -> Measured:
    """One step of configs/finetune/lora.yaml on a built-in scene, with one preview of one picture."""
    overrides = [
        f"model={model}",
        f"out={out}",
        f"data={{source: scenes, resolution: {resolution}, scenes: {{count: 4}}}}",
        "cache.batch_size=1",
        "preview={count: 1, num_inference_steps: 1, guidance_scale: 1, loss_images: 1}",
        "training={steps: 1, batch_size: 1, workers: 0, log_every: 1}",
        *options,
    ]
    return run("train_ldm.py", "configs/finetune/lora.yaml", *overrides)


def generate(model: Path, lora: Path, out: Path, steps: int, resolution: int) -> Measured:
    """One picture with the LoRA, under guidance."""
    drawing = ["--steps", str(steps), "--guidance", "7", "--size", str(resolution), "--seed", "0", "--verbose"]
    prompt = ["--prompt", "a red circle on a white background"]
    return run("-m", "ldm.cli.main", "generate", "--model", model, "--lora", lora, *prompt, *drawing, "--out", out)


def run(*words: object) -> Measured:
    """Run a command of ours to its end; ends this program when it fails."""
    start = time.perf_counter()
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "HF_HUB_OFFLINE": "1"}
    os.chdir(ROOT)
    child = os.posix_spawn(sys.executable, [sys.executable, *map(str, words)], environment)
    ended = anonymous = 0
    while not ended:
        anonymous = max(anonymous, _anonymous(child))
        time.sleep(0.2)
        ended, status, usage = os.wait4(child, os.WNOHANG)
    if status:
        raise SystemExit(f"{' '.join(map(str, words[:3]))} ... failed ({os.waitstatus_to_exitcode(status)})")
    peak = usage.ru_maxrss * (1 if sys.platform == "darwin" else 1024)  # bytes on macOS, kilobytes elsewhere
    seconds, cpu = time.perf_counter() - start, usage.ru_utime + usage.ru_stime
    return Measured(round(seconds, 1), round(cpu, 1), round(peak / 2**30, 2), round(anonymous / 2**30, 2))


def _anonymous(process: int) -> int:
    """Bytes that a process has now beside mapped files."""
    try:
        lines = Path(f"/proc/{process}/status").read_text(encoding="utf-8").splitlines()
    except OSError:
        return 0
    return next((1024 * int(line.split()[1]) for line in lines if line.startswith("RssAnon")), 0)


if __name__ == "__main__":
    main()
