"""Observers: they are told of the start and the end of every operation on a group."""

from __future__ import annotations

import threading
from dataclasses import dataclass
from typing import Protocol


@dataclass(frozen=True, slots=True, kw_only=True)
class Event:
    """One operation on one rank.

    Attributes:
        op: its name, such as "all_reduce", "send".
        seq: its number in the group.
        group: the group's name.
        rank: this rank in the group.
        global_rank: this rank in the world.
        nbytes: size of this rank's buffer.
        start_s: when it began, in `time.time()` seconds.
        seconds: how long it took; 0.0 at the start.
        thread: name of the thread that carried it out.
        error: class name of the error that ended it, or "".
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
    """Told of each operation, in the thread that carries it out; must be quick, not raise."""

    def started(self, event: Event) -> None:
        """An operation begins."""

    def finished(self, event: Event) -> None:
        """It has ended, well (`error` is "") or badly."""

    def close(self) -> None:
        """The world group closes: write down what is to be kept."""


@dataclass(slots=True)
class Total:
    """What one operation came to on one group: calls, bytes, seconds, and calls that failed."""

    count: int = 0
    nbytes: int = 0
    seconds: float = 0.0
    errors: int = 0


class Metrics:
    """An observer that adds up.

    metrics = Metrics()
    group = ferro.init(observers=[metrics])
    ...
    print(metrics.table())
    """

    def __init__(self) -> None:
        self._totals: dict[tuple[str, str], Total] = {}
        self._lock = threading.Lock()

    def started(self, event: Event) -> None:
        """Do nothing: only what has ended counts."""

    def finished(self, event: Event) -> None:
        """Add an operation."""
        with self._lock:
            total = self._totals.setdefault((event.group, event.op), Total())
            total.count += 1
            total.nbytes += event.nbytes
            total.seconds += event.seconds
            total.errors += bool(event.error)

    def close(self) -> None:
        """Keep everything: it can still be read."""

    def totals(self) -> dict[tuple[str, str], Total]:
        """Return (group, operation) -> its total so far, a copy."""
        with self._lock:
            return {key: Total(t.count, t.nbytes, t.seconds, t.errors) for key, t in self._totals.items()}

    def table(self) -> str:
        """Return the totals as aligned text, the longest first."""
        rows = [("group", "operation", "calls", "MiB", "seconds", "errors")]
        ordered = sorted(self.totals().items(), key=lambda item: -item[1].seconds)
        for (group, op), t in ordered:
            mib = f"{t.nbytes / 2**20:.1f}"
            rows.append((group, op, str(t.count), mib, f"{t.seconds:.3f}", str(t.errors)))
        widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
        return "\n".join(
            "  ".join(
                cell.ljust(width) if i < 2 else cell.rjust(width)
                for i, (cell, width) in enumerate(zip(row, widths, strict=True))
            )
            for row in rows
        )
