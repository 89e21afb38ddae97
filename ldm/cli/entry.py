"""The way from a command to its exit code: bad input is one line and 2, everything unexpected keeps its traceback."""

from __future__ import annotations

import argparse
import os
import signal
import sys
from collections.abc import Callable
from pathlib import Path
from typing import NoReturn

from ldm.errors import UserError

EXIT_USER_ERROR = 2


def run_command(name: str, command: Callable[[], int | None]) -> int:
    """Run `command` and return the exit code of the process.

    `UserError` and `OSError` (missing file, full or read-only disk) print one line to stderr and give 2; Ctrl-C gives
    130. `LDM_TRACEBACK=1` keeps the traceback of user errors too.
    """
    try:
        return command() or 0
    except (UserError, OSError) as error:
        if os.environ.get("LDM_TRACEBACK"):
            raise
        if isinstance(error, BrokenPipeError):
            # The reader of our output has gone (`ldm ... | head`): leave quietly, as other tools do.
            sys.stdout = open(os.devnull, "w")  # noqa: PTH123, SIM115 - lives until exit
            return 128 + signal.SIGPIPE
        print(f"{name}: {_one_line(error)}", file=sys.stderr)
        return EXIT_USER_ERROR
    except KeyboardInterrupt:
        print(f"{name}: stopped", file=sys.stderr)
        return 128 + signal.SIGINT


def run_training(name: str, description: str | None, train: Callable[[Path, list[str]], int | None]) -> int:
    """The command line of both training scripts: CONFIG key.sub=value ..."""
    parser = Parser(prog=name, description=description)
    parser.add_argument("config", type=Path, help="a YAML file, see configs/; or RUN/failure/step-N, to replay it")
    parser.add_argument("overrides", nargs="*", metavar="key.sub=value", help="replace single values of the config")
    arguments = parser.parse_args()
    return run_command(name, lambda: train(arguments.config, arguments.overrides))


class Parser(argparse.ArgumentParser):
    """Says what is wrong with the command line in one line, like all else; `--help` shows the options."""

    def error(self, message: str) -> NoReturn:
        self.exit(EXIT_USER_ERROR, f"{self.prog}: {message}; {self.prog} --help tells its options\n")


def check_out_folder(out: Path) -> None:
    """Raise `UserError` now, and not after minutes of work, if `--out` can be no folder to write into."""
    existing = next(path for path in [out, *out.absolute().parents] if path.exists())
    if not existing.is_dir():
        raise UserError(f"--out {out}: found the file {existing}; allowed is a folder; choose another name")
    if not os.access(existing, os.W_OK):
        raise UserError(f"--out {out}: {existing} cannot be written to; choose another folder")


def printable(text: str) -> str:
    """Escape line breaks, orders to the terminal and bytes that are no UTF-8, which names in strangers' files hold."""
    return "".join(sign if sign.isprintable() else ascii(sign)[1:-1] for sign in text)


def _one_line(error: UserError | OSError) -> str:
    text = str(error)
    if isinstance(error, OSError) and error.strerror:
        place = f"{error.filename}: " if error.filename else ""
        text = f"{place}{error.strerror}"
    return printable(" ".join(text.split()))
