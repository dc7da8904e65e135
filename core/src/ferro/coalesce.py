"""Coalescing: many small collectives sent as few large ones."""

from __future__ import annotations

from collections.abc import Callable
from itertools import pairwise
from types import TracebackType
from typing import TYPE_CHECKING

import numpy as np

from ferro.arrays import Array, Entry, Input
from ferro.errors import UsageError
from ferro.reduction import ReduceFunction, reduction_for
from ferro.shapes import Outlet
from ferro.types import ReduceOp

if TYPE_CHECKING:
    from ferro.group import ProcessGroup


class Coalescing:
    """Collects calls until the end of its `with` block, then makes one for each kind.

    Calls are alike when they have the same operation, dtype, and reduction or root. All ranks
    make the same calls in the same order. The `Pending` that a call returns has its result once
    the block has ended; when the block raises, nothing is sent.
    """

    def __init__(self, group: ProcessGroup, enter: Callable[[Input], Entry]) -> None:
        self._group = group
        self._enter = enter
        self._kinds: dict[tuple[object, ...], list[Pending]] = {}
        self._ended = False

    def all_reduce(
        self, x: Input, op: ReduceOp | str | ReduceFunction = ReduceOp.SUM, *, out: object = None
    ) -> Pending:
        """See `ProcessGroup.all_reduce`."""
        entry = self._enter(x)
        reduction_for(op, entry.array.dtype, self._group.world_size)  # refuses now, not at the end
        return self._add(("all_reduce", entry.array.dtype, op), entry, out)

    def broadcast(self, x: Input, root: int = 0, *, out: object = None) -> Pending:
        """See `ProcessGroup.broadcast`."""
        entry = self._enter(x)
        return self._add(("broadcast", entry.array.dtype, root), entry, out)

    def _add(self, kind: tuple[object, ...], entry: Entry, out: object) -> Pending:
        if self._ended:
            raise UsageError("this coalesce() block has ended: open a new one")
        pending = Pending(entry.array, Outlet(entry, out, entry.array.shape))
        self._kinds.setdefault(kind, []).append(pending)
        return pending

    def __enter__(self) -> Coalescing:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self._ended = True
        if error is not None:
            return
        for (name, dtype, how), several in self._kinds.items():
            call: Callable[..., object] = getattr(self._group, str(name))
            sizes = [pending.source.size for pending in several]
            together = self._group.empty(sum(sizes), dtype)  # type: ignore[arg-type]
            starts = np.cumsum([0, *sizes])
            views = [together[a:b] for a, b in pairwise(starts)]
            for view, pending in zip(views, several, strict=True):
                view[...] = pending.source.reshape(-1)
            call(together, how, out=together)
            for view, pending in zip(views, several, strict=True):
                pending.land(view)


class Pending:
    """The result of a coalesced call, once its block has ended."""

    def __init__(self, source: Array, outlet: Outlet) -> None:
        self.source = source
        self._outlet = outlet
        self._landed = False

    def land(self, value: Array) -> None:
        """Take the result in."""
        self._outlet.flat[...] = value
        self._landed = True

    def result(self) -> object:
        """Return the result."""
        if not self._landed:
            raise UsageError("the result is there when the coalesce() block has ended")
        return self._outlet()
