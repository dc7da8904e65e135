"""RowExchange: an uneven all_to_all under way, whose ranks tell each other the sizes first."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from ferro.arrays import Entry
from ferro.backend import Backend
from ferro.errors import CollectiveMismatch, UsageError
from ferro.layout import Layout
from ferro.shapes import Outlet, flat


class RowExchange:
    """An uneven all_to_all: its result's shape may be known only when the sizes have come."""

    def __init__(
        self,
        backend: Backend,
        entry: Entry,
        sending: Layout,
        expected: tuple[int, ...] | None,
        out: object,
        *,
        private: bool,
    ) -> None:
        """Prepare to send the blocks of `entry` as `sending` says, or, if `private`, of a copy.

        Raises:
            UsageError: the rows that are expected contradict those that are sent, or `out`.
        """
        self._backend = backend
        self._entry = entry
        self._sending = sending
        self._out = out
        self._source = flat(entry.array, private=private)
        self._arrival: tuple[Outlet, Layout] | None = None  # where what rows go, once known
        if expected is not None:
            own = sending.rows[backend.rank]
            if expected[backend.rank] != own:
                raise UsageError(
                    f"all_to_all: rank {backend.rank} sends itself {own} rows but receives "
                    f"{expected[backend.rank]}",
                    op="all_to_all",
                )
            self._prepare(expected)

    def run(self, deadline: float) -> None:
        """Tell each other the sizes, hold them against what was expected, move the rows."""
        rows = self._sizes_told(deadline)
        result, receiving = self._arrival or self._prepare(rows)
        if rows != receiving.rows:
            raise self._mismatch(rows, receiving.rows)
        self._backend.all_to_all(
            self._source, result.flat, self._sending.counts, receiving.counts, deadline=deadline
        )

    def __call__(self) -> object:
        """Return the result as the caller expects it."""
        assert self._arrival is not None, "the operation has not run"
        return self._arrival[0]()

    def _sizes_told(self, deadline: float) -> tuple[int, ...]:
        """Return the rows that come from every rank."""
        n = self._backend.world_size
        telling, told = np.array(self._sending.rows, np.int64), np.empty(n, np.int64)
        ones = (1,) * n
        self._backend.all_to_all(telling, told, ones, ones, deadline=deadline)
        return tuple(told.tolist())

    def _prepare(self, rows: Sequence[int]) -> tuple[Outlet, Layout]:
        """Make room for so many rows from every rank."""
        receiving = Layout.of(rows, self._sending.shape[1:])
        result = Outlet(self._entry, self._out, receiving.shape)
        self._source = result.apart(self._source)  # rows arrive before others have left
        self._arrival = result, receiving
        return self._arrival

    def _mismatch(self, told: Sequence[int], expected: Sequence[int]) -> CollectiveMismatch:
        rank = self._backend.rank
        peer = next(r for r in range(len(told)) if told[r] != expected[r])
        return CollectiveMismatch(
            f"rank {peer} sends {told[peer]} rows to rank {rank} in all_to_all; "
            f"rank {rank} expects {expected[peer]}",
            peer=peer,
        )
