"""Stage 2 on several folders of mixed shapes, by the real entry point."""

from __future__ import annotations

import json
import signal
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from small import LDM, TRAINING, checkpoint_tensors, losses

import train_ldm
import train_vae
from ldm.data.bucket_index import open_buckets
from ldm.data.order import BucketOrder
from ldm.data.share import Share
from ldm.data.sources import BucketsConfig, DataConfig, DataFolder, open_source
from ldm.errors import UserError

FOLDERS = {"mine": ((20, 30), (21, 30), (40, 22)), "other": ((40, 20), (25, 24), (36, 20), (18, 30))}


def folders(root: Path) -> list[dict]:
    """Three pictures that come twice, and four whose loss counts half."""
    for name, sizes in FOLDERS.items():
        (root / name).mkdir()
        for number, (width, height) in enumerate(sizes):
            pixels = np.random.default_rng(number).integers(0, 256, (height, width, 3), dtype=np.uint8)
            Image.fromarray(pixels).save(root / name / f"{number}.png")
            (root / name / f"{number}.txt").write_text(f"picture {number} of {name}")
    return [{"root": str(root / "mine"), "repeats": 2}, {"root": str(root / "other"), "weight": 0.5}]


def values_for(root: Path, autoencoder: Path, **data: object) -> dict:
    return {
        **LDM,
        "data": {"folders": folders(root), "resolution": 24, "buckets": {"step": 8}, "flip": True, **data},
        "autoencoder": str(autoencoder),
        "conditions": {**LDM["conditions"], "inpainting": {"masks": "large"}},
        "out": "unused",
    }


def shapes_of_steps(values: dict, index: Path, steps: int) -> list[tuple[int, int]]:
    parts = tuple(DataFolder(**part) for part in values["data"]["folders"])
    data = DataConfig(folders=parts, resolution=24, buckets=BucketsConfig(step=8))
    buckets = open_buckets(index, open_source(data), data, 2, Share())
    assert buckets is not None
    return [BucketOrder(buckets, TRAINING["batch_size"], seed=0).size_at(step) for step in range(steps)]


@pytest.mark.slow
def test_kill_9_and_resume_is_bit_exact_with_buckets_and_repeats(commands, small_autoencoder):
    values = values_for(commands.folder, small_autoencoder)
    config = commands.write_config("config.yaml", values)
    result = commands.train("ldm", config, "out=straight")
    assert "buckets (width x height: images): 16x32: 5, 24x24: 1, 32x16: 4" in result.stderr
    assert "fewer than a batch of 4, so repeated within it: 24x24: 1" in result.stderr
    killed, straight = commands.folder / "killed", commands.folder / "straight"
    code = commands.train_and_interrupt(
        "ldm", config, "out=killed", until=killed / "checkpoints" / "step-3", how=signal.SIGKILL
    )
    assert code == -signal.SIGKILL
    assert "going on from step" in commands.train("ldm", config, "out=killed").stderr
    first, second = checkpoint_tensors(straight, 8), checkpoint_tensors(killed, 8)
    assert first.keys() == second.keys()
    assert all(torch.equal(first[name], second[name]) for name in first)
    assert losses(straight) == losses(killed)
    assert set(shapes_of_steps(values, straight / "latents-buckets", 8)) == {(16, 32), (24, 24), (32, 16)}
    header = json.loads((straight / "latents" / "header.json").read_text())
    # Each picture once, whatever its repeats: two tall ones and one, one square, one wide one and two.
    assert header["images"] == 7
    assert header["transform"]["buckets"] == [[16, 32, 3], [24, 24, 1], [32, 16, 3]]


def test_random_crops_without_a_cache(commands, small_autoencoder):
    values = values_for(commands.folder, small_autoencoder, crop="random")
    run = commands.folder / "run"
    config = commands.write_config("config.yaml", {**values, "out": str(run), "cache": {"enabled": False}})
    train_ldm.train_diffusion(config, ["training.steps=4"])
    assert len(losses(run)) >= 4
    assert not (run / "latents").exists()
    assert (run / "pipeline" / "model_index.json").is_file()
    assert len(set(shapes_of_steps(values, run / "latents-buckets", 4))) > 1


def test_one_line_for_what_does_not_go_together(commands, small_autoencoder):
    values = values_for(commands.folder, small_autoencoder)
    config = commands.write_config("config.yaml", {**values, "out": str(commands.folder / "run")})
    with pytest.raises(UserError, match=r"^data\.root: found 'x' beside folders"):
        train_ldm.train_diffusion(config, ["data.root=x"])
    stage_1 = commands.write_config("vae.yaml", {"out": "run", "training": TRAINING, "data": values["data"]})
    with pytest.raises(UserError, match=r"^data\.buckets: found in stage 1, which trains on squares"):
        train_vae.train_autoencoder(stage_1, [])
    assert not (commands.folder / "run").exists()
    result = commands.run(sys.executable, "-m", "ldm.cli.main", "data", "check", commands.folder / "mine", "--buckets",
                          "--resolution", 24, "--step", 8)  # fmt: skip
    assert result.stdout.endswith("bucket 16x32: 2 images\nbucket 24x24: 0 images\nbucket 32x16: 1 images\n")
