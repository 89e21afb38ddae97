"""A run that was killed and one that was not end with the same bits."""

from __future__ import annotations

import os
import signal

import pytest
import torch
from small import LDM, VAE, checkpoint_tensors, losses

import train_ldm
import train_vae
from ldm.training.learner import Learner


def stages(small_autoencoder):
    latent = {**LDM, "autoencoder": str(small_autoencoder)}
    conditions = {**LDM["conditions"], "semantic": {"channels": 3}, "inpainting": {"masks": "large"}}
    return {
        "vae": ("vae", VAE),
        "ldm with cache": ("ldm", latent),
        "ldm without cache": ("ldm", {**latent, "cache": {"enabled": False}}),
        "ldm with maps and masks": ("ldm", {**latent, "conditions": conditions}),
    }


def assert_same_run(straight, resumed, steps):
    first, second = checkpoint_tensors(straight, steps), checkpoint_tensors(resumed, steps)
    assert first.keys() == second.keys()
    # Weights, moving average and optimisers of every network are among them.
    assert {kind for name, _ in first for kind in ("optimiser", "ema") if name.endswith(kind)} == {"optimiser", "ema"}
    different = [name for name in first if not torch.equal(first[name], second[name])]
    assert not different
    assert losses(straight) == losses(resumed)


@pytest.mark.parametrize(
    "case",
    ["vae", "ldm with cache", pytest.param("ldm without cache", marks=pytest.mark.slow), "ldm with maps and masks"],
)
def test_kill_9_and_resume_is_bit_exact(commands, small_autoencoder, case):
    stage, values = stages(small_autoencoder)[case]
    config = commands.write_config("config.yaml", {**values, "out": "unused"})
    commands.train(stage, config, "out=straight")
    killed = commands.folder / "killed"
    # 3 is in the middle of the first epoch's second half: 24 scenes, 4 a batch.
    code = commands.train_and_interrupt(
        stage, config, "out=killed", until=killed / "checkpoints" / "step-3", how=signal.SIGKILL
    )
    assert code == -signal.SIGKILL
    result = commands.train(stage, config, "out=killed")
    assert "going on from step" in result.stderr
    assert ("attention: sdpa (flash)\n" in result.stderr) == (stage == "ldm")  # the kernel that ran
    assert_same_run(commands.folder / "straight", killed, steps=8)


def test_sigterm_saves_exits_with_its_own_code_and_resumes_bit_exact(commands):
    config = commands.write_config("config.yaml", {**VAE, "out": "unused"})
    long = ("training.checkpoint_every=1000", "training.steps=40")
    commands.train("vae", config, "out=straight", *long)
    stopped = commands.folder / "stopped"
    code = commands.train_and_interrupt(
        "vae", config, "out=stopped", *long, until=stopped / "metrics.jsonl", how=signal.SIGTERM
    )
    assert code == 75
    assert len(list((stopped / "checkpoints").glob("step-*"))) == 1
    commands.train("vae", config, "out=stopped", *long)
    assert_same_run(commands.folder / "straight", stopped, steps=40)


def test_another_number_of_workers_changes_nothing(commands):
    config = commands.write_config("config.yaml", {**VAE, "out": "unused"})
    commands.train("vae", config, "out=none", "training.workers=0")
    commands.train("vae", config, "out=two", "training.workers=2")
    assert_same_run(commands.folder / "none", commands.folder / "two", steps=8)


def test_a_changed_config_is_refused_by_name(commands):
    config = commands.write_config("config.yaml", {**VAE, "out": "run"})
    commands.train("vae", config, "training.steps=1")
    result = commands.train("vae", config, "optimiser.weight_decay=0.5", expect=2)
    assert "optimiser.weight_decay: found 0.5" in result.stderr
    assert "began with 0.01" in result.stderr


def test_a_cache_of_another_autoencoder_is_refused_by_name(commands, small_autoencoder):
    values = {**LDM, "autoencoder": str(small_autoencoder), "cache": {"folder": "shared"}, "out": "first"}
    config = commands.write_config("config.yaml", values)
    commands.train("ldm", config, "training.steps=1")
    commands.train("ldm", config, "training.steps=1", "out=second")  # the same data and weights: taken
    result = commands.train("ldm", config, "out=third", "data.scenes.seed=5", expect=2)
    assert "latent cache shared: made with data =" in result.stderr


class Killed(BaseException):
    """Ends a training inside this process, as nothing in it expects."""


@pytest.fixture
def train_until(monkeypatch):
    """`train_until(stage, config, overrides, at, how)`: train in this process, killed or sent SIGTERM at a step."""
    real = Learner.update

    def train(stage, config, overrides, at=None, how="kill"):
        def update(learner, step):
            real(learner, step)
            if step == at and learner.name != "discriminator":
                if how == "kill":
                    raise Killed
                os.kill(os.getpid(), signal.SIGTERM)

        monkeypatch.setattr(Learner, "update", update)
        entry = {"vae": train_vae.train_autoencoder, "ldm": train_ldm.train_diffusion}[stage]
        entry(config, list(overrides))

    return train


@pytest.fixture
def interrupted_stage(request):
    """`interrupted_stage(case)`: the stage and its config."""

    def find(case):
        if case == "vae":
            return "vae", VAE
        if case == "ldm":
            return "ldm", {**LDM, "autoencoder": str(request.getfixturevalue("small_autoencoder"))}
        model = request.getfixturevalue("small_run") / "pipeline"
        text, lora = {"encoder": "model"}, {"rank": 2, "text_encoder": True}
        return "ldm", {**LDM, "model": str(model), "conditions": {"text": text}, "unet": {}, "lora": lora}

    return find


@pytest.mark.parametrize(
    "case", ["vae", pytest.param("ldm", marks=pytest.mark.slow), pytest.param("lora", marks=pytest.mark.slow)]
)
def test_interrupted_four_times_within_one_epoch(commands, interrupted_stage, train_until, case):
    """With accumulation and an average; killed twice within one epoch and between two checkpoints, stopped by SIGTERM,
    each part with another number of workers."""
    stage, values = interrupted_stage(case)
    training = {**values["training"], "accumulation": 2, "checkpoint_every": 2, "validate_every": 4}
    quiet = {"training": training, "runtime": {"trackers": []}, "out": "unused"}
    config = commands.write_config("config.yaml", {**values, **quiet})
    straight, parted = commands.folder / "straight", commands.folder / "parted"
    train_until(stage, config, [f"out={straight}"])
    # An epoch is six steps. Killed before there is a checkpoint, when the one of step 4 is due, and after it.
    for at, workers in ((0, 0), (3, 1), (4, 0)):
        with pytest.raises(Killed):
            train_until(stage, config, [f"out={parted}", f"training.workers={workers}"], at)
    with pytest.raises(SystemExit) as stopped:
        train_until(stage, config, [f"out={parted}", "training.workers=1"], 4, "stop")
    assert stopped.value.code == 75
    train_until(stage, config, [f"out={parted}"])
    assert_same_run(straight, parted, steps=8)
