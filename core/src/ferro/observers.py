"""Observers: objects that are told of the start and the end of every operation on every group.

    metrics = ferro.Metrics()
    group = ferro.init(observers=[metrics])
    ...
    print(metrics.table())

A plugin offers observers for every program by the hook `ferro_observers`.
"""

from __future__ import annotations

import threading
from dataclasses import dataclass, replace
from typing import Protocol


@dataclass(frozen=True, slots=True, kw_only=True)
class Event:
    """The start or the end of one operation on one rank.

    Attributes:
        op: name of the operation, such as "all_reduce" or "send".
        seq: sequence number of the operation in its group.
        group: the group's name.
        rank: this rank in the group.
        global_rank: this rank in the world.
        nbytes: size of this rank's buffer.
        start_s: when the operation began, in `time.time()` seconds.
        seconds: how long the operation took; 0.0 at the start.
        thread: name of the thread that carries the operation out.
        error: class name of the error that ended the operation, or "".
    """

    op: str
    seq: int
    group: str
    rank: int
    global_rank: int
    nbytes: int
    start_s: float
    seconds: float = 0.0
    thread: str = ""
    error: str = ""


class Observer(Protocol):
    """The methods that an observer has.

    ferro calls them in the thread that carries the operation out, so several threads may call at once. They must be
    quick and must not communicate. If one raises, ferro warns, and the operation goes on.
    """

    def started(self, event: Event) -> None:
        """An operation begins."""

    def finished(self, event: Event) -> None:
        """An operation has ended, well (`event.error` is "") or badly."""

    def close(self) -> None:
        """The world group closes: write down what is to be kept."""


@dataclass(slots=True)
class Total:
    """The sums over all calls of one operation on one group; `errors` counts the calls that failed."""

    count: int = 0
    nbytes: int = 0
    seconds: float = 0.0
    errors: int = 0


class Metrics:
    """An observer that adds up calls, bytes, seconds and errors for each group and operation."""

    def __init__(self) -> None:
        self._totals: dict[tuple[str, str], Total] = {}
        self._lock = threading.Lock()

    def started(self, event: Event) -> None:
        """Do nothing: an operation counts when it has ended."""

    def finished(self, event: Event) -> None:
        """Add an operation to the totals."""
        with self._lock:
            total = self._totals.setdefault((event.group, event.op), Total())
            total.count += 1
            total.nbytes += event.nbytes
            total.seconds += event.seconds
            total.errors += bool(event.error)

    def close(self) -> None:
        """Keep the totals: they can still be read."""

    def totals(self) -> dict[tuple[str, str], Total]:
        """Copy the totals so far: (group, operation) -> total."""
        with self._lock:
            return {key: replace(total) for key, total in self._totals.items()}

    def table(self) -> str:
        """Format the totals as an aligned table, the operation that took longest first."""
        rows = [("group", "operation", "calls", "MiB", "seconds", "errors")]
        for (group, op), t in sorted(self.totals().items(), key=lambda item: -item[1].seconds):
            rows.append((group, op, str(t.count), f"{t.nbytes / 2**20:.1f}", f"{t.seconds:.3f}", str(t.errors)))
        widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
        return "\n".join(
            "  ".join(f"{cell:{'<' if i < 2 else '>'}{widths[i]}}" for i, cell in enumerate(row)) for row in rows
        )
