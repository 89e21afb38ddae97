"""One run a folder: two that wrote into it would ruin each other's checkpoints and log."""

from __future__ import annotations

import fcntl
import os
from pathlib import Path
from typing import TextIO

from ldm.errors import UserError
from ldm.files import writing


def lock_folder(folder: Path) -> TextIO:
    """Claim `folder` for this process for as long as the returned file is open; the system ends it with the process.

    The lock is POSIX' (lockf), which worker processes do not inherit, so they cannot keep it after a kill. Raises
    `UserError` naming the process that has it.
    """
    path = folder / ".lock"
    with writing(path):
        file = path.open("a+", encoding="utf-8")
    try:
        fcntl.lockf(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except (BlockingIOError, PermissionError):
        file.seek(0)
        owner = file.read().strip() or "unknown"
        raise UserError(
            f"{folder}: process {owner} is training in this folder; allowed is one run a folder; "
            "wait until it ends, or give out=ANOTHER_FOLDER"
        ) from None
    with writing(path):
        file.truncate(0)
        file.write(f"{os.getpid()}\n")
        file.flush()
    return file
