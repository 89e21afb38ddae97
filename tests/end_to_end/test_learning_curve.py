"""benchmarks/learning_curve.py: known curves, and a run of the real command measured and not measured twice."""

from __future__ import annotations

import importlib.util
import json
import subprocess
import sys

import pytest
from small import ROOT

SCRIPT = ROOT / "benchmarks" / "learning_curve.py"


@pytest.fixture(scope="module")
def curves():
    spec = importlib.util.spec_from_file_location("learning_curve", SCRIPT)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def points(*values: float, figure: str = "objects") -> list[dict[str, float]]:
    """A curve with a point each hundred images."""
    return [
        {"images": 100.0 * (i + 1), "objects": 0.0, "everything": 0.0, "distance": 9.0, figure: v}
        for i, v in enumerate(values)
    ]


def test_images_to_reach_lies_between_two_points(curves):
    assert curves.images_to_reach(points(0.2, 0.4, 0.8), "objects", 0.5) == pytest.approx(225)
    assert curves.images_to_reach(points(8.0, 4.0, 2.0, figure="distance"), "distance", 5.0) == pytest.approx(175)


def test_what_is_reached_at_once_or_never(curves):
    assert curves.images_to_reach(points(0.5, 0.9), "objects", 0.3) == 100
    assert curves.images_to_reach(points(0.5, 0.9), "objects", 0.95) is None


def test_the_factor_is_of_images_for_the_other_runs_last_figure(curves):
    found = curves.factors({"ours": points(0.3, 0.6, 0.9), "plain": points(0.1, 0.2, 0.3)})
    assert found["plain"]["objects"] == pytest.approx(3.0)
    assert curves.factors({"ours": points(0.1, 0.2), "plain": points(0.3, 0.4)})["plain"]["objects"] is None


def test_a_run_is_measured_once(small_run, tmp_path):
    call = [sys.executable, str(SCRIPT), f"ours={small_run}", "--count", "4", "--steps", "2", "--out", str(tmp_path)]
    first = subprocess.run(call, cwd=ROOT, capture_output=True, text=True, check=True, timeout=300)
    measured = json.loads((tmp_path / "curves.json").read_text())
    steps = sorted(int(folder.name.removeprefix("step-")) for folder in (small_run / "checkpoints").glob("step-*"))
    assert len(measured["curves"]["ours"]) == len(steps) > 0
    assert all(0 <= point["objects"] <= 1 and point["distance"] >= 0 for point in measured["curves"]["ours"])
    assert "<svg" in (tmp_path / "curves.html").read_text()
    measured["curves"]["ours"][-1]["objects"] = 0.123  # a second call believes the file
    (tmp_path / "curves.json").write_text(json.dumps(measured))
    second = subprocess.run(call, cwd=ROOT, capture_output=True, text=True, check=True, timeout=300)
    assert "objects 0.123" in second.stdout and "objects 0.123" not in first.stdout


@pytest.mark.parametrize("run", ["runs/none", "ours=", "ours=tests"])
def test_what_is_no_run_is_one_line(run, tmp_path):
    call = [sys.executable, str(SCRIPT), run, "--out", str(tmp_path / "out")]
    done = subprocess.run(call, cwd=ROOT, capture_output=True, text=True, timeout=300)
    assert done.returncode == 2 and f"found {run!r}" in done.stderr and "Traceback" not in done.stderr
    assert not (tmp_path / "out").exists()
