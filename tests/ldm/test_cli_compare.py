"""`ldm compare`: the same prompts and seeds for all, figures with intervals, loss curves over each other."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import pytest
import yaml

from ldm.cli.compare import labels_of
from ldm.cli.main import main
from ldm.errors import UserError
from ldm.noise import NoiseConfig
from ldm.pipeline import LatentDiffusionPipeline

SCENES = {
    "source": "scenes",
    "resolution": 16,
    "scenes": {"objects": ["circle", "square"], "sizes": ["large"], "count": 24},
}


@pytest.fixture(scope="module")
def runs(make_pipeline: Callable[..., LatentDiffusionPipeline], tmp_path_factory: pytest.TempPathFactory) -> list[Path]:
    """Two runs whose models differ, of 16 px, with logs and configs; they are not trained."""
    folder, found = tmp_path_factory.mktemp("runs"), []
    for name, inpainting in (("first", False), ("second", True)):
        pipeline = make_pipeline(NoiseConfig(), inpainting=inpainting)
        pipeline.unet.register_to_config(sample_size=8)
        run = folder / name
        pipeline.save_pretrained(run / "pipeline")
        sections = {"data": SCENES, "validation_data": {**SCENES, "scenes": {**SCENES["scenes"], "split": "held_out"}}}
        (run / "config.yaml").write_text(yaml.safe_dump(sections), encoding="utf-8")
        rows = [{"step": step, "loss": 1 / (step + 1 + inpainting)} for step in range(5)]
        (run / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
        found.append(run)
    return found


@pytest.fixture
def compare(
    models_open_once: None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> Callable[..., str]:
    monkeypatch.chdir(tmp_path)

    def call(*words: object, code: int = 0) -> str:
        shared = ["--out", "out", "--dtype", "fp32", "--device", "cpu", "--steps", "2", "--guidance", "1"]
        assert main(["compare", *map(str, words), *shared]) == code
        captured = capsys.readouterr()
        return captured.err if code else captured.out + captured.err

    return call


def test_two_models_side_by_side(compare: Callable[..., str], runs: list[Path], tmp_path: Path) -> None:
    compare(*runs, "--count", 8, "--keep-images")
    metrics = json.loads((tmp_path / "out" / "metrics.json").read_text(encoding="utf-8"))
    assert metrics["labels"] == ["first", "second"]
    figures = {row["figure"]: row for row in metrics["comparison"]["figures"]}
    assert {"scenes/everything", "autoencoder/fid", "autoencoder/precision", "scenes/fid"} <= set(figures)
    for row in figures.values():
        assert set(row["values"]) == {"first", "second"}
        settings = [
            {k: one[k] for k in ("n", "reference", "extractor", "resolution")} for one in row["values"].values()
        ]
        assert settings[0] == settings[1]
        low, high = row["values"]["first"]["interval"], row["values"]["second"]["interval"]
        assert row["apart"] == ([["first", "second"]] if low[1] < high[0] or high[1] < low[0] else [])
    names = [
        sorted(path.name for path in folder.rglob("0*.png")) for folder in sorted((tmp_path / "out/images").iterdir())
    ]
    assert names[0] == names[1] and len(names[0]) == 8  # seed and what it was told are in the name
    page = (tmp_path / "out" / "report.html").read_text(encoding="utf-8")
    assert page.count('<figure class="shown"') == 16
    loss = next(part for part in page.split("<svg")[1:] if ">loss</text>" in part)
    assert loss.count("<polyline") == 2 and "first" in loss and "second" in loss
    assert "inception" in metrics["missing"]["missing_inception"]


def test_two_autoencoders_side_by_side(compare: Callable[..., str], runs: list[Path], tmp_path: Path) -> None:
    folders = [run / "pipeline" / "vae" for run in runs]
    compare(*folders, "--data", runs[0], "--count", 6, "--extractor", "scenes")
    metrics = json.loads((tmp_path / "out" / "metrics.json").read_text(encoding="utf-8"))
    assert metrics["labels"] == ["first/pipeline/vae", "second/pipeline/vae"]
    psnr = next(row for row in metrics["comparison"]["figures"] if row["figure"] == "psnr")
    values = [one["value"] for one in psnr["values"].values()]
    assert values[0] == pytest.approx(values[1], abs=0.5)  # they differ in the scale of one layer
    assert psnr["apart"] == []
    assert (tmp_path / "out" / "report.html").read_text(encoding="utf-8").count('<figure class="shown"') == 3 * 16


@pytest.mark.parametrize(
    ("words", "says"),
    [
        (["first"], "found 1 model; allowed are two or more"),
        (["first", "first"], "found the same model twice"),
        (["first", "first/pipeline/vae"], "found autoencoders beside models"),
        (["first", "second", "--count", "0"], "--count: found 0"),
        (["first", "second", "--scheduler", "dim"], "did you mean ddim?"),
    ],
)
def test_what_cannot_be_compared(
    compare: Callable[..., str], runs: list[Path], tmp_path: Path, words: list[str], says: str
) -> None:
    given = [str(runs[0].parent / word) if word.startswith(("first", "second")) else word for word in words]
    assert says in compare(*given, code=2)
    assert not (tmp_path / "out").exists()


def test_labels_are_as_short_as_they_can_be(tmp_path: Path) -> None:
    assert labels_of([Path("/a/x"), Path("/a/y")]) == ["x", "y"]
    assert labels_of([Path("/a/x/ldm"), Path("/a/y/ldm"), Path("/b/y/ldm")]) == ["a/x/ldm", "a/y/ldm", "b/y/ldm"]
    with pytest.raises(UserError, match="same model twice"):
        labels_of([Path("/a"), Path("/a")])
