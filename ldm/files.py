"""Files and folders that are whole or not there: written beside their final name, synced, renamed (DESIGN.md 5)."""

from __future__ import annotations

import ctypes
import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from stat import S_IMODE

from safetensors import SafetensorError

from ldm.errors import user_input


@contextmanager
def whole_file(path: str | Path) -> Iterator[Path]:
    """A name beside `path` to write to, which takes its place at the end and vanishes after an error.

    A reader sees the old file or the new one, whatever instant the writer dies at. What is no file, such as
    /dev/stdout, is written to as it is. Raises `UserError` if the disk refuses.
    """
    path = Path(path)
    if path.exists() and not path.is_file():
        with writing(path):
            yield path
        return
    partial = path.with_name(f".{path.name}.{os.getpid()}.part")
    try:
        with writing(path):
            partial.touch()
            mode = S_IMODE(partial.stat().st_mode)
            partial.unlink()  # so that a writer that writes nothing does not leave an empty file
            yield partial
            partial.chmod(mode)  # safetensors makes files for their owner alone
            sync(partial)
            partial.replace(path)
            sync(path.parent)
    finally:
        with suppress(OSError):  # of a disk that has become read-only; what it refused first is what is told
            partial.unlink(missing_ok=True)


def write_text(path: str | Path, text: str) -> None:
    """Write a UTF-8 file as `whole_file` does."""
    with whole_file(path) as partial:
        partial.write_text(text, encoding="utf-8")


@contextmanager
def whole_folder(folder: str | Path, note: str = "", *, synced: bool = True) -> Iterator[Path]:
    """A new folder beside `folder` to write into, which takes its place at the end and vanishes after an error.

    An older `folder` is replaced, on Linux in one step; elsewhere there is none for an instant, but both lie beside it.
    Raises `UserError` if the disk refuses; `note` follows "cannot be written" there. `synced` False spares the disk
    where there are very many small files that can be made again.
    """
    folder = Path(folder).resolve()
    partial = folder.with_name(f".{folder.name}.{os.getpid()}.part")
    former = folder.with_name(f".{folder.name}.{os.getpid()}.old")
    try:
        with writing(folder, note):
            shutil.rmtree(partial, ignore_errors=True)
            partial.mkdir(parents=True)
            yield partial
            for file in partial.rglob("*.safetensors"):
                file.chmod(partial.stat().st_mode & 0o666)  # the library makes them for their owner alone
            if synced:
                sync_all(partial)
            if not (folder.exists() and _exchange(partial, folder)):
                if folder.exists():
                    folder.rename(former)
                partial.rename(folder)
            sync(folder.parent)
    finally:
        shutil.rmtree(partial, ignore_errors=True)
        if former.exists() and not folder.exists():
            former.rename(folder)
        shutil.rmtree(former, ignore_errors=True)


def _exchange(one: Path, other: Path) -> bool:
    """Let two names change places in one step; False where the system or the file system cannot."""
    call = getattr(ctypes.CDLL(None, use_errno=True), "renameat2", None)  # Linux only; Python has no name for it
    here, exchange = -100, 2  # AT_FDCWD, RENAME_EXCHANGE
    return call is not None and call(here, os.fsencode(one), here, os.fsencode(other), exchange) == 0


@contextmanager
def writing(path: str | Path, note: str = "") -> Iterator[None]:
    """Inside, a disk that is full or refuses is one line about `path`: safetensors has an error of its own for it."""
    with user_input(f"{path}: cannot be written{note}", OSError, SafetensorError):
        yield


def sync(path: Path) -> None:
    """Flush a file or a folder to the disk."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def sync_all(folder: Path) -> None:
    """Flush a folder and everything in it to the disk."""
    for path in folder.rglob("*"):
        sync(path)
    sync(folder)
