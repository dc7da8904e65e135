"""RowExchange: an all_to_all under way, whose sizes the ranks may have to tell each other."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from ferro.arrays import Entry
from ferro.backend import Backend
from ferro.errors import CollectiveMismatch
from ferro.shapes import Outlet, concatenated, flat


class RowExchange:
    """An all_to_all under way: its result's shape may be known only when the sizes have come."""

    def __init__(
        self,
        backend: Backend,
        entry: Entry,
        sending: list[int],
        expected: list[int] | None,
        out: object,
        *,
        async_op: bool,
    ) -> None:
        self._backend = backend
        self._entry = entry
        self._sending = sending
        self._expected = expected
        self._out = out
        self._result: Outlet | None = None
        self._source = flat(entry.array, private=async_op)
        if expected is not None:
            self._allocate(expected)

    def run(self, deadline: float) -> None:
        """Move the rows; as many come from each rank as go to it."""
        self._move(self._sending, deadline)

    def run_uneven(self, deadline: float) -> None:
        """Tell each other the sizes, hold them against what was expected, move the rows."""
        n = self._backend.world_size
        told = np.empty(n, np.int64)
        ones = [1] * n
        self._backend.all_to_all(np.array(self._sending), told, ones, ones, deadline=deadline)
        receiving = told.tolist()
        if self._expected is None:
            self._allocate(receiving)
        elif receiving != self._expected:
            rank = self._backend.rank
            peer = next(r for r in range(n) if receiving[r] != self._expected[r])
            raise CollectiveMismatch(
                f"rank {peer} sends {receiving[peer]} rows to rank {rank} in all_to_all; "
                f"rank {rank} expects {self._expected[peer]}",
                peer=peer,
            )
        self._move(receiving, deadline)

    def __call__(self) -> object:
        """Return the result as the caller expects it."""
        assert self._result is not None, "the operation has not run"
        return self._result()

    def _allocate(self, receiving: Sequence[int]) -> None:
        shape, _ = concatenated(self._entry.array, receiving)
        self._result = Outlet(self._entry, self._out, shape)
        if self._out is not None and np.may_share_memory(self._source, self._result.flat):
            self._source = self._source.copy()  # rows would arrive before others have left

    def _move(self, receiving: Sequence[int], deadline: float) -> None:
        assert self._result is not None, "allocated when the sizes were known"
        _, send_counts = concatenated(self._entry.array, self._sending)
        _, recv_counts = concatenated(self._entry.array, receiving)
        self._backend.all_to_all(
            self._source, self._result.flat, send_counts, recv_counts, deadline=deadline
        )
