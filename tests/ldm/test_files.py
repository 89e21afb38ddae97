"""ldm/files.py: what is under its final name is whole."""

from __future__ import annotations

import errno
import os
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from ldm import files
from ldm.errors import UserError, user_input
from ldm.files import whole_file, whole_folder, write_text, writing


def names(folder: Path) -> list[str]:
    """What lies in the folder, hidden leftovers too."""
    return sorted(path.name for path in folder.iterdir())


def refuse(*_: object) -> None:
    raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))


def test_a_file_is_replaced_as_a_whole(tmp_path: Path) -> None:
    path = tmp_path / "a.json"
    write_text(path, "long old text")
    with whole_file(path) as partial:
        partial.write_text("neu ä", encoding="utf-8")
        assert path.read_text(encoding="utf-8") == "long old text"
    assert path.read_text(encoding="utf-8") == "neu ä"
    assert names(tmp_path) == ["a.json"]


@pytest.mark.parametrize("failing", ["write", "sync"])
def test_a_full_disk_leaves_the_old_file_and_nothing_else(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, failing: str
) -> None:
    path = tmp_path / "a.json"
    write_text(path, "old")
    if failing == "sync":
        monkeypatch.setattr(files, "sync", refuse)
    with (
        pytest.raises(UserError, match=r"a\.json: cannot be written: No space left on device$"),
        whole_file(path) as partial,
    ):
        partial.write_text("half of it", encoding="utf-8")
        if failing == "write":
            refuse()
    assert path.read_text(encoding="utf-8") == "old"
    assert names(tmp_path) == ["a.json"]


def test_a_mistake_in_the_block_passes_through_and_writes_nothing(tmp_path: Path) -> None:
    with pytest.raises(ZeroDivisionError), whole_file(tmp_path / "a") as partial:
        partial.write_text("x", encoding="utf-8")
        _ = 1 / 0
    assert names(tmp_path) == []


def test_a_device_is_written_to_and_not_replaced(tmp_path: Path) -> None:
    pipe = tmp_path / "pipe"
    os.mkfifo(pipe)
    reader = os.open(pipe, os.O_RDONLY | os.O_NONBLOCK)
    write_text(pipe, "through")
    assert os.read(reader, 100) == b"through"
    os.close(reader)
    assert pipe.is_fifo() and names(tmp_path) == ["pipe"]
    with pytest.raises(UserError, match="/dev/full: cannot be written: No space left on device"):
        write_text("/dev/full", "x")


def test_a_folder_is_replaced_as_a_whole_or_stays(tmp_path: Path) -> None:
    folder = tmp_path / "model"
    for text in ("first", "second"):
        with whole_folder(folder) as partial:
            (partial / "sub").mkdir()
            (partial / "sub" / text).write_text(text, encoding="utf-8")
    assert names(folder / "sub") == ["second"]
    with pytest.raises(UserError, match=r"model: cannot be written, sorry: No space"), whole_folder(folder, ", sorry"):
        refuse()
    assert names(folder / "sub") == ["second"]
    assert names(tmp_path) == ["model"]


def test_a_writer_that_writes_nothing_leaves_the_old_file(tmp_path: Path) -> None:
    write_text(tmp_path / "a.json", "old")
    with pytest.raises(UserError, match=r"a\.json: cannot be written"), whole_file(tmp_path / "a.json"):
        pass
    assert (tmp_path / "a.json").read_text(encoding="utf-8") == "old" and names(tmp_path) == ["a.json"]


@pytest.mark.parametrize(("umask", "readable"), [(0o022, 0o644), (0o007, 0o660), (0o077, 0o600)])
def test_others_may_read_weights_as_they_may_any_new_file(tmp_path: Path, umask: int, readable: int) -> None:
    """The library's own files are for their owner alone, so that a server of another user could not open a model."""
    before = os.umask(umask)
    try:
        with whole_file(tmp_path / "one.safetensors") as partial:
            save_file({"weight": torch.ones(1)}, partial)
        with whole_folder(tmp_path / "model") as parts:
            (parts / "unet").mkdir()
            save_file({"weight": torch.ones(1)}, parts / "unet" / "model.safetensors")
    finally:
        os.umask(before)
    for written in (tmp_path / "one.safetensors", tmp_path / "model" / "unet" / "model.safetensors"):
        assert written.stat().st_mode & 0o777 == readable


def test_what_the_system_says_is_told_without_numbers_and_twice_named_files(tmp_path: Path) -> None:
    missing = tmp_path / "none" / "a"
    with pytest.raises(UserError) as error:
        write_text(missing, "x")
    assert (
        str(error.value)
        == f"{missing}: cannot be written: No such file or directory: {missing.parent}/"
        + (
            error.value.__cause__.filename.rsplit("/", 1)[1]  # type: ignore[union-attr]
        )
    )
    with pytest.raises(UserError, match=r"^--data: No such file or directory: .*/none/a$"), user_input("--data"):
        missing.read_text(encoding="utf-8")
    with pytest.raises(UserError) as error, writing(missing):
        missing.read_text(encoding="utf-8")
    assert str(error.value) == f"{missing}: cannot be written: No such file or directory"
