"""Reports and the training hook by the real commands: several processes, the best model, what the page is made of."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import pytest
from small import LDM, VAE, Commands, losses

DRAWING = ("--count", 8, "--steps", 2, "--guidance", 2, "--keep-images")


def page_and_metrics(out: Path) -> tuple[str, dict]:
    page = (out / "report.html").read_text(encoding="utf-8")
    return page, json.loads((out / "metrics.json").read_text(encoding="utf-8"))


SHARING = """
from ldm.cli.reporting import shared_work
with shared_work("auto") as (share, _):
    print(list(share.of(6)))
"""


def test_the_processes_of_torchrun_share_the_work_on_a_cpu_too(commands: Commands) -> None:
    (commands.folder / "sharing.py").write_text(SHARING)
    launcher = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", 2]
    said = commands.run(*launcher, "sharing.py").stdout
    assert sorted(line for line in said.splitlines() if line.startswith("[")) == ["[0, 1, 2]", "[3, 4, 5]"]


@pytest.mark.slow
def test_two_processes_draw_what_one_draws(commands: Commands, small_run: Path) -> None:
    commands.ldm("evaluate", small_run, *DRAWING, "--out", "one")
    launcher = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", 2]
    commands.run(*launcher, "-m", "ldm.cli.main", "evaluate", small_run, *DRAWING, "--out", "two")
    one, two = (sorted((commands.folder / out / "images").rglob("0*.png")) for out in ("one", "two"))
    assert [path.name for path in one] == [path.name for path in two] and len(one) == 8
    assert [path.read_bytes() for path in one] == [path.read_bytes() for path in two]
    assert page_and_metrics(commands.folder / "one")[1] == page_and_metrics(commands.folder / "two")[1]


@pytest.mark.slow
def test_a_watched_run_keeps_its_best_model_and_its_report_shows_the_way(
    commands: Commands, small_autoencoder: Path
) -> None:
    watch = {"every": 4, "count": 8, "reference": 12, "num_inference_steps": 2, "metric": "everything"}
    values = {**LDM, "out": "run", "autoencoder": str(small_autoencoder)}
    config = commands.write_config("ldm.yaml", {**values, "watch": watch})
    said = commands.train("ldm", config).stderr
    commands.train("ldm", commands.write_config("plain.yaml", {**values, "out": "plain"}))
    run = commands.folder / "run"
    looked = [row for row in losses(run) if "watch/everything" in row]
    assert [row["step"] for row in looked] == [3, 7]
    assert [row for row in losses(run) if row not in looked] == losses(commands.folder / "plain")
    (best,) = (run / "checkpoints" / "best").iterdir()
    wanted = max(looked, key=lambda row: (row["watch/everything"], -row["step"]))
    assert best.name == f"step-{wanted['step'] + 1}" and "best of everything" in said
    commands.ldm("evaluate", run, *DRAWING, "--out", "report")
    page, metrics = page_and_metrics(commands.folder / "report")
    assert "Against the training step" in page and "watch/fid" in page
    assert metrics["missing"].keys() >= {"image_metrics_inception", "alignment"}
    assert 0 <= metrics["everything"] <= 1 and metrics["scene_scores"]["confusion"] == metrics["confusion"]
    commands.ldm("evaluate", run / "best", "--data", run, *DRAWING, "--out", "best")  # it opens as a run does


@pytest.mark.slow
def test_stage_1_keeps_the_autoencoder_that_validates_best(commands: Commands) -> None:
    training = {**VAE["training"], "validate_every": 2}
    values = {**VAE, "out": "run", "keep_best": "psnr", "training": training}
    commands.train("vae", commands.write_config("vae.yaml", values))
    run = commands.folder / "run"
    psnr = {row["step"] + 1: row["validation/psnr"] for row in losses(run) if "validation/psnr" in row}
    (best,) = (run / "checkpoints" / "best").iterdir()
    assert best.name == f"step-{max(psnr, key=psnr.__getitem__)}"
    commands.ldm("compare", run, run / "best", "--data", run, "--count", 6, "--out", "both")
    page, metrics = page_and_metrics(commands.folder / "both")
    assert metrics["labels"] == ["run", "best"] and "PSNR" in page
    commands.ldm("evaluate", run, "--count", 6, "--out", "report")
    assert "What survives, by spatial frequency" in page_and_metrics(commands.folder / "report")[0]
