"""Both stages train from WebDataset shards, by the real entry points, exactly as from a folder with the same images."""

from __future__ import annotations

import io
import tarfile
from pathlib import Path

import pytest
import torch
from small import LDM, SCENES, VAE, checkpoint_tensors, losses

import train_ldm
import train_vae
from autoencoder.model import AutoencoderConfig, build_autoencoder
from ldm.data.scenes import ScenesConfig
from ldm.data.scenes_folder import write_scenes
from ldm.errors import UserError


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """`loose/`, 12 images with captions, `shards/` with the same in two archives, and an autoencoder."""
    root = tmp_path_factory.mktemp("data")
    scenes = {name: tuple(value) if isinstance(value, list) else value for name, value in SCENES["scenes"].items()}
    write_scenes(ScenesConfig(**scenes), 20, root / "scenes", 12)
    loose, shards = root / "loose", root / "shards"
    loose.mkdir()
    shards.mkdir()
    images = sorted((root / "scenes").rglob("*.png"))
    images = [path for path in images if "semantic" not in str(path) and "map" not in str(path)]
    for half in (0, 1):
        with tarfile.open(shards / f"{half:02d}.tar", "w") as archive:
            for number in range(6 * half, 6 * half + 6):
                pixels, caption = images[number].read_bytes(), f"picture {number}".encode()
                for suffix, content in ((".png", pixels), (".txt", caption)):
                    (loose / f"{number:03d}{suffix}").write_bytes(content)
                    info = tarfile.TarInfo(f"{number:03d}{suffix}")
                    info.size = len(content)
                    archive.addfile(info, io.BytesIO(content))
    config = AutoencoderConfig(channels=(4, 4), latent_channels=2, layers_per_block=1, norm_groups=2)
    build_autoencoder(config).save_pretrained(root / "autoencoder")
    return root


@pytest.mark.slow
@pytest.mark.parametrize("stage", ["vae", "ldm"])
def test_shards_train_as_a_folder_does_and_resume(commands, data, stage):
    def train(out, source, root, *overrides):
        values = dict(VAE) if stage == "vae" else {**LDM, "autoencoder": str(data / "autoencoder")}
        values["data"] = {"source": source, "root": str(root), "resolution": 16, "flip": True}
        values["optimiser"] = {"lr": 1.0e-3}
        values["training"] = {**values["training"], "steps": 4, "checkpoint_every": 2}
        config = commands.write_config("config.yaml", {**values, "out": str(commands.folder / out)})
        entry = train_vae.train_autoencoder if stage == "vae" else train_ldm.train_diffusion
        entry(config, list(overrides))
        return commands.folder / out

    folder = train("folder", "folder", data / "loose")
    pattern = data / "shards" / "{00..01}.tar"
    shards = train("shards", "shards", pattern, "training.steps=2")
    train("shards", "shards", pattern, "training.workers=1")
    steps = [[row for row in losses(run) if "loss" in row] for run in (folder, shards)]
    assert steps[0] == steps[1] and len(steps[0]) == 4
    expected, found = checkpoint_tensors(folder, 4), checkpoint_tensors(shards, 4)
    assert all(torch.equal(found[name], value) for name, value in expected.items())


def test_a_missing_shard_is_one_line_before_anything_is_written(commands, data):
    values = {**VAE, "data": {"source": "shards", "root": str(data / "shards" / "{00..02}.tar"), "resolution": 16}}
    config = commands.write_config("config.yaml", {**values, "out": str(commands.folder / "run")})
    with pytest.raises(UserError, match=r"found no .*02\.tar"):
        train_vae.train_autoencoder(config, [])
    assert not (commands.folder / "run").exists()
