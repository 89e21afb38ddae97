"""Two ratios of a stage 2 training step, each measured in one run with the variants in turn.

    python benchmarks/stage2_step.py                  # the demo's sizes, on whatever device there is
    python benchmarks/stage2_step.py --preset sd15    # Stable Diffusion 1.5's sizes at 512 px (a GPU)

cache:   the step on cached moments against the step that encodes its images first.
format:  bf16 + channels_last (and each alone) against fp32 with contiguous tensors, on cached moments.

Prints the median of the pairwise ratios with their smallest and largest value. Variants alternate round by round, so a
machine that speeds up or slows down touches all alike.
"""

from __future__ import annotations

import argparse
import json
import statistics
import time
from collections.abc import Callable
from contextlib import nullcontext
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from autoencoder import AutoencoderConfig, build_autoencoder, encode, to_unet
from autoencoder.latents import Moments
from conditioning.encoders import ConditionEncoders, ConditionInputs
from ldm.device import choose_device
from ldm.noise import NoiseConfig, NoiseSchedule
from ldm.objective import ObjectiveConfig
from ldm.training.stage2 import DiffusionStep
from ldm.unet import UNetConfig, build_unet


@dataclass(frozen=True)
class Preset:
    resolution: int
    batch_size: int
    autoencoder: AutoencoderConfig
    unet: UNetConfig
    context: tuple[int, int]  # tokens, width


PRESETS = {
    "demo": Preset(
        32,
        64,
        AutoencoderConfig(channels=(16, 48, 64), layers_per_block=1, mid_attention=False, norm_groups=8),
        UNetConfig(channels=(48, 96, 128), layers_per_block=1, attention=(False, True, False), heads=4, norm_groups=16),
        (16, 96),
    ),
    "sd15": Preset(512, 16, AutoencoderConfig(), UNetConfig(), (77, 768)),
}


class Bench:
    """One stage 2 step in a numeric format."""

    def __init__(
        self, preset: Preset, device: torch.device, dtype: torch.dtype, memory_format: torch.memory_format
    ) -> None:
        torch.manual_seed(0)
        self.device, self.dtype = device, dtype
        self.autoencoder = build_autoencoder(preset.autoencoder).to(device).eval().requires_grad_(False)
        channels, width = preset.autoencoder.latent_channels, preset.context[1]
        side = preset.resolution // 2 ** (len(preset.autoencoder.channels) - 1)
        unet = build_unet(preset.unet, latent_channels=channels, context_width=width, sample_size=side)
        noise = NoiseConfig()
        schedule = NoiseSchedule.from_config(noise).to(device)
        self.step = DiffusionStep(unet, ConditionEncoders(), noise, ObjectiveConfig(), schedule).to(device)
        for module in (self.step, self.autoencoder):
            nn.Module.to(module, memory_format=memory_format)
        self.optimiser = torch.optim.AdamW(self.step.parameters(), lr=1e-5, fused=True)
        batch = preset.batch_size
        self.images = torch.randn(batch, 3, preset.resolution, preset.resolution, device=device)
        self.images = self.images.contiguous(memory_format=memory_format)
        self.noise = torch.randn(batch, channels, side, side, device=device)
        self.timesteps = torch.randint(0, 1000, (batch,), device=device)
        self.inputs = ConditionInputs(context=torch.randn(batch, *preset.context, device=device))
        self.moments = self.encode()

    @torch.no_grad()
    def encode(self) -> Moments:
        with self.autocast():
            return encode(self.autoencoder, self.images)

    def autocast(self) -> torch.autocast | nullcontext[None]:
        return nullcontext() if self.dtype == torch.float32 else torch.autocast(self.device.type, self.dtype)

    def run(self, *, cached: bool) -> float:
        """Seconds of one step."""
        self._wait()
        start = time.perf_counter()
        moments = self.moments if cached else self.encode()
        latents: Tensor = to_unet(self.autoencoder, moments.sample(self.noise))
        with self.autocast():
            loss = self.step(latents, self.noise, self.timesteps, self.inputs).mean()
        loss.backward()
        self.optimiser.step()
        self.optimiser.zero_grad()
        self._wait()
        return time.perf_counter() - start

    def _wait(self) -> None:
        if self.device.type == "cuda":
            torch.cuda.synchronize()


def compare(variants: dict[str, Callable[[], float]], base: str, rounds: int) -> dict[str, dict[str, float]]:
    """How many times as fast as `base` each variant is: median, smallest and largest of the pairwise ratios."""
    for variant in variants.values():
        variant()
        variant()
    times: dict[str, list[float]] = {name: [] for name in variants}
    for _ in range(rounds):
        for name, variant in variants.items():
            times[name].append(variant())
    results = {}
    for name, seconds in times.items():
        ratios = [reference / own for reference, own in zip(times[base], seconds, strict=True)]
        results[name] = {
            "speedup": statistics.median(ratios),
            "smallest": min(ratios),
            "largest": max(ratios),
            "seconds": statistics.median(seconds),
        }
    return results


def main() -> None:
    """Measure and print; `--json` for machines."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--preset", choices=PRESETS, default="demo")
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--device", default="auto")
    parser.add_argument("--json", action="store_true")
    args = parser.parse_args()
    preset, device = PRESETS[args.preset], choose_device(args.device)
    contiguous, last = torch.contiguous_format, torch.channels_last
    plain = Bench(preset, device, torch.float32, contiguous)
    formats = {
        "fp32": plain,
        "fp32 + channels_last": Bench(preset, device, torch.float32, last),
        "bf16": Bench(preset, device, torch.bfloat16, contiguous),
        "bf16 + channels_last": Bench(preset, device, torch.bfloat16, last),
    }
    tuned = formats["fp32 + channels_last"]
    cache = {"encode in the step": lambda: tuned.run(cached=False), "cached moments": lambda: tuned.run(cached=True)}
    results = {
        "cache": compare(cache, "encode in the step", args.rounds),
        "format": compare({n: (lambda b=b: b.run(cached=True)) for n, b in formats.items()}, "fp32", args.rounds),
    }
    if args.json:
        print(json.dumps({"preset": args.preset, "device": str(device), **results}, indent=2))
        return
    print(
        f"{args.preset}, {device}, {torch.get_num_threads()} threads, batch {preset.batch_size}, {args.rounds} rounds"
    )
    for table, rows in results.items():
        print(f"\n{table}")
        for name, row in rows.items():
            spread = f"{row['smallest']:.2f} - {row['largest']:.2f}"
            print(f"  {name:<22} {row['speedup']:5.2f} x  ({spread})   {1000 * row['seconds']:.0f} ms a step")


if __name__ == "__main__":
    main()
