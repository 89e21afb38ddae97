"""Folders to run commands in, and an autoencoder and a model that the real commands have trained."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest
from accelerate.state import AcceleratorState, GradientState
from small import LDM, VAE, Commands


@pytest.fixture(autouse=True)
def _no_run_before() -> Iterator[None]:
    """Accelerate keeps the precision of a process's first run, which may have been that of another test."""
    _forget_runs()
    yield
    _forget_runs()


def _forget_runs() -> None:
    AcceleratorState._reset_state(reset_partial_state=True)
    GradientState._reset_state()


@pytest.fixture
def commands(tmp_path: Path) -> Commands:
    return Commands(tmp_path)


@pytest.fixture(scope="session")
def small_autoencoder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """An autoencoder trained for a few steps by the real command."""
    commands = Commands(tmp_path_factory.mktemp("autoencoder"))
    commands.train("vae", commands.write_config("vae.yaml", {**VAE, "out": "run"}))
    return commands.folder / "run" / "autoencoder"


@pytest.fixture(scope="session")
def small_run(tmp_path_factory: pytest.TempPathFactory, small_autoencoder: Path) -> Path:
    """A finished stage 2 run."""
    commands = Commands(tmp_path_factory.mktemp("model"))
    values = {**LDM, "out": "run", "autoencoder": str(small_autoencoder)}
    commands.train("ldm", commands.write_config("ldm.yaml", values))
    return commands.folder / "run"
