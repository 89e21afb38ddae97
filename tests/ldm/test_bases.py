from __future__ import annotations

import shutil
from pathlib import Path

import pytest

from ldm.errors import UserError
from ldm.training.bases import FILE, claim_bases


def test_a_run_goes_on_with_the_model_that_it_began_from(
    tiny_folder: Path, conditioned_folder: Path, tmp_path: Path
) -> None:
    model, run = tmp_path / "model", tmp_path / "run"
    run.mkdir()
    shutil.copytree(tiny_folder, model)
    bases = {"model": str(model), "autoencoder": None}
    claim_bases(run, bases, resumed=False)
    claim_bases(run, bases, resumed=True)
    shutil.rmtree(model)
    shutil.copytree(conditioned_folder, model)
    with pytest.raises(UserError, match=r"^model: found another model at .* than the one this run began from"):
        claim_bases(run, bases, resumed=True)
    claim_bases(run, bases, resumed=False)  # nothing was trained yet: the new one is taken
    claim_bases(run, bases, resumed=True)
    assert [path.name for path in run.iterdir()] == [FILE]
