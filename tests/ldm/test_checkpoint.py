"""A checkpoint is whole or not there, whatever happens while it is written."""

from __future__ import annotations

import shutil

import pytest
import torch

from ldm import files
from ldm.errors import UserError
from ldm.training import checkpoint
from ldm.training.checkpoint import CheckpointFolder, checksum, load_checkpoint


def tensors(value: float = 1.0, count: int = 6) -> dict[str, dict[str, torch.Tensor]]:
    return {
        "net": {"weight": torch.full((2, count // 2), value), "step": torch.tensor(7)},
        "net.ema": {"w": torch.ones(1)},
    }


def test_what_is_saved_is_what_comes_back(tmp_path):
    folder = CheckpointFolder(tmp_path / "a" / "b", keep=2)
    assert folder.latest() is None
    assert folder.steps() == []
    last = torch.randn(2, 3, 4, 5).to(memory_format=torch.channels_last)
    folder.save(12, {**tensors(), "last": {"w": last}}, {"seed": 3, "processes": 2})
    found = folder.latest()
    assert found.step == 12
    assert found.state == {"seed": 3, "processes": 2}
    assert found.tensors.keys() == {"net", "net.ema", "last"}
    assert torch.equal(found.tensors["last"]["w"], last)
    assert found.tensors["net"]["step"].shape == ()
    assert found.tensors["net"]["step"].item() == 7


def test_the_newest_are_kept_by_number_and_not_by_name(tmp_path):
    folder = CheckpointFolder(tmp_path, keep=2)
    for step in (8, 9, 10, 11):
        folder.save(step, tensors(step), {})
    assert folder.steps() == [10, 11]
    assert folder.latest().step == 11
    assert sorted(path.name for path in tmp_path.iterdir()) == ["step-10", "step-11"]


def test_saving_a_step_again_leaves_the_first(tmp_path):
    folder = CheckpointFolder(tmp_path, keep=1)
    folder.save(1, tensors(1.0), {})
    folder.save(1, tensors(2.0), {})
    assert folder.latest().tensors["net"]["weight"][0, 0] == 1.0


def test_leftovers_of_a_killed_process_are_no_checkpoints_and_go_away(tmp_path):
    folder = CheckpointFolder(tmp_path, keep=1)
    folder.save(1, tensors(), {})
    for name in (".step-2.17.part", ".step-3.18.part", ".removed-step-0", "step-x", "notes"):
        (tmp_path / name).mkdir()
        (tmp_path / name / "net.safetensors").write_bytes(b"half")
    assert folder.steps() == [1]
    assert folder.latest().step == 1
    folder.save(2, tensors(), {})
    assert sorted(path.name for path in tmp_path.iterdir()) == ["notes", "step-2", "step-x"]


@pytest.mark.parametrize("moment", [(checkpoint, "save_file"), (files, "sync_all"), (files, "sync")])
def test_a_failure_while_writing_leaves_the_one_before(tmp_path, monkeypatch, moment):
    folder = CheckpointFolder(tmp_path, keep=1)
    folder.save(1, tensors(), {})

    def fail(*_: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(*moment, fail)
    with pytest.raises(KeyboardInterrupt):
        folder.save(2, tensors(), {})
    assert folder.latest().step == 1
    assert [path.name for path in tmp_path.iterdir()] == ["step-1"]


def test_old_ones_go_only_after_the_new_one_is_there(tmp_path, monkeypatch):
    folder = CheckpointFolder(tmp_path, keep=1)
    folder.save(1, tensors(), {})
    monkeypatch.setattr(CheckpointFolder, "_prune", lambda self: None)
    folder.save(2, tensors(), {})
    assert folder.steps() == [1, 2]


def test_a_disk_that_fills_up_is_one_line_and_leaves_the_one_before(tmp_path, files_limited_to):
    folder = CheckpointFolder(tmp_path, keep=1)
    folder.save(1, tensors(), {})
    with files_limited_to(1000), pytest.raises(UserError, match="step-2: cannot be written, earlier ones") as caught:
        folder.save(2, tensors(count=6000), {})
    assert "\n" not in str(caught.value)
    assert [path.name for path in tmp_path.iterdir()] == ["step-1"]
    folder.save(2, tensors(count=6000), {})
    assert folder.latest().step == 2


@pytest.mark.parametrize("damage", ["cut", "garbage", "one bit", "no state", "no json", "no manifest", "no step"])
def test_a_damaged_checkpoint_is_a_user_error_that_names_it(tmp_path, damage):
    place = CheckpointFolder(tmp_path, keep=1).save(3, tensors(), {})
    weights, state = place / "net.safetensors", place / "state.json"
    if damage == "cut":
        weights.write_bytes(weights.read_bytes()[:-5])
    elif damage == "garbage":
        weights.write_bytes(b"garbage")
    elif damage == "one bit":
        content = bytearray(weights.read_bytes())
        content[-3] ^= 4
        weights.write_bytes(content)
    elif damage == "no state":
        state.unlink()
    elif damage == "no manifest":
        (place / "manifest.json").unlink()
    else:
        state.write_text("{" if damage == "no json" else "{}", encoding="utf-8")
    with pytest.raises(UserError, match=r"checkpoint .*step-3: ") as caught:
        load_checkpoint(place)
    assert "\n" not in str(caught.value)


def test_checksum_tells_values_names_and_files_apart_but_not_order_or_strides():
    first = {"a": {"x": torch.randn(2, 3, 4, 4), "y": torch.ones(2)}, "b": {"z": torch.tensor(1)}}
    same = {"b": first["b"], "a": {"y": torch.ones(2), "x": first["a"]["x"].to(memory_format=torch.channels_last)}}
    assert checksum(first) == checksum(same)
    changed = first["a"]["x"].clone()
    changed[1, 2, 3, 3] += 1e-6
    others = [
        {**first, "a": {**first["a"], "x": changed}},
        {**first, "a": {"x": first["a"]["x"], "w": torch.ones(2)}},
        {"a": first["a"], "c": first["b"]},
    ]
    assert len({checksum(first), *map(checksum, others)}) == 4


@pytest.mark.parametrize(("others", "advice"), [([1], "to go on from step 1"), ([], "to start anew")])
def test_the_one_before_a_damaged_checkpoint_is_offered(tmp_path, others, advice):
    folder = CheckpointFolder(tmp_path, keep=3)
    for step in [*others, 2]:
        folder.save(step, tensors(step), {})
    weights = tmp_path / "step-2" / "net.safetensors"
    weights.write_bytes(weights.read_bytes()[:-1] + b"x")
    with pytest.raises(UserError, match=f"step-2: net.safetensors is damaged.*; remove the folder .*step-2 {advice}"):
        folder.latest()
    shutil.rmtree(tmp_path / "step-2")
    assert (folder.latest() is None) == (not others)
