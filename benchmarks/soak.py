"""Both stages killed again and again: do they end with the weights of runs that nobody disturbed?

    python benchmarks/soak.py --minutes 60 --every 180 --out runs/soak

Each stage trains tiny scenes for `--minutes`, killed by SIGKILL at seeded random moments, on average every `--every`
seconds, and started again by the same command; then it is stopped by SIGTERM at whatever step it has come to, K. After
that a second run of each stage goes straight to step K. The two must agree in every tensor of the last checkpoint
(weights, averages, optimisers), in every file of the saved model, and in the loss log. Both stages run at once, on one
core each, so this takes up to twice `--minutes`. Writes OUT/soak.json; the exit code is 1 if anything differs.
"""

from __future__ import annotations

import argparse
import hashlib
import importlib
import json
import math
import os
import random
import signal
import sys
import time
import traceback
from collections import Counter
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import yaml
from safetensors import safe_open

ROOT = Path(__file__).resolve().parents[1]
ENDLESS = 10_000_000
"""Steps: more than any soak comes to. With a constant learning rate their number changes nothing else."""
STOPPED = 75  # the exit code of a run that saved itself on SIGTERM
SCENES = {
    "source": "scenes",
    "resolution": 32,
    "scenes": {"count": 500, "objects": ["circle", "square", "triangle"], "colours": ["red", "blue", "green"]},
}
OPTIMISER = {"lr": 1.0e-3, "schedule": "constant", "warmup_steps": 20}
COMMON = {
    "data": SCENES,
    "optimiser": OPTIMISER,
    "ema_decay": 0.99,
    "training": {
        "steps": ENDLESS,
        "batch_size": 8,
        "accumulation": 2,
        "workers": 1,
        "checkpoint_every": 20,
        "validate_every": 200,
        "log_every": 5,
    },
}
VAE: dict[str, Any] = {
    **COMMON,
    "autoencoder": {"latent_channels": 4, "channels": [8, 16], "layers_per_block": 1, "norm_groups": 4},
    "loss": {"equivariance": 0.5, "learned_logvar": True, "perceptual": "features"},
    "discriminator": {"layers": 1, "channels": 8, "start_step": 100},
    "discriminator_optimiser": OPTIMISER,
    "validation_images": 8,
    "report_images": 16,
    "statistics_images": 64,
}
LDM: dict[str, Any] = {
    **COMMON,
    "conditions": {
        "text": {"encoder": "trained", "length": 16, "width": 16, "layers": 1, "heads": 2},
        "semantic": {"channels": 3},
        "inpainting": {"masks": "large"},
    },
    "unet": {"channels": [16, 32], "layers_per_block": 1, "attention": [False, True], "heads": 2, "norm_groups": 8},
    "preview": {"count": 2, "num_inference_steps": 2, "loss_images": 8},
}


@dataclass
class Kill:
    """Where one struck."""

    minute: float  # since the soak began
    seconds_alive: float
    step: int  # the last one in the loss log
    checkpoint: int  # the newest on the disk
    doing: str


@dataclass
class Outcome:
    """What became of one stage."""

    steps: int = 0
    kills: list[Kill] = field(default_factory=list)
    minutes_disturbed: float = 0.0
    minutes_undisturbed: float = 0.0
    tensors: int = 0
    files: int = 0
    rows: int = 0
    different: list[str] = field(default_factory=list)


class Runs:
    """Starts the training script of one stage, each time in a fresh fork of this process.

    It has the libraries imported and has used none of them, so that a start takes a second and not half a minute.
    """

    def __init__(self, stage: str, config: dict[str, Any], folder: Path) -> None:
        self.stage, self.folder = stage, folder
        folder.mkdir(parents=True, exist_ok=True)
        self._config = folder / "config.yaml"
        self._config.write_text(yaml.safe_dump({**config, "out": "unused"}), encoding="utf-8")

    def start(self, out: Path, *overrides: str) -> int:
        """The process of the run in `out`; what it says goes to the file OUT.log beside it."""
        child = os.fork()
        if child:
            return child
        log = os.open(out.with_suffix(".log"), os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o644)
        for stream in (1, 2):
            os.dup2(log, stream)
        name = f"train_{self.stage}"
        sys.argv = [f"{name}.py", str(self._config), f"out={out}", *overrides]
        code: object = 1
        try:
            code = importlib.import_module(name).main()
        except SystemExit as stopped:
            code = stopped.code
        except Exception:  # noqa: BLE001 - the fork must end here whatever happened
            traceback.print_exc()
        finally:
            sys.stdout.flush()
            sys.stderr.flush()
            os._exit(code if isinstance(code, int) else 1)

    def finish(self, out: Path, steps: int) -> None:
        """Train to `steps` and save the model."""
        code = exit_code(self.start(out, f"training.steps={steps}"))
        if code:
            raise RuntimeError(f"{out}: exit code {code}\n{last_lines(out)}")


def exit_code(process: int, until: float = math.inf) -> int | None:
    """Wait for the process, at most until then on the monotonic clock; None if it still runs. -N: ended by signal N."""
    while True:
        found, status = os.waitpid(process, os.WNOHANG)
        if found:
            return os.waitstatus_to_exitcode(status)
        if time.monotonic() >= until:
            return None
        time.sleep(0.05)


def last_lines(out: Path) -> str:
    text = out.with_suffix(".log").read_text(encoding="utf-8", errors="replace")
    return "\n".join(text.splitlines()[-12:])


def last_step(out: Path) -> int:
    """Of the loss log, -1 before its first row; a line that is cut short counts as none."""
    path = out / "metrics.jsonl"
    lines = path.read_text(encoding="utf-8").splitlines() if path.exists() else []
    return max((json.loads(line)["step"] for line in lines[-3:] if line.endswith("}")), default=-1)


def newest_checkpoint(out: Path) -> int:
    """0 if there is none."""
    return max((int(path.name[5:]) for path in (out / "checkpoints").glob("step-*")), default=0)


def what_it_did(out: Path, step_at_start: int) -> str:
    """Told by what the killed process left behind."""
    if any((out / "checkpoints").glob(".step-*.part")):
        return "writing a checkpoint"
    if any((out / "checkpoints").glob(".removed-*")):
        return "removing an old checkpoint"
    if any(out.rglob(".*.part*")):
        return "writing another file"
    return "training" if last_step(out) > step_at_start else "starting"


def disturb(runs: Runs, out: Path, minutes: float, every: float, seed: int) -> tuple[list[Kill], float]:
    """Train and kill for `minutes`, then stop; returns the kills and the minutes that it took."""
    generator, kills, begun = random.Random(f"{seed}/{runs.stage}"), [], time.monotonic()
    end = begun + 60 * minutes
    while True:
        start, step = time.monotonic(), last_step(out)
        child = runs.start(out)
        until = start + every * generator.uniform(0.5, 1.5)
        code = exit_code(child, min(until, end))
        if code is not None:
            raise RuntimeError(f"{out}: it ended by itself with exit code {code}\n{last_lines(out)}")
        if until < end:
            os.kill(child, signal.SIGKILL)
            exit_code(child)
            now = time.monotonic()
            doing = what_it_did(out, step)
            kills.append(
                Kill(round((now - begun) / 60, 2), round(now - start, 2), last_step(out), newest_checkpoint(out), doing)
            )
            continue
        os.kill(child, signal.SIGTERM)
        code = exit_code(child)
        # -SIGTERM: it was still starting, and what it began from is on the disk.
        if code not in (STOPPED, -signal.SIGTERM):
            raise RuntimeError(f"{out}: SIGTERM gave exit code {code}\n{last_lines(out)}")
        return kills, (time.monotonic() - begun) / 60


def tensor_hashes(folder: Path) -> dict[str, str]:
    """sha256 of every tensor of a checkpoint."""
    hashes = {}
    for path in sorted(folder.glob("*.safetensors")):
        with safe_open(path, "np") as file:
            for name in file.keys():  # noqa: SIM118 - it is no dict
                hashes[f"{path.stem}/{name}"] = hashlib.sha256(file.get_tensor(name).tobytes()).hexdigest()
    return hashes


def file_hashes(folder: Path) -> dict[str, str]:
    """sha256 of every file of a saved model."""
    paths = sorted(path for path in folder.rglob("*") if path.is_file())
    return {str(path.relative_to(folder)): hashlib.sha256(path.read_bytes()).hexdigest() for path in paths}


def loss_rows(out: Path, steps: int) -> dict[str, str]:
    """The loss log without timings, but for the last step: a run logs the one that it was told to end with."""
    lines = (out / "metrics.jsonl").read_text(encoding="utf-8").splitlines()
    rows = [json.loads(line) for line in lines]
    return {
        f"{row['step']}/{number}": json.dumps({key: value for key, value in row.items() if key != "timing"})
        for number, row in enumerate(rows)
        if row["step"] < steps - 1
    }


def soak(stage: str, config: dict[str, Any], folder: Path, minutes: float, every: float, seed: int) -> Outcome:
    """One stage: disturbed, undisturbed, compared."""
    runs, outcome = Runs(stage, config, folder / stage), Outcome()
    disturbed, straight = runs.folder / "disturbed", runs.folder / "undisturbed"
    outcome.kills, outcome.minutes_disturbed = disturb(runs, disturbed, minutes, every, seed)
    outcome.steps = newest_checkpoint(disturbed)
    if outcome.steps == 0:
        raise RuntimeError(
            f"{disturbed}: it never came to its first checkpoint; raise --every\n{last_lines(disturbed)}"
        )
    runs.finish(disturbed, outcome.steps)
    begun = time.monotonic()
    runs.finish(straight, outcome.steps)
    outcome.minutes_undisturbed = (time.monotonic() - begun) / 60
    compare(outcome, disturbed, straight, "autoencoder" if stage == "vae" else "pipeline")
    return outcome


def compare(outcome: Outcome, one: Path, other: Path, model: str) -> None:
    """Fill in how much was compared and what differs."""
    last = f"checkpoints/step-{outcome.steps}"
    tensors = [tensor_hashes(out / last) for out in (one, other)]
    files = [file_hashes(out / model) for out in (one, other)]
    rows = [loss_rows(out, outcome.steps) for out in (one, other)]
    outcome.tensors, outcome.files, outcome.rows = (len(pair[1]) for pair in (tensors, files, rows))
    for first, second in (tensors, files, rows):
        outcome.different += sorted(name for name in {*first, *second} if first.get(name) != second.get(name))


def main() -> int:
    """Soak both stages; returns the exit code."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--minutes", type=float, default=60, help="how long each stage is disturbed")
    parser.add_argument("--every", type=float, default=180, help="seconds between kills, on average")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--out", type=Path, default=Path("runs/soak"), help="a new folder")
    arguments = parser.parse_args()
    out = arguments.out.absolute()
    if out.exists() and any(out.iterdir()):
        parser.error(f"--out {arguments.out}: found something there already; allowed is a new folder; give another")
    preload()
    base = Runs("vae", VAE, out / "base")
    base.finish(base.folder / "run", steps=50)
    configs = {"vae": VAE, "ldm": {**LDM, "autoencoder": str(base.folder / "run" / "autoencoder")}}
    begun, jobs = time.monotonic(), {}
    for stage, config in configs.items():
        jobs[stage] = os.fork()
        if jobs[stage] == 0:
            own_share_of_the_processor()
            outcome = soak(stage, config, out, arguments.minutes, arguments.every, arguments.seed)
            (out / f"{stage}.json").write_text(json.dumps(asdict(outcome), indent=2) + "\n", encoding="utf-8")
            os._exit(0)
    codes = [exit_code(job) for job in jobs.values()]  # of all, so that none is left running
    if any(codes):
        return 1
    outcomes = {stage: json.loads((out / f"{stage}.json").read_text(encoding="utf-8")) for stage in jobs}
    figures = {
        "settings": {"minutes": arguments.minutes, "every": arguments.every, "seed": arguments.seed},
        "minutes": round((time.monotonic() - begun) / 60, 1),
        "stages": outcomes,
    }
    (out / "soak.json").write_text(json.dumps(figures, indent=2) + "\n", encoding="utf-8")
    for stage, told in outcomes.items():
        doing = ", ".join(f"{count} {name}" for name, count in Counter(kill["doing"] for kill in told["kills"]).items())
        print(
            f"{stage}: {len(told['kills'])} kills ({doing}) in {told['minutes_disturbed']:.1f} minutes, "
            f"{told['steps']} steps; of {told['tensors']} tensors, {told['files']} files and {told['rows']} rows of "
            f"the loss log {len(told['different'])} differ from those of the undisturbed run"
        )
    return int(any(told["different"] for told in outcomes.values()))


def preload() -> None:
    """Import what the training scripts do, once for all runs."""
    os.environ.update(HF_HUB_OFFLINE="1", OMP_NUM_THREADS="1", CUDA_VISIBLE_DEVICES="", ACCELERATE_USE_CPU="1")
    sys.path.insert(0, str(ROOT))
    names = ("train_vae", "train_ldm", "torch.utils.tensorboard", "ldm.config", "ldm.training.stage1_result")
    for name in (*names, "ldm.training.stage2_result", "ldm.training.watch_pictures"):
        importlib.import_module(name)


def own_share_of_the_processor() -> None:
    """Where Linux shares it out by session (sched(7), autogroup), the stages get one each, as important as before."""
    group = Path("/proc/self/autogroup")
    nice = group.read_text(encoding="utf-8").split()[-1] if group.exists() else "0"
    os.setsid()
    if group.exists():
        group.write_text(nice, encoding="utf-8")


if __name__ == "__main__":
    sys.exit(main())
