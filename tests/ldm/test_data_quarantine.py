"""Unusable samples are written down once, and too many of them stop the run."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from ldm.data.quarantine import Quarantine
from ldm.errors import UserError


def lines(path: Path) -> list[dict[str, str]]:
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]


def test_keys_are_written_and_counted_once(tmp_path: Path) -> None:
    path = tmp_path / "quarantine.jsonl"
    quarantine = Quarantine(path, allowed_share=0.5, dataset_length=4)
    quarantine.record([])
    assert not path.exists()
    for _ in range(3):
        quarantine.record([("a", "empty"), ("a", "empty"), ("ü", "cut\nshort")])
    assert lines(path) == [{"key": "a", "reason": "empty"}, {"key": "ü", "reason": "cut\nshort"}]
    assert len(quarantine) == 2


def test_more_than_the_share_stops_the_run_and_is_written_down(tmp_path: Path) -> None:
    path = tmp_path / "quarantine.jsonl"
    quarantine = Quarantine(path, allowed_share=0.02, dataset_length=100)
    quarantine.record([("a", "x"), ("b", "x")])
    with pytest.raises(
        UserError, match=r"^3 of 100 samples cannot be used \(last c: why\).*max_bad_share 0.02"
    ) as caught:
        quarantine.record([("c", "why")])
    assert "\n" not in str(caught.value)
    assert [line["key"] for line in lines(path)] == ["a", "b", "c"]


def test_nothing_allowed_means_the_first_one_stops(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"^1 of 10 "):
        Quarantine(tmp_path / "q.jsonl", 0.0, 10).record([("a", "x")])


def test_a_resume_takes_the_lines_over_and_drops_a_torn_one(tmp_path: Path) -> None:
    path = tmp_path / "quarantine.jsonl"
    path.write_text('{"key": "a", "reason": "x"}\n{"key": "b", "rea', encoding="utf-8")
    quarantine = Quarantine(path, allowed_share=0.1, dataset_length=20)
    assert quarantine.keys == {"a"}
    quarantine.record([("a", "x"), ("b", "x")])
    assert [line["key"] for line in lines(path)] == ["a", "b"]
    with pytest.raises(UserError):
        quarantine.record([("c", "x")])


def test_a_foreign_file_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "quarantine.jsonl"
    path.write_text("hello\n")
    with pytest.raises(UserError, match=r"quarantine\.jsonl"):
        Quarantine(path, 0.1, 20)
