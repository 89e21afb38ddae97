"""Samples that could not be used in training: written down, counted, and too many of them stop the run."""

from __future__ import annotations

import json
from collections.abc import Iterable
from pathlib import Path

from ldm.errors import UserError, user_input


class Quarantine:
    """The file `path` with one JSON object {"key", "reason"} a line; lines of an interrupted run are taken over.

    With several processes all record what all have found, and one of them writes.
    """

    def __init__(self, path: Path, allowed_share: float, dataset_length: int, *, writes: bool = True) -> None:
        self.path = path
        self._writes = writes
        self.allowed_share = allowed_share
        self.dataset_length = dataset_length
        self.keys: set[str] = set()
        if path.exists():
            with user_input(str(path)):
                lines = path.read_text(encoding="utf-8").split("\n")
                # A run killed while it wrote leaves a last line without an end: that one is found again.
                self.keys = {json.loads(line)["key"] for line in lines[:-1] if line}
                if lines[-1] and writes:
                    path.write_text("".join(line + "\n" for line in lines[:-1]), encoding="utf-8")

    def __len__(self) -> int:
        return len(self.keys)

    def record(self, bad: Iterable[tuple[str, str]]) -> None:
        """Add (key, reason) pairs; a key counts once. Raises `UserError` once more than the allowed share is bad."""
        new = {key: reason for key, reason in bad if key not in self.keys}
        if not new:
            return
        if self._writes:
            with self.path.open("a", encoding="utf-8") as file:
                file.writelines(json.dumps({"key": key, "reason": reason}) + "\n" for key, reason in new.items())
        self.keys.update(new)
        if len(self.keys) > self.allowed_share * self.dataset_length:
            key, reason = next(iter(new.items()))
            raise UserError(
                f"{len(self.keys)} of {self.dataset_length} samples cannot be used (last {key}: {reason}), more than "
                f"data.max_bad_share {self.allowed_share:g} allows; {self.path} lists them: mend or remove them and "
                "delete that file, or raise data.max_bad_share"
            )
