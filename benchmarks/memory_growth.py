"""Does memory grow, or do files stay open, over a long run? (Linux: it reads /proc.)

    python benchmarks/memory_growth.py                      # 10,000 steps of the tiniest stage 2, some minutes

Runs the real `train_ldm.py` on a folder of 64 small PNG files, without a latent cache, so that its two workers open and
decode `2 * steps` images; checkpoints, previews and the log are written as usual. Meanwhile this process notes, from
outside, memory (anonymous, shared and swapped out) and open files of the training process and of its workers.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import yaml
from PIL import Image

ROOT = Path(__file__).parents[1]
BATCH = 2


@dataclass(frozen=True)
class Measured:
    """What the processes held after `step` updates."""

    step: int
    memory: int
    """Of the training process, in KiB: what is its own, in memory or swapped out. Pages of files come and go."""
    open_files: int
    worker_memory: int
    """Of its largest worker, in KiB; pages that it shares with the training process count too."""
    worker_open_files: int


def measure(folder: Path, steps: int, looks: Sequence[int]) -> Iterator[Measured]:
    """Train for `steps` in `folder`, which is empty, and look after each of the steps `looks`, in order."""
    config = _prepare(folder, steps, log_every=max(1, min(looks) // 10))
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1", "ACCELERATE_USE_CPU": "1"}
    command = [sys.executable, str(ROOT / "train_ldm.py"), str(config)]
    with (folder / "stderr.txt").open("w", encoding="utf-8") as stderr:
        process = subprocess.Popen(command, cwd=folder, env=environment, stderr=stderr)
        try:
            for step in looks:
                yield _at(process, folder / "run" / "metrics.jsonl", step)
        finally:
            process.terminate()  # it saves itself
            process.wait()


def _prepare(folder: Path, steps: int, log_every: int) -> Path:
    from autoencoder.model import AutoencoderConfig, build_autoencoder

    images = folder / "images"
    images.mkdir()
    random = np.random.default_rng(0)
    for index in range(64):
        pixels = random.integers(0, 256, (24, 20, 3), dtype=np.uint8)
        Image.fromarray(pixels).save(images / f"{index:02d}.png")
        (images / f"{index:02d}.txt").write_text(f"noise number {index}\n", encoding="utf-8")
    shape = AutoencoderConfig(channels=(4, 4), latent_channels=2, layers_per_block=1, norm_groups=2)
    build_autoencoder(shape).save_pretrained(folder / "autoencoder")
    values = {
        "out": "run",
        "autoencoder": "autoencoder",
        "data": {"source": "folder", "root": "images", "resolution": 16, "flip": True, "crop": "random"},
        "cache": {"enabled": False},
        "conditions": {"text": {"encoder": "trained", "length": 8, "width": 8, "layers": 1, "heads": 1}},
        "unet": {"channels": [4, 4], "layers_per_block": 1, "attention": [False, False], "heads": 1, "norm_groups": 4},
        "preview": {"count": 2, "num_inference_steps": 2, "loss_images": 4},
        "runtime": {"precision": "fp32"},
        # Never done within the measurement: the end of a run takes memory of its own.
        "training": {
            "steps": 2 * steps,
            "batch_size": BATCH,
            "workers": 2,
            "log_every": log_every,
            "checkpoint_every": max(1, steps // 20),
            "validate_every": max(1, steps // 20),
        },
    }
    path = folder / "config.yaml"
    path.write_text(yaml.safe_dump(values), encoding="utf-8")
    return path


def _at(process: subprocess.Popen[bytes], log: Path, step: int) -> Measured:
    """Wait until the log has reached the step, then look."""
    while not log.exists() or _last_step(log) + 1 < step:
        if process.poll() is not None:
            raise SystemExit(f"memory_growth: the training ended with code {process.returncode}: {log.parent.parent}")
        time.sleep(0.2)
    children = Path(f"/proc/{process.pid}/task/{process.pid}/children").read_text(encoding="utf-8").split()
    workers = [int(child) for child in children]
    return Measured(
        _last_step(log) + 1,
        _memory(process.pid),
        _open_files(process.pid),
        max(_memory(worker) for worker in workers),
        max(_open_files(worker) for worker in workers),
    )


def _last_step(log: Path) -> int:
    with log.open("rb") as file:
        file.seek(max(0, log.stat().st_size - 4096))
        lines = [line for line in file.read().split(b"\n")[:-1] if line.endswith(b"}") and line.startswith(b"{")]
    return json.loads(lines[-1])["step"] if lines else -1


def _memory(pid: int) -> int:
    status = Path(f"/proc/{pid}/status").read_text(encoding="utf-8")
    return sum(int(status.split(f"{name}:")[1].split()[0]) for name in ("RssAnon", "RssShmem", "VmSwap"))


def _open_files(pid: int) -> int:
    return len(list(Path(f"/proc/{pid}/fd").iterdir()))


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--steps", type=int, default=10_000)
    arguments = parser.parse_args()
    looks = [max(1, arguments.steps * share // 20) for share in (1, 2, 5, 10, 15, 20)]
    with tempfile.TemporaryDirectory() as folder:
        began = time.monotonic()
        print(f"{'step':>6} {'images read':>12} {'MiB':>8} {'files':>6} {'worker MiB':>15} {'files':>6}")
        for row in measure(Path(folder), arguments.steps, looks):
            sizes = f"{row.memory / 1024:8.1f} {row.open_files:6}"
            of_worker = f"{row.worker_memory / 1024:15.1f} {row.worker_open_files:6}"
            print(f"{row.step:6} {row.step * BATCH:12} {sizes} {of_worker}", flush=True)
        print(f"{time.monotonic() - began:.0f} s")


if __name__ == "__main__":
    main()
