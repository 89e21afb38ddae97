"""The real entry points as subprocesses, on data and networks small enough for seconds."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import yaml
from safetensors.torch import load_file

ROOT = Path(__file__).parents[2]

SCENES = {
    "source": "scenes",
    "resolution": 16,
    "scenes": {
        "count": 24,
        "objects": ["circle", "square"],
        "colours": ["red", "blue", "green"],
        "backgrounds": ["white", "black"],
        "sizes": ["large"],
    },
}
TRAINING = {
    "steps": 8,
    "batch_size": 4,
    "workers": 0,
    "checkpoint_every": 3,
    "validate_every": 100,
    "log_every": 1,
}
VAE = {
    "data": SCENES,
    "autoencoder": {
        "latent_channels": 2,
        "channels": [8, 8],
        "layers_per_block": 1,
        "mid_attention": False,
        "norm_groups": 4,
    },
    "loss": {"equivariance": 0.5, "equivariance_minimum": 0.5, "learned_logvar": True, "perceptual": "features"},
    "discriminator": {"layers": 1, "channels": 4, "start_step": 2},
    "optimiser": {"lr": 1.0e-3, "schedule": "cosine", "warmup_steps": 2},
    "ema_decay": 0.9,
    "validation_images": 4,
    "report_images": 8,
    "statistics_images": 16,
    "training": TRAINING,
}
LDM = {
    "data": SCENES,
    "conditions": {"text": {"encoder": "trained", "length": 12, "width": 8, "layers": 1, "heads": 2}},
    "unet": {"channels": [8, 8], "layers_per_block": 1, "attention": [False, True], "heads": 2, "norm_groups": 4},
    "optimiser": {"lr": 1.0e-3, "schedule": "cosine", "warmup_steps": 2},
    "ema_decay": 0.9,
    "preview": {"count": 2, "num_inference_steps": 2, "loss_images": 4},
    "training": TRAINING,
}


class Commands:
    """Runs our commands in a folder of their own, one thread each, with no network to fall back on."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder

    @property
    def environment(self) -> dict[str, str]:
        offline = {"HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""}
        return {**os.environ, "PYTHONPATH": str(ROOT), **offline}

    def write_config(self, name: str, values: dict) -> Path:
        path = self.folder / name
        path.write_text(yaml.safe_dump(values), encoding="utf-8")
        return path

    def start(self, *words: object, **options: object) -> subprocess.Popen:
        return subprocess.Popen(
            [str(word) for word in words],
            cwd=self.folder,
            env=self.environment,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
            **options,
        )

    def run(self, *words: object, expect: int = 0) -> subprocess.CompletedProcess:
        process = self.start(*words)
        out, err = process.communicate(timeout=900)
        assert process.returncode == expect, f"{words}: exit code {process.returncode}, expected {expect}\n{out}\n{err}"
        return subprocess.CompletedProcess(words, process.returncode, out, err)

    def train(self, stage: str, config: Path, *overrides: str, expect: int = 0) -> subprocess.CompletedProcess:
        return self.run(sys.executable, ROOT / f"train_{stage}.py", config, *overrides, expect=expect)

    def train_with_processes(self, count: int, stage: str, config: Path, *overrides: str) -> None:
        """Several gloo processes. `accelerate launch` starts only one on a CPU (more need MPI), so torchrun does it."""
        launcher = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", count]
        self.run(*launcher, ROOT / f"train_{stage}.py", config, *overrides)

    def train_and_interrupt(self, stage: str, config: Path, *overrides: str, until: Path, how: signal.Signals) -> int:
        """Start training, send the signal as soon as `until` exists; returns the exit code."""
        process = self.start(sys.executable, ROOT / f"train_{stage}.py", config, *overrides)
        deadline = time.monotonic() + 240
        while not until.exists() and process.poll() is None and time.monotonic() < deadline:
            time.sleep(0.01)
        assert until.exists(), process.communicate()
        process.send_signal(how)
        process.communicate(timeout=120)
        return process.returncode

    def ldm(self, *words: object, expect: int = 0) -> subprocess.CompletedProcess:
        return self.run(sys.executable, "-m", "ldm.cli.main", *words, expect=expect)


def losses(run: Path) -> list[dict]:
    """The loss log without timings, which no two runs share."""
    rows = [json.loads(line) for line in (run / "metrics.jsonl").read_text(encoding="utf-8").splitlines()]
    return [{key: value for key, value in row.items() if key != "timing"} for row in rows]


def checkpoint_tensors(run: Path, step: int) -> dict:
    """Every tensor of a checkpoint: weights, averages, optimiser states."""
    folder = run / "checkpoints" / f"step-{step}"
    files = sorted(folder.glob("*.safetensors"))
    return {(file.stem, name): tensor for file in files for name, tensor in load_file(file).items()}
