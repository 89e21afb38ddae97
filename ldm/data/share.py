"""How several processes share a piece of work."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass


@dataclass(frozen=True)
class Share:
    """Which part of the work is this process's, and how it waits for the others."""

    rank: int = 0
    processes: int = 1
    wait: Callable[[], None] = lambda: None

    def of(self, length: int) -> range:
        """A run of neighbouring indices, so that each process writes its own pages."""
        return range(self.rank * length // self.processes, (self.rank + 1) * length // self.processes)
