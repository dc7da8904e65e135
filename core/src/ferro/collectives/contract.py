"""What each collective starts with and ends with: the table of `schedule.py`, as values."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import TypeAlias

Place: TypeAlias = Callable[[int, int, int, int], range]
"""`place(rank, world_size, root, chunks)`: the chunks that a rank has, at the start or the end."""


@dataclass(frozen=True, slots=True)
class Contract:
    """The contract of one collective.

    Attributes:
        reduces: whether the ranks' chunks are contributions to be combined.
        start: the chunks that a rank holds when the collective begins.
        end: the chunks that a rank must hold, complete, when it ends.
        chunks: how many chunks a schedule has, given the world size; None: any number from 1 on.
    """

    reduces: bool
    start: Place
    end: Place
    chunks: Callable[[int], int] | None = None


def _all(rank: int, world_size: int, root: int, chunks: int) -> range:
    return range(chunks)


def _all_at_root(rank: int, world_size: int, root: int, chunks: int) -> range:
    return range(chunks) if rank == root else range(0)


def _own(rank: int, world_size: int, root: int, chunks: int) -> range:
    return range(rank, rank + 1)


def _row(rank: int, world_size: int, root: int, chunks: int) -> range:
    return range(rank * world_size, (rank + 1) * world_size)


def _column(rank: int, world_size: int, root: int, chunks: int) -> range:
    return range(rank, world_size * world_size, world_size)


def _one_each(world_size: int) -> int:
    return world_size


def _one_each_pair(world_size: int) -> int:
    return world_size * world_size


def _none(world_size: int) -> int:
    return 0


CONTRACTS = {
    "all_reduce": Contract(True, _all, _all),
    "reduce": Contract(True, _all, _all_at_root),
    "broadcast": Contract(False, _all_at_root, _all),
    "all_gather": Contract(False, _own, _all, _one_each),
    "gather": Contract(False, _own, _all_at_root, _one_each),
    "scatter": Contract(False, _all_at_root, _own, _one_each),
    "reduce_scatter": Contract(True, _all, _own, _one_each),
    "all_to_all": Contract(False, _row, _column, _one_each_pair),
    "barrier": Contract(False, _all, _all, _none),
}
