"""One process or two: the same samples, the same random numbers, the same loss."""

from __future__ import annotations

import json
import shutil
import sys
import time

import pytest
import torch
from small import LDM, VAE, checkpoint_tensors, losses

STAGE_1_TOLERANCE = 2e-3
"""Relative, of the loss over eight steps. The adversary turns rounding into differences that grow: the adaptive weight
divides two gradient norms. Without it the difference stays below 1e-5 (tested too)."""


def loss_curves(commands, stage, config, *overrides):
    exact = ("runtime.precision=fp32", *overrides)  # of sums in another order, bf16 keeps two digits
    commands.train(stage, config, "out=one", *exact)
    commands.train_with_processes(2, stage, config, "out=two", *exact)
    state = json.loads((commands.folder / "two" / "checkpoints" / "step-8" / "state.json").read_text())
    assert state["processes"] == 2  # which have compared weights, averages and optimiser states before they saved
    return [[row["loss"] for row in losses(commands.folder / run) if "loss" in row] for run in ("one", "two")]


@pytest.mark.parametrize("accumulation", [pytest.param(1, marks=pytest.mark.slow), 2])
def test_stage_2_has_the_same_loss_curve(commands, small_autoencoder, accumulation):
    config = commands.write_config("c.yaml", {**LDM, "autoencoder": str(small_autoencoder), "out": "unused"})
    one, two = loss_curves(commands, "ldm", config, f"training.accumulation={accumulation}")
    assert len(one) == 8
    assert two == pytest.approx(one, rel=1e-5)


def test_stage_1_has_the_same_loss_curve(commands):
    config = commands.write_config("c.yaml", {**VAE, "out": "unused"})
    one, two = loss_curves(commands, "vae", config)
    assert two == pytest.approx(one, rel=STAGE_1_TOLERANCE)


@pytest.mark.slow
def test_stage_1_without_an_adversary_is_as_close_as_stage_2(commands):
    config = commands.write_config("c.yaml", {**VAE, "out": "unused"})
    one, two = loss_curves(commands, "vae", config, "discriminator.weight=0", "loss.perceptual=none")
    assert two == pytest.approx(one, rel=1e-5)


def test_a_batch_that_cannot_be_shared_out_is_refused(commands):
    config = commands.write_config("c.yaml", {**VAE, "out": "run"})
    result = commands.train("vae", config, "training.batch_size=5", "training.accumulation=2", expect=2)
    assert "training.accumulation: found 2; allowed is a divisor of batch_size = 5" in result.stderr


CONSTANT = {"lr": 1.0e-3, "schedule": "constant"}
"""A learning rate that does not depend on the number of steps, which some of these runs change."""


@pytest.mark.slow
def test_two_processes_go_on_bit_for_bit_and_one_goes_on_with_the_same_samples(commands):
    values = {**VAE, "optimiser": CONSTANT, "discriminator": {"weight": 0}, "out": "unused"}
    exact = {"runtime": {"precision": "fp32"}}  # as in `loss_curves`
    config = commands.write_config("c.yaml", {**values, **exact, "loss": {"perceptual": "none"}})
    for out, *parts in (("straight", 8), ("parted", 4, 8)):
        for steps in parts:
            if steps == 8 and out == "parted":
                shutil.copytree(commands.folder / "parted", commands.folder / "alone")
            commands.train_with_processes(2, "vae", config, f"out={out}", f"training.steps={steps}")
    first, second = (checkpoint_tensors(commands.folder / run, 8) for run in ("straight", "parted"))
    assert first.keys() == second.keys()
    assert [name for name in first if not torch.equal(first[name], second[name])] == []
    said = commands.train("vae", config, "out=alone", "training.steps=8").stderr
    assert "the checkpoint is of 2 processes, now there is 1: samples, their order" in said
    assert "not bit for bit" in said
    two, one = (
        [row["loss"] for row in losses(commands.folder / run) if "loss" in row] for run in ("straight", "alone")
    )
    assert len(one) == 8
    assert one == pytest.approx(two, rel=1e-5)


FAULTS = {
    "killed": "os.kill(os.getpid(), signal.SIGKILL)",
    "raising": "raise ValueError('planted in rank 1')",
    "diverging": "self._parameters[2].data.view(-1)[1].add_(1e-6)",
}
PROGRAM = """
import os, signal, sys, time
from pathlib import Path
from ldm.training.learner import Learner
real = Learner.update
def update(self, step):
    real(self, step)
    if os.environ["RANK"] == "1" and step == 4 and self.name == "autoencoder":
        Path("struck").write_text(str(time.time()))
        FAULT
Learner.update = update
import train_vae
sys.exit(train_vae.main())
"""


@pytest.mark.slow
@pytest.mark.parametrize("fault", FAULTS)
def test_a_fault_of_one_process_ends_the_run_promptly_with_its_error(commands, fault):
    """The whole run, launcher and all: no process waits for the lost one."""
    training = {**VAE["training"], "steps": 100_000, "checkpoint_every": 3, "compare_every": 1}
    config = commands.write_config("c.yaml", {**VAE, "training": training, "out": "run"})
    (commands.folder / "faulty.py").write_text(PROGRAM.replace("FAULT", FAULTS[fault]))
    launcher = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", 2]
    process = commands.start(*launcher, commands.folder / "faulty.py", config)
    _, error = process.communicate(timeout=400)
    seconds = time.time() - float((commands.folder / "struck").read_text())
    print(f"{fault}: over {seconds:.1f} s after the fault")
    assert process.returncode != 0
    assert seconds < 60
    assert (commands.folder / "run" / "checkpoints" / "step-3" / "manifest.json").exists()
    if fault == "killed":
        assert "Signal 9 (SIGKILL)" in error  # what torchrun says of it
    if fault == "raising":
        assert "ValueError: planted in rank 1" in error
    if fault == "diverging":
        lines = [line for line in error.splitlines() if "have diverged" in line]
        assert len(lines) == 2  # each process says the same
        assert "step 5: the processes have diverged: autoencoder: " in lines[0]
        assert 'train_vae.py", line' not in error  # no traceback of ours
    else:
        assert "process 0 of 2 stops, as another one has ended" in error
