"""A step that is not finite: nothing is lost, and the bundle it leaves does that very step again."""

from __future__ import annotations

import json
import math
import os
import re
import shutil
import signal
import sys
import time
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from small import LDM, ROOT, VAE, checkpoint_tensors, losses

import ldm.data.loader
import train_ldm
import train_vae
from autoencoder.latents import decode
from autoencoder.model import AutoencoderConfig, build_autoencoder
from ldm.data.order import SquareOrder
from ldm.errors import UserError
from ldm.training.failure import open_failure

BAD_STEP, BAD_POSITION = 3, 2
BAD_KEY = f"train-0-{SquareOrder(24, 4, 0, 16).sample_at(BAD_STEP, BAD_POSITION)[1]:06d}"
"""Visited once in the six steps of an epoch, so the checkpoint of step 2 is good and that of step 4 is not reached."""


@pytest.fixture
def train(commands):
    """`train(stage, out, ...)` by the real entry point; a path in place of `out` is replayed."""

    latents = commands.folder / "latents"
    config = AutoencoderConfig(channels=(4, 4), latent_channels=2, layers_per_block=1, norm_groups=2)
    build_autoencoder(config).save_pretrained(latents)

    def run(stage, out, *overrides, **changes):
        entry = {"vae": train_vae.train_autoencoder, "ldm": train_ldm.train_diffusion}[stage]
        if isinstance(out, Path):
            return entry(out, list(overrides))
        values = dict(VAE) if stage == "vae" else {**LDM, "autoencoder": str(latents)}
        training = {**values["training"], "steps": 6, "checkpoint_every": 2}
        if stage == "ldm":
            values["cache"] = {"enabled": False}
        values |= {"training": training, "out": str(commands.folder / out), **changes}
        return entry(commands.write_config(f"{stage}.yaml", values), list(overrides))

    return run


def files(folder):
    """Every file below a folder with its bytes; the lock says nothing."""
    paths = [path for path in sorted(folder.rglob("*")) if path.is_file() and path.name != ".lock"]
    return {str(path.relative_to(folder)): path.read_bytes() for path in paths}


def bundle_of(error, run, stage):
    """The folder that the one line tells to replay."""
    assert "\n" not in str(error.value)
    found = re.search(r"python (train_\w+\.py) (\S+)$", str(error.value))
    assert found is not None, error.value
    assert found[1] == f"train_{stage}.py"
    folder = Path(found[2])
    assert folder.parent == run / "failure"
    assert sorted(path.name for path in folder.iterdir()) == ["config.yaml", "failure.json"]
    assert sum(path.stat().st_size for path in folder.iterdir()) < 10_000
    return folder


@pytest.mark.parametrize("stage", ["vae", pytest.param("ldm", marks=pytest.mark.slow)])
def test_a_bad_sample_is_named_and_without_it_the_run_goes_on_bit_exact(train, commands, monkeypatch, capsys, stage):
    train(stage, "undisturbed")
    run = commands.folder / "run"
    real = ldm.data.loader.make_item

    def planted(sample, *arguments):
        item = real(sample, *arguments)
        if sample.key == BAD_KEY:
            pixels = item.tensors.image.clone()
            pixels[1, 3, 4] = math.nan
            item = replace(item, tensors=replace(item.tensors, image=pixels))
        return item

    with monkeypatch.context() as patch:
        patch.setattr(ldm.data.loader, "make_item", planted)
        with pytest.raises(
            UserError, match=rf"step {BAD_STEP}: data = nan, .*the last checkpoint .* \(step-2\)"
        ) as error:
            train(stage, "run")
        bundle = bundle_of(error, run, stage)
        assert BAD_KEY in str(error.value)
        failure = open_failure(bundle, f"train_{stage}.py")
        assert failure.samples[BAD_POSITION].key == BAD_KEY
        assert json.loads((bundle / "failure.json").read_text())["seed"] == 0
        before = files(run)
        capsys.readouterr()
        assert train(stage, bundle) == 0
        out = capsys.readouterr().out.splitlines()
        assert out[1].startswith(f"replayed: step {BAD_STEP}: data = nan") and out[1].endswith("(the same)")
        rows = out[2:]
        assert len(rows) == 4
        assert [row.startswith(f"position {i}: {'NOT ' if i == BAD_POSITION else ''}") for i, row in enumerate(rows)]
        assert ["NOT FINITE" in row for row in rows] == [i == BAD_POSITION for i in range(4)]
        assert "its images" in rows[BAD_POSITION] and rows[BAD_POSITION].endswith(BAD_KEY)
        assert files(run) == before

    # The cause is gone: the replay says so, and the run goes on as if nothing had been.
    assert train(stage, bundle) == 1
    assert "all is finite   (NOT the same)" in capsys.readouterr().out
    train(stage, "run")
    expected, found = (checkpoint_tensors(commands.folder / name, 6) for name in ("undisturbed", "run"))
    assert expected.keys() == found.keys()
    assert all(torch.equal(found[name], value) for name, value in expected.items())
    assert losses(run) == losses(commands.folder / "undisturbed")

    # Now the checkpoint that the step was reached from has been removed.
    with pytest.raises(UserError, match="which has gone"):
        train(stage, bundle)
    other = "vae" if stage == "ldm" else "ldm"
    with pytest.raises(UserError, match=f"replay it with train_{stage}.py"):
        train(other, bundle)


def test_a_loss_that_explodes_does_so_again(train, commands, capsys):
    changes = ["optimiser.lr=1e30", "optimiser.clip=0", "optimiser.warmup_steps=0", "training.accumulation=2"]
    with pytest.raises(UserError, match=r"step \d: .*loss = nan") as error:
        train("ldm", "run", *changes, cache={"enabled": True, "workers": 0})
    bundle = bundle_of(error, commands.folder / "run", "ldm")
    capsys.readouterr()
    assert train("ldm", bundle) == 0
    out = capsys.readouterr().out
    assert "(the same)" in out and out.count("NOT FINITE") == 4 and "first in unet." in out


def test_weights_that_are_not_finite_are_never_saved(train, commands, capsys):
    changes = ["optimiser.lr=1e38", "optimiser.warmup_steps=0", "training.checkpoint_every=1"]
    with pytest.raises(UserError, match=r"autoencoder after the update = nan.*; stopped before it was saved") as error:
        train("vae", "run", *changes)
    assert "there is no checkpoint yet" in str(error.value)
    run = commands.folder / "run"
    assert not list((run / "checkpoints").glob("step-*"))
    bundle = bundle_of(error, run, "vae")
    capsys.readouterr()
    assert train("vae", bundle) == 0
    assert "(the same)" in capsys.readouterr().out


def test_a_bundle_that_cannot_be_written_does_not_hide_what_happened(train, commands):
    (commands.folder / "run").mkdir()
    (commands.folder / "run" / "failure").write_text("in the way")
    with pytest.raises(UserError, match=r"loss = nan.*as the bundle is missing"):
        train("vae", "run", "optimiser.lr=1e30", "optimiser.clip=0", "optimiser.warmup_steps=0")
    shutil.rmtree(commands.folder / "run")


@pytest.mark.slow
def test_a_preview_that_cannot_be_drawn_ends_no_run(train, commands, monkeypatch, capsys):
    monkeypatch.setattr("ldm.pipeline_model.decode", lambda vae, latents: decode(vae, latents) * math.inf)
    train("ldm", "run", "training.steps=2", "training.validate_every=1")
    err = capsys.readouterr().err
    assert err.count("no preview, the training goes on: the picture came out as NaN or Inf") == 2
    assert (commands.folder / "run" / "pipeline" / "model_index.json").is_file()


@pytest.mark.slow
def test_two_processes_stop_together_and_leave_one_bundle(commands):
    values = {**VAE, "out": str(commands.folder / "run"), "training": {**VAE["training"], "checkpoint_every": 1}}
    config = commands.write_config("vae.yaml", values)
    changes = ["optimiser.lr=1e30", "optimiser.clip=0", "optimiser.warmup_steps=0"]
    launcher = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", 2]
    stopped = commands.run(*launcher, ROOT / "train_vae.py", config, *changes, expect=1)
    assert "stopped before the update" in stopped.stderr
    (bundle,) = (commands.folder / "run" / "failure").iterdir()
    failure = open_failure(bundle, "train_vae.py")
    assert failure.processes == 2
    assert [sample.position for sample in failure.samples] == [0, 1, 2, 3]
    alone = commands.train("vae", bundle)
    assert "it ran with 2 processes" in alone.stderr and "(the same)" in alone.stdout
    both = commands.run(*launcher, ROOT / "train_vae.py", bundle)
    assert both.stdout.count("replayed: ") == 1 and both.stdout.count("position ") == 4


@pytest.mark.slow
def test_a_killed_worker_ends_the_run_in_one_line_and_it_goes_on_bit_exact(commands):
    values = {**VAE, "training": {**VAE["training"], "workers": 2, "checkpoint_every": 2, "steps": 4000}}
    values["optimiser"] = {"lr": 1e-3}  # constant, so that the number of steps may change
    config = commands.write_config("vae.yaml", {**values, "out": str(commands.folder / "run")})
    process = commands.start(sys.executable, ROOT / "train_vae.py", config)
    while not (commands.folder / "run" / "checkpoints" / "step-4").exists():
        assert process.poll() is None
        time.sleep(0.05)
    children = Path(f"/proc/{process.pid}/task/{process.pid}/children").read_text().split()
    os.kill(int(children[0]), signal.SIGKILL)
    _, err = process.communicate(timeout=120)
    assert process.returncode == 2, err
    assert err.splitlines()[-1].startswith("train_vae.py: data: a process that reads images has died")
    assert "Traceback" not in err
    last = max(int(path.name[5:]) for path in (commands.folder / "run" / "checkpoints").glob("step-*"))
    steps = last + 2
    commands.train("vae", config, f"training.steps={steps}")
    commands.train("vae", config, f"training.steps={steps}", "out=whole")
    expected = checkpoint_tensors(commands.folder / "whole", steps)
    found = checkpoint_tensors(commands.folder / "run", steps)
    assert all(torch.equal(found[name], value) for name, value in expected.items())
