"""Training logs as curves, figures against the training step, models against each other."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from ldm.errors import UserError
from ldm.evaluation.measurement import Better, Estimate, Measurement, Setting
from ldm.evaluation.page_text import Html
from ldm.evaluation.report import Section
from ldm.evaluation.report_compare import Contender, apart, best_of, comparison_section
from ldm.evaluation.report_progress import extended_history, progress_section, write_history
from ldm.evaluation.report_sweep import SweepPoint, sweep_section
from ldm.evaluation.report_training import MOST_POINTS, Curve, compared_training_section, read_curves, training_section

SETTING = Setting(n=9, resolution=8, extractor="e at 8 px", resize_filter="r", reference="x", reference_n=7)


def figure(
    value: float, low: float | None, high: float | None, better: Better = "lower", name: str = "fid"
) -> Measurement:
    return Measurement(name, name.upper(), better, Estimate(value, low, high), SETTING)


def log(run: Path, *rows: dict) -> Path:
    run.mkdir(exist_ok=True)
    (run / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return run


def test_curves_are_read_by_name_and_updates_done(tmp_path: Path) -> None:
    rows = [{"step": 9, "loss": 0.5, "timing": {"speed": 3}}, {"step": 19, "loss": float("nan"), "text": "x"}]
    log(tmp_path, *rows, {"step": 19, "watch/fid": 3})
    with (tmp_path / "metrics.jsonl").open("a", encoding="utf-8") as file:
        file.write('[1]\n{"step": "x", "loss": 1}\n{"step": 29, "lo')  # cut short by a kill
    curves = read_curves(tmp_path)
    assert set(curves) == {"loss", "watch/fid"}
    assert curves["loss"].steps == (10, 20) and curves["loss"].values[0] == 0.5
    assert curves["watch/fid"] == Curve("watch/fid", (20,), (3.0,))
    with pytest.raises(UserError, match="found no training log"):
        read_curves(tmp_path / "nowhere")


def test_a_long_curve_is_averaged_with_its_range() -> None:
    count = 10 * MOST_POINTS
    curve = Curve("loss", tuple(range(1, count + 1)), tuple(float(i % 10) for i in range(count)))
    series = curve.series("a")
    assert len(series.x) == MOST_POINTS and series.low is not None and series.high is not None
    assert set(series.y) == {4.5} and set(series.low) == {0.0} and set(series.high) == {9.0}
    assert series.x[0] == 5.5
    short = Curve("loss", (1, 2), (3.0, 4.0)).series("a")
    assert (short.x, short.y, short.low) == ((1, 2), (3.0, 4.0), None)


def test_losses_share_a_plot_and_runs_lie_over_each_other() -> None:
    curves = {name: Curve(name, (1, 2), (2.0, 1.0)) for name in ("loss", "validation/loss", "gradient_norm/unet")}
    one = training_section(curves)
    assert one.content.count("<svg") == 2
    two = compared_training_section({"run-a": curves, "run-b": {"loss": Curve("loss", (1, 2), (3.0, 2.0))}})
    first = two.content.split("</svg>")[0]
    assert first.count("<polyline") == 3 and "run-b training" in first
    assert two.values["last"]["run-b loss"] == 2.0
    with pytest.raises(UserError, match="found no row"):
        training_section({})


def test_figures_are_plotted_against_the_step_of_reports_with_the_same_settings(tmp_path: Path) -> None:
    def section(value: float) -> Section:
        return Section(name="image_metrics", title="I", figures=(figure(value, value - 1, value + 1),))

    first = extended_history(tmp_path, 1000, {"count": 4}, [section(9.0)])
    assert progress_section({}, first, [section(9.0)]) is None  # one point is no curve
    write_history(tmp_path, first)
    other = extended_history(tmp_path, 1500, {"count": 8}, [section(7.0)])
    write_history(tmp_path, other)
    again = extended_history(tmp_path, 1000, {"count": 4}, [section(8.0)])
    assert [(row["step"], row["settings"]["count"]) for row in again] == [(1500, 8), (1000, 4)]
    write_history(tmp_path, again)
    rows = extended_history(tmp_path, 2000, {"count": 4}, [section(5.0)])
    made = progress_section({}, rows, [section(5.0)])
    assert made is not None
    assert made.content.count("<circle") == 2 and "1000: 8" in made.content and "2000: 5" in made.content
    watched = progress_section({"watch/fid": Curve("watch/fid", (10, 20), (3.0, 2.0))}, [], [])
    assert watched is not None and watched.content.count("<svg") == 1
    (tmp_path / "history.jsonl").write_text("{}", encoding="utf-8")
    with pytest.raises(UserError, match="not a report's history"):
        extended_history(tmp_path, 1, {}, [])


# --- Sweeps and comparisons ------------------------------------------------------------------------------------------


def test_a_sweep_names_the_best_scales() -> None:
    points = [
        SweepPoint(scale, {"fid": figure(fid, fid - 1, fid + 1), "right": figure(right, None, None, "higher", "right")})
        for scale, fid, right in ((4, 5.0, 0.9), (1, 9.0, 0.3), (7, 6.0, 0.8))
    ]
    made = sweep_section(points, "right")
    assert "FID is lowest at guidance 4 (5 [4, 6], n = 9)" in made.verdict
    assert "RIGHT highest at 4 (0.9)" in made.verdict
    assert [point["guidance"] for point in made.values["points"]] == [1, 4, 7]
    assert made.content.count("<svg") == 3
    assert sweep_section([SweepPoint(2, {"fid": figure(1, None, None)})], None).content.count("<svg") == 1


def test_figures_differ_when_their_intervals_lie_apart() -> None:
    assert apart(figure(1, 0, 2), figure(4, 3, 5)) and apart(figure(4, 3, 5), figure(1, 0, 2))
    assert not apart(figure(1, 0, 3), figure(4, 3, 5))
    assert not apart(figure(1, None, None), figure(4, 3, 5))
    assert best_of({"a": figure(1, 0, 2), "b": figure(4, 3, 5)}) == "a"
    assert best_of({"a": figure(1, 0, 2, "higher"), "b": figure(4, 3, 5, "higher")}) == "b"
    assert best_of({"a": figure(1, 0, 2, "neither"), "b": figure(4, 3, 5, "neither")}) is None


def test_a_comparison_marks_what_lies_apart_from_the_best() -> None:
    made = comparison_section(
        [
            Contender("<a>", {"own/fid": figure(1, 0, 2), "own/kid": figure(3, 1, 5, name="kid")}),
            Contender("b", {"own/fid": figure(4, 3, 5), "own/kid": figure(2, 1, 3, name="kid")}),
            Contender("c", {"own/fid": figure(9, 8, 10)}),
        ]
    )
    assert made.content.count('class="flag"') == 2 and made.content.count('class="ok"') == 2
    assert "&lt;a&gt;" in made.content and "<a>" not in Html(made.content)
    assert made.verdict == "<a> is clearly best in FID (own)"
    fid, kid = made.values["figures"]
    assert fid["best"] == "<a>" and fid["apart"] == [["<a>", "b"], ["<a>", "c"], ["b", "c"]]
    assert kid["best"] == "b" and kid["apart"] == []
