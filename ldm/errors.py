"""What the user can mend is a `UserError`: one line, exit code 2, no traceback."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager


class UserError(Exception):
    """Bad input. The message is one line: what was found, what is allowed, how to mend it."""


@contextmanager
def user_input(what: str, *exceptions: type[Exception]) -> Iterator[None]:
    """Turn the exceptions that a leaf package or a library raises for bad input into one `UserError` about `what`.

    With no exceptions named, `ValueError` and `OSError` are turned.
    """
    turned = exceptions or (ValueError, OSError)
    try:
        yield
    except turned as error:
        reason = " ".join(_told(error, what).split()) or type(error).__name__
        raise UserError(f"{what}: {reason}") from error


def _told(error: Exception, what: str) -> str:
    """The error in words: of the system's own neither the number nor a file that `what` names already."""
    if not isinstance(error, OSError) or not error.strerror:
        return str(error)
    named = error.filename is not None and str(error.filename) not in what
    return f"{error.strerror}: {error.filename}" if named else error.strerror
