"""Shards: all that is in pieces of one unit; Gathered: the whole, while somebody holds it."""

from __future__ import annotations

import weakref
from collections.abc import Sequence

from ferro import Work

from .flat import Flat
from .memory import Loan


class Gathered:
    """The parameters of a unit, whole; dropping it frees the memory."""

    def __init__(self, flats: Sequence[Flat]) -> None:
        # What is under way, and what is sent by it.
        self._works: list[tuple[Work[object], Loan]] = []
        self._is_filled = True
        self._flats = flats
        self._loans = [flat.lend() for flat in flats]

    def launch(self) -> None:
        """Start to gather."""
        for flat, loan in zip(self._flats, self._loans, strict=True):
            work = flat.gather(loan.array)
            if work is not None:
                self._works.append(work)

    def wait(self) -> None:
        """Return when everything is there."""
        for work, _ in self._works:
            work.wait()
        self._works = []
        self._is_filled = True

    def open(self, *, backward: bool, defers: bool = False) -> None:
        """Let the parameters be whole: see `Flat.open`."""
        for flat, loan in zip(self._flats, self._loans, strict=True):
            flat.open(loan.array, backward=backward, defers=defers)

    def close(self) -> None:
        """Let the parameters be pieces again."""
        for flat in self._flats:
            if flat.is_open:
                flat.close()

    def __del__(self) -> None:
        if not self._is_filled:  # failed, or nobody waited: it may still come in
            for loan in (*self._loans, *(sent for _, sent in self._works)):
                loan.forfeit()


class Shards:
    """A unit as the passes see it.

    Attributes:
        index: its number, in definition order; the same on every rank.
        name: its module's qualified name.
        flats: its parameters.
    """

    def __init__(self, index: int, name: str, flats: Sequence[Flat]) -> None:
        self.index = index
        self.name = name
        self.flats = tuple(flats)
        self.trained = tuple(flat for flat in self.flats if flat.trained)
        self._last: weakref.ref[Gathered] | None = None

    def launch(self) -> Gathered:
        """Start to gather, into memory that is held for an earlier pass if there is such."""
        gathered = None if self._last is None else self._last()
        if gathered is None:
            gathered = Gathered(self.flats)
            self._last = weakref.ref(gathered)
        gathered.launch()
        return gathered

    @property
    def is_open(self) -> bool:
        """Whether its parameters are whole at the moment."""
        return any(flat.is_open for flat in self.flats)

    @property
    def has_added(self) -> bool:
        """Whether whole gradients are waiting to be reduced."""
        return any(flat.whole_grad.has_added for flat in self.trained)
