"""The soak of benchmarks/soak.py, two minutes of it; docs/reliability.md has a long one's figures."""

from __future__ import annotations

import json
import sys

import pytest
from small import ROOT


@pytest.mark.slow
def test_both_stages_killed_again_and_again_end_as_undisturbed_runs_do(commands):
    words = ("--minutes", 1, "--every", 12, "--seed", 3, "--out", "soak")
    process = commands.start(sys.executable, ROOT / "benchmarks" / "soak.py", *words)
    said, error = process.communicate(timeout=900)
    assert process.returncode == 0, said + error
    print(said)
    stages = json.loads((commands.folder / "soak" / "soak.json").read_text())["stages"]
    assert stages.keys() == {"vae", "ldm"}
    for found in stages.values():
        assert found["different"] == []
        assert len(found["kills"]) >= 3
        assert min(found["steps"], found["tensors"], found["files"]) > 0
