"""What a config will need before it is trained: memory, images/s, time and disk, and what to change if it does not fit.

A few of its steps are run on made-up data; with --dry it is only counted, on tensors without data. Nothing is written.
"""

from __future__ import annotations

import argparse
import json
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ldm.errors import UserError, user_input

if TYPE_CHECKING:
    from autoencoder.model import AutoencoderConfig
    from ldm.training.plan import Plan, RunConfig
    from ldm.training.plan_advice import Change

GIB = 2**30
STAGE_1_KEYS = {"discriminator", "discriminator_optimiser", "loss", "report_images", "statistics_images", "train"}
"""What only `train_vae.py` reads; where `autoencoder` is a section and not a path, it is its config too."""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Options of `ldm plan`."""
    parser.add_argument("config", type=Path, metavar="CONFIG", help="as for train_vae.py or train_ldm.py")
    parser.add_argument("overrides", nargs="*", metavar="key.sub=value", help="right behind CONFIG, as in training")
    parser.add_argument("--dry", action="store_true", help="only count; measure nothing but the machine's speed")
    parser.add_argument(
        "--devices", type=int, metavar="N", help="plan for so many (default: all GPUs here, or one CPU)"
    )
    parser.add_argument(
        "--memory", type=float, metavar="GIB", help="plan for devices of this size (default: those here)"
    )
    parser.add_argument("--device", choices=("auto", "cpu", "cuda"), default="auto", help="plan for (default: auto)")
    parser.add_argument(
        "--tflops", type=float, metavar="X", help="10^12 operations a second that a device reaches (default: measured)"
    )
    parser.add_argument("--json", action="store_true", help="for programs")


def run(args: argparse.Namespace) -> None:
    """Count, perhaps measure, and print."""
    for name in ("devices", "memory", "tflops"):
        found = getattr(args, name)
        if found is not None and found <= 0:
            raise UserError(f"--{name}: found {found}; allowed is a number above 0")
    config = load_either(args.config, args.overrides)
    autoencoder = autoencoder_to_be_made(config, args.config)

    from ldm.training.plan import machine_for, make_plan
    from ldm.training.plan_advice import advise

    machine = machine_for(config.runtime.precision, args.device, args.devices, args.memory)
    flops = None if args.tflops is None else args.tflops * 1e12
    plan = make_plan(config, machine, autoencoder=autoencoder, flops=flops, dry=args.dry, say=_say)
    changes = [] if plan.fits else advise(plan, autoencoder)
    if args.json:
        print(json.dumps(as_values(plan, changes), indent=2))
    else:
        print("\n".join(as_lines(plan, changes, args.config)))


def load_either(path: Path, overrides: list[str]) -> RunConfig:
    """The config of the stage whose keys the file has. Raises UserError."""
    import yaml

    from ldm.config import load
    from ldm.training.stage1 import Stage1Config
    from ldm.training.stage2_config import Stage2Config

    with user_input(f"config {path}", ValueError, OSError, yaml.YAMLError):
        values = yaml.safe_load(path.read_text(encoding="utf-8"))
    values = values if isinstance(values, dict) else {}
    first = isinstance(values.get("autoencoder"), dict) or bool(STAGE_1_KEYS & values.keys())
    return load(Stage1Config, path, overrides) if first else load(Stage2Config, path, overrides)


def autoencoder_to_be_made(config: RunConfig, path: Path) -> AutoencoderConfig | None:
    """Of a stage 2 config whose autoencoder is not there yet: that of the stage 1 config beside it which makes it."""
    from ldm.config import load
    from ldm.training.stage1 import Stage1Config

    wanted = config.autoencoder
    if not isinstance(wanted, str) or Path(wanted).exists():
        return None
    for other in sorted(path.parent.glob("*.y*ml")):
        try:
            found = load(Stage1Config, other)
        except UserError:  # of the other stage, or not finished
            continue
        if Path(found.out) / "autoencoder" == Path(wanted):
            return found.autoencoder
    return None


def as_lines(plan: Plan, changes: list[Change], path: Path) -> list[str]:
    """For people."""
    from ldm.training.plan import USABLE

    config, machine, counted = plan.config, plan.machine, plan.count
    low = "fp32" if machine.low is None else str(machine.low).removeprefix("torch.")
    devices = f"{machine.devices} x {machine.kind}, {machine.memory / GIB:.1f} GiB each, {low}"
    lines = [
        f"{path}: {devices}",
        *(f"assumed: {line}" for line in plan.assumed),
        "",
        "parameters           all   trained",
    ]
    for name, (everything, trained) in counted.parameters.items():
        lines.append(f"  {name:<17}{_count(everything):>8}  {_count(trained):>8}")
    lines += ["", "memory of a device, GiB"]
    rows = {
        "process": machine.overhead,
        "weights": counted.weights,
        "gradients": counted.gradients,
        f"optimiser ({config.optimiser.kind})": counted.optimiser,
        "average (EMA)": counted.average,
        f"activations of {_images(plan.micro_batch)}": counted.activations,
    }
    lines += [f"  {name:<28}{size / GIB:8.2f}" for name, size in rows.items()]
    lines.append(f"  {'peak of a step':<28}{(machine.overhead + counted.step) / GIB:8.2f}   counted")
    if plan.measured is not None:
        lines.append(f"  {'':<28}{(machine.overhead + plan.measured.peak) / GIB:8.2f}   measured")
    for name, phase in counted.phases.items():
        peak = machine.overhead + phase.peak
        lines.append(f"  {'peak of ' + name:<28}{peak / GIB:8.2f}   {_images(phase.at_once)} at once")
    verdict = "fits" if plan.fits else "DOES NOT FIT"
    lines.append(f"  {'needed':<28}{plan.peak / GIB:8.2f}   {verdict} into {USABLE:.0%} of {machine.memory / GIB:.1f}")
    return [*lines, "", *_time_lines(plan), "", *_disk_lines(plan), *_advice_lines(plan, changes)]


def _time_lines(plan: Plan) -> list[str]:
    training = plan.config.training
    if plan.step_seconds is None or plan.images_per_second is None:
        return ["time: nothing is known of that machine's speed; --tflops X says what a device reaches"]
    how = "measured" if plan.measured is not None else f"at best, at {(plan.flops or 0) / 1e12:.3g} TFLOP/s"
    seconds = plan.seconds()
    rest = ", ".join(f"{name} {_duration(s)}" for name, s in seconds.items() if name != "steps" and s >= 1)
    return [
        f"time, {how}",
        f"  step of {_images(training.batch_size)}: {plan.step_seconds:.3g} s, {plan.images_per_second:.3g} images/s",
        f"  {training.steps} steps: {_duration(seconds['steps'])}" + (f"; besides: {rest}" if rest else ""),
        f"  whole config: {_duration(sum(seconds.values()))}",
    ]


def _disk_lines(plan: Plan) -> list[str]:
    kept, size = plan.config.training.keep_checkpoints, plan.count.checkpoint
    lines = [
        "disk, GiB",
        f"  checkpoint {size / GIB:.2f}, {kept} kept and one being written: {(kept + 1) * size / GIB:.2f}",
    ]
    if plan.count.cached_image:
        total = (
            "" if plan.images is None else f", of {plan.images}: {plan.images * plan.count.cached_image / GIB:.2f} GiB"
        )
        lines.append(f"  latent cache of an image {plan.count.cached_image / 1024:.0f} KiB{total}")
    return lines


def _advice_lines(plan: Plan, changes: list[Change]) -> list[str]:
    if plan.fits:
        return []
    lines = ["", "what to change, each beside those above it, GiB     saves    needs   costs"]
    for change in changes:
        saves, peak = change.saves / GIB, change.peak / GIB
        lines.append(f"  {change.override:<46}{saves:8.2f} {peak:8.2f}   {change.cost}")
    if not changes or not changes[-1].fits:
        lines.append("  this is not enough: a larger machine, or a smaller network")
    return lines


def as_values(plan: Plan, changes: list[Change]) -> dict[str, Any]:
    """For programs: bytes, seconds, counts."""
    from dataclasses import asdict

    counted, machine = plan.count, plan.machine
    return {
        "machine": {
            "kind": machine.kind,
            "devices": machine.devices,
            "memory": machine.memory,
            "precision": "fp32" if machine.low is None else str(machine.low).removeprefix("torch."),
        },
        "assumed": list(plan.assumed),
        "parameters": {name: {"all": a, "trained": t} for name, (a, t) in counted.parameters.items()},
        "bytes": {
            "process": machine.overhead,
            "weights": counted.weights,
            "gradients": counted.gradients,
            "optimiser": counted.optimiser,
            "average": counted.average,
            "activations": counted.activations,
            "step": machine.overhead + counted.step,
            "step_measured": None if plan.measured is None else machine.overhead + plan.measured.peak,
            "phases": {name: machine.overhead + phase.peak for name, phase in counted.phases.items()},
            "needed": plan.peak,
            "checkpoint": counted.checkpoint,
            "cached_image": counted.cached_image,
        },
        "fits": plan.fits,
        "micro_batch": plan.micro_batch,
        "flops_of_a_micro_batch": counted.flops,
        "flops_a_second": plan.flops,
        "step_seconds": plan.step_seconds,
        "images_per_second": plan.images_per_second,
        "seconds": plan.seconds(),
        "images": plan.images,
        "changes": [asdict(change) for change in changes],
    }


def _count(number: int) -> str:
    return f"{number / 1e6:.2f} M" if number else "-"


def _images(number: int) -> str:
    return "1 image" if number == 1 else f"{number} images"


def _duration(seconds: float) -> str:
    for unit, size in (("d", 86400), ("h", 3600), ("min", 60)):
        if seconds >= 2 * size:
            return f"{seconds / size:.1f} {unit}"
    return f"{seconds:.0f} s"


def _say(line: str) -> None:
    print(line, file=sys.stderr, flush=True)
