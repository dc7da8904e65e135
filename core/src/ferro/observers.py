"""What observers are told of: the start and the end of every operation on a group."""

from __future__ import annotations

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
