"""metadata.jsonl and metadata.csv: checked row by row once, then kept as one byte offset per row.

Worker processes share that memory after a fork; millions of Python objects would be copied as soon as they are touched.
"""

from __future__ import annotations

import csv
import json
import os
import posixpath
from array import array
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np

from ldm.errors import UserError

METADATA_NAMES = ("metadata.jsonl", "metadata.csv")
OnProblem = Callable[[str, str], None]
"""Called with (name, reason) for a row or file that cannot be used; may raise to stop."""


def stop_at_problem(name: str, reason: str) -> None:
    """The `OnProblem` of training: the first problem ends the run."""
    raise UserError(f"{name}: {reason}")


@dataclass(frozen=True)
class Row:
    """What is known of one image before it is opened. None = not given."""

    file_name: str
    captions: tuple[str, ...] | None = None
    semantic: str | None = None
    mask: str | None = None
    label: str | int | None = None
    extra: dict[str, object] = field(default_factory=dict)


@dataclass
class Contents:
    """Names of the optional parts that at least one row has, and the label values seen."""

    parts: set[str] = field(default_factory=set)
    labels: set[str | int] = field(default_factory=set)
    columns: set[str] = field(default_factory=set)

    def add(self, row: Row) -> None:
        if row.captions is not None:
            self.parts.add("captions")
        if row.semantic is not None:
            self.parts.add("semantic")
        if row.mask is not None:
            self.parts.add("mask")
        if row.label is not None:
            self.parts.add("label")
            self.labels.add(row.label)


class MetadataEntries:
    """The rows of a metadata.jsonl or metadata.csv file, in the file's order, by byte offset."""

    def __init__(self, path: Path, caption_column: str, on_problem: OnProblem) -> None:
        self.path = path
        self.caption_column = caption_column
        self.contents = Contents()
        self._header: tuple[str, ...] = ()
        self._offsets = array("Q")
        self._state = _state(path.stat())
        hashes = array("q")
        from_csv = path.suffix == ".csv"
        for offset, number, values in self._scan(on_problem):
            try:
                row = parse_row(values, caption_column, from_csv=from_csv)
            except ValueError as error:
                on_problem(f"{path.name} line {number}", str(error))
                continue
            self.contents.add(row)
            self.contents.columns.update(values)
            self._offsets.append(offset)
            hashes.append(hash(row.file_name))
        self._drop_duplicates(np.frombuffer(hashes, dtype=np.int64), on_problem)

    def __len__(self) -> int:
        return len(self._offsets)

    def row(self, index: int) -> Row:
        with self.path.open("rb") as file:
            if _state(os.fstat(file.fileno())) != self._state:  # offsets would point into the middle of other rows
                raise UserError(f"{self.path}: it changed while in use; start again")
            file.seek(self._offsets[index])
            values: dict[str, object]
            if self._header:
                lines = (line.decode("utf-8") for line in file)
                values = dict(zip(self._header, next(csv.reader(lines)), strict=True))
            else:
                values = json.loads(file.readline())
        return parse_row(values, self.caption_column, from_csv=bool(self._header))

    def _scan(self, on_problem: OnProblem) -> Iterator[tuple[int, int, dict[str, object]]]:
        """(byte offset, line number, values by column) of every row."""
        with self.path.open("rb") as file:
            start = file.read(4096)
            if b"\0" in start:  # JSON would guess UTF-16, line by line
                raise UserError(f"{self.path}: it is no UTF-8 text (UTF-16, perhaps); save it as UTF-8")
            file.seek(_after_byte_order_mark(start[:3]))
            yield from self._scan_csv(file, on_problem) if self.path.suffix == ".csv" else _scan_jsonl(file, on_problem)

    def _scan_csv(self, file: Iterable[bytes], on_problem: OnProblem) -> Iterator[tuple[int, int, dict[str, object]]]:
        position = file.tell()  # type: ignore[attr-defined]

        def lines() -> Iterator[str]:
            nonlocal position
            for line in file:
                position += len(line)
                yield line.decode("utf-8")

        reader = csv.reader(lines())
        try:
            self._header = tuple(next(reader, ()))
            start, number = position, reader.line_num + 1
            for cells in reader:  # a quoted cell may hold line breaks, so a row can take several lines
                if cells and len(cells) != len(self._header):
                    on_problem(
                        f"{self.path.name} line {number}", f"{len(cells)} cells, the header has {len(self._header)}"
                    )
                elif cells:
                    yield start, number, dict(zip(self._header, cells, strict=True))
                start, number = position, reader.line_num + 1
        except (csv.Error, UnicodeDecodeError) as error:
            raise UserError(f"{self.path} line {reader.line_num + 1}: {error}; save it as UTF-8 CSV") from error

    def _drop_duplicates(self, hashes: np.ndarray, on_problem: OnProblem) -> None:
        """Report every second use of a file name; only the first row of a name stays."""
        order = np.argsort(hashes, kind="stable")
        starts = np.flatnonzero(np.diff(hashes[order], prepend=hashes[order[:1]] + 1))
        drop = {}
        for group in np.split(order, starts[1:]) if len(starts) < len(order) else ():
            names: set[str] = set()
            for index in group.tolist() if len(group) > 1 else ():
                name = self.row(index).file_name  # the names decide: two hashes may be equal by chance
                if name in names:
                    drop[index] = name
                names.add(name)
        for _, name in sorted(drop.items()):
            column = self.caption_column
            on_problem(name, f"it has two rows in {self.path.name}; give several captions as one list in {column!r}")
        if drop:
            self._offsets = array("Q", (offset for i, offset in enumerate(self._offsets) if i not in drop))


def parse_row(values: dict[str, object], caption_column: str, *, from_csv: bool) -> Row:
    """One row of a metadata file. Raises ValueError that says what is wrong with it."""
    if from_csv:
        values = {name: value for name, value in values.items() if value != ""}
    known = ("file_name", caption_column, "semantic", "mask", "label")
    file_name = _path(values, "file_name")
    if file_name is None:
        raise ValueError("file_name is missing")
    return Row(
        file_name,
        captions=_captions(values, caption_column),
        semantic=_path(values, "semantic"),
        mask=_path(values, "mask"),
        label=_label(values.get("label"), from_csv),
        extra={name: value for name, value in values.items() if name not in known},
    )


def _path(values: dict[str, object], column: str) -> str | None:
    """A path inside the folder, in its shortest spelling."""
    value = values.get(column)
    if value is None:
        return None
    if not isinstance(value, str) or not value or "\0" in value:
        raise ValueError(f"{column} is {value!r}; it must be a path relative to the folder")
    # The other half, U+DC80 and so on, is how Python spells the bytes of file names that are no UTF-8.
    if any("\ud800" <= letter <= "\udbff" for letter in value):
        raise ValueError(f"{column} holds half a character ({value!a}); mend what wrote it")
    path = posixpath.normpath(value)
    if path.startswith(("/", "../")) or path == "..":
        raise ValueError(f"{column} {value!r} leaves the folder; paths must stay inside it")
    return path


def _captions(values: dict[str, object], column: str) -> tuple[str, ...] | None:
    value = values.get(column)
    captions = [value] if isinstance(value, str) else value
    if captions is None:
        return None
    if not isinstance(captions, list) or not all(isinstance(caption, str) for caption in captions):
        raise ValueError(f"{column} is {value!r}; it must be a caption or a list of captions")
    check_captions(captions, column)
    return tuple(captions) or None


def check_captions(captions: Sequence[str], where: str) -> None:
    """Raise ValueError for one that no tokenizer can read: JSON may spell half of a character (\\ud83d)."""
    for caption in captions:
        if not _is_text(caption):
            raise ValueError(f"{where} holds half a character ({caption[:40]!a}); mend what wrote it")


def _is_text(string: str) -> bool:
    try:
        string.encode()
    except UnicodeEncodeError:
        return False
    return True


def _label(value: object, from_csv: bool) -> str | int | None:
    if isinstance(value, str) and from_csv and value.isdecimal():
        return int(value)
    if value is None or isinstance(value, str):
        return value
    if isinstance(value, int) and not isinstance(value, bool) and value >= 0:
        return value
    raise ValueError(f"label is {value!r}; it must be a name or a number from 0 on")


def _scan_jsonl(file: Iterable[bytes], on_problem: OnProblem) -> Iterator[tuple[int, int, dict[str, object]]]:
    offset = file.tell()  # type: ignore[attr-defined]
    for number, line in enumerate(file, start=1):
        start, offset = offset, offset + len(line)
        if not line.strip():
            continue
        try:
            values = json.loads(line)
        except (ValueError, RecursionError) as error:
            reason = "it is nested too deeply" if isinstance(error, RecursionError) else str(error)
            on_problem(f"metadata.jsonl line {number}", f"it is not JSON ({reason})")
            continue
        if isinstance(values, dict):
            yield start, number, values
        else:
            on_problem(f"metadata.jsonl line {number}", 'it must be an object such as {"file_name": ..., "text": ...}')


def _state(status: os.stat_result) -> tuple[int, int]:
    return status.st_size, status.st_mtime_ns


def _after_byte_order_mark(start: bytes) -> int:
    return 3 if start == b"\xef\xbb\xbf" else 0
