"""Measure an autoencoder: PSNR, SSIM, LPIPS if its weights are given, latent statistics, and a side-by-side picture."""

from __future__ import annotations

import argparse
import json
from functools import partial
from pathlib import Path

from ldm.cli.entry import check_out_folder
from ldm.errors import UserError, user_input


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Options of `ldm reconstruct`."""
    parser.add_argument("autoencoder", metavar="AUTOENCODER", help="folder of an AutoencoderKL or VQModel, or a hub id")
    parser.add_argument("--data", required=True, metavar="FOLDER", help="images, as `ldm data check` reads them")
    parser.add_argument("--resolution", type=int, default=256, help="side in pixels (default 256)")
    parser.add_argument("--count", type=int, default=512, help="images at most, spread over the folder (default 512)")
    parser.add_argument("--batch", type=int, default=16, help="images at once (default 16)")
    parser.add_argument("--lpips-weights", metavar="FILE", help="torchvision's VGG16 weights as .safetensors")
    parser.add_argument("--device", default="auto")
    parser.add_argument("--out", type=Path, required=True, help="folder for report.json and report.png")


def run(args: argparse.Namespace) -> None:
    """Measure and write."""
    from tqdm import tqdm

    from autoencoder.losses import AutoencoderLossConfig, build_lpips, lpips_distance
    from autoencoder.model import load_autoencoder
    from ldm.data.fixed_batches import fixed_images
    from ldm.data.sources import DataConfig, open_source
    from ldm.device import choose_device
    from ldm.evaluation.reconstruction import measure_reconstructions
    from ldm.files import write_text
    from ldm.picture import save_png

    if args.count < 1 or args.batch < 1:
        raise UserError(f"--count: found {args.count}; allowed is 1 or more, as for --batch")
    check_out_folder(args.out)
    with user_input("--resolution"):
        data = DataConfig(source="folder", root=args.data, resolution=args.resolution)
    source = open_source(data)
    device = choose_device(args.device)
    with user_input("autoencoder"):
        autoencoder = load_autoencoder(args.autoencoder).to(device).eval()
    lpips = None
    if args.lpips_weights:
        with user_input("--lpips-weights"):
            config = AutoencoderLossConfig(perceptual="lpips", lpips_weights=args.lpips_weights)
            lpips = partial(lpips_distance, build_lpips(config).to(device))
    batches = tqdm(fixed_images(source, data, args.count, args.batch), desc="reconstructing", unit="batch")
    with user_input("--resolution", ValueError):
        report, picture = measure_reconstructions(autoencoder, batches, lpips)
    args.out.mkdir(parents=True, exist_ok=True)
    write_text(args.out / "report.json", json.dumps(report.to_json(), indent=2) + "\n")
    save_png(picture, args.out / "report.png")
    print(report.summary())
    print(f"picture: {args.out / 'report.png'}   figures: {args.out / 'report.json'}")
