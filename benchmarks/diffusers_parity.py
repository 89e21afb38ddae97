"""Largest difference between our image and diffusers', same folder, latents and scheduler, fp32.

    python benchmarks/diffusers_parity.py runs/demo/ldm/pipeline

diffusers runs in a process of its own in which none of our code is imported.
"""

from __future__ import annotations

import argparse
import subprocess
import sys
import tempfile
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file

from autoencoder import downsampling_factor, latent_channels
from ldm import LatentDiffusionPipeline

ALONE = """
import sys
from diffusers import StableDiffusionPipeline
from safetensors.torch import load_file, save_file
folder, exchange, steps, guidance, *prompts = sys.argv[1:]
pipeline = StableDiffusionPipeline.from_pretrained(folder)
latents = load_file(exchange + "/latents.safetensors")["latents"]
images = pipeline(prompts, latents=latents, num_inference_steps=int(steps), guidance_scale=float(guidance),
                  output_type="pt").images
if {"ldm", "autoencoder", "conditioning"} & sys.modules.keys():
    sys.exit("our code was imported")
save_file({"images": images.contiguous()}, exchange + "/images.safetensors")
"""


def main() -> None:
    """Draw with both and print the difference."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", type=Path)
    parser.add_argument("--prompt", action="append", help="repeatable; two of the demo's by default")
    parser.add_argument("--steps", type=int, default=25)
    parser.add_argument("--guidance", type=float, default=4.0)
    args = parser.parse_args()
    prompts = args.prompt or ["a red circle on a black background", "a blue triangle on a white background"]
    pipeline = LatentDiffusionPipeline.from_pretrained(args.model, dtype="fp32", device="cpu")
    height, width = (side // downsampling_factor(pipeline.vae) for side in pipeline.default_size)
    shape = (len(prompts), latent_channels(pipeline.vae), height, width)
    latents = torch.randn(shape, generator=torch.Generator().manual_seed(0))
    settings = {"num_inference_steps": args.steps, "guidance_scale": args.guidance}
    ours = pipeline(prompts, latents=latents, output_type="pt", **settings).images
    with tempfile.TemporaryDirectory() as exchange:
        save_file({"latents": latents}, Path(exchange) / "latents.safetensors")
        words = [str(args.model.resolve()), exchange, str(args.steps), str(args.guidance), *prompts]
        subprocess.run([sys.executable, "-c", ALONE, *words], check=True, cwd=exchange)
        theirs = load_file(Path(exchange) / "images.safetensors")["images"]
    print(f"largest difference over {len(prompts)} images in [0, 1]: {(ours - theirs).abs().max().item():.2e}")


if __name__ == "__main__":
    main()
