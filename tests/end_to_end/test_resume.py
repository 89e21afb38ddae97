"""A run that was killed and one that was not end with the same bits."""

from __future__ import annotations

import signal

import pytest
import torch
from small import LDM, VAE, checkpoint_tensors, losses


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


@pytest.mark.parametrize("case", ["vae", "ldm with cache", "ldm without cache", "ldm with maps and masks"])
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
