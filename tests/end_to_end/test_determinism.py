"""The same config and seed on the same machine give the same files, byte for byte."""

from __future__ import annotations

import hashlib
from pathlib import Path

import pytest
from small import LDM, VAE, losses

import train_ldm
import train_vae

DIFFERENT = ("logs", "metrics.jsonl", ".lock")
"""TensorBoard's files and the loss log hold times, the lock the number of the process."""


def hashes(run: Path) -> dict[str, str]:
    """sha256 of every file of a run that is said to be the same."""
    paths = [path.relative_to(run) for path in sorted(run.rglob("*")) if path.is_file()]
    return {
        str(path): hashlib.sha256((run / path).read_bytes()).hexdigest()
        for path in paths
        if path.parts[0] not in DIFFERENT
    }


@pytest.mark.parametrize("stage", ["vae", pytest.param("ldm", marks=pytest.mark.slow)])
def test_two_runs_leave_the_same_files(commands, request, monkeypatch, stage):
    values = VAE
    if stage == "ldm":
        conditions = {**LDM["conditions"], "semantic": {"channels": 3}, "inpainting": {"masks": "large"}}
        autoencoder = str(request.getfixturevalue("small_autoencoder"))
        values = {**LDM, "autoencoder": autoencoder, "conditions": conditions}
    training = {**values["training"], "steps": 4, "validate_every": 2}
    config = commands.write_config("config.yaml", {**values, "training": training, "out": "run"})
    found = []
    for number in range(2):
        folder = commands.folder / f"{number}"
        folder.mkdir()
        monkeypatch.chdir(folder)
        {"vae": train_vae.train_autoencoder, "ldm": train_ldm.train_diffusion}[stage](config, [])
        found.append(hashes(folder / "run"))
    assert found[0] == found[1]
    assert losses(commands.folder / "0" / "run") == losses(commands.folder / "1" / "run")
    names = {Path(name).parts[0] for name in found[0]}
    common = {"config.yaml", "checkpoints", "samples", "bases.json"}
    assert names == common | (
        {"autoencoder", "report.json", "report.png"} if stage == "vae" else {"pipeline", "latents"}
    )
