"""Coalescing: many small collectives sent as few large ones."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import pairwise
from types import TracebackType
from typing import TYPE_CHECKING

import numpy as np

from ferro.arrays import Input, InputArray
from ferro.collectives.reduction import ReduceFunction, reduction_for
from ferro.errors import UsageError
from ferro.group.arguments import OutputBuffer
from ferro.types import Array, Device, ReduceOp

if TYPE_CHECKING:
    from ferro.group.process_group import ProcessGroup


class Coalescing:
    """Collects calls until the end of its `with` block, then makes one for each kind.

    Calls are alike when they have the same operation, dtype, and reduction or root. All ranks
    make the same calls in the same order; a difference is a `CollectiveMismatch`. Inputs are read
    when the block ends, and the `Pending` that a call returns has its result then. When the
    block raises, nothing is sent.
    """

    def __init__(self, group: ProcessGroup) -> None:
        self._group = group
        self._kinds: dict[tuple[str, np.dtype, Device, object], list[Pending]] = {}
        self._ended = False

    def all_reduce(
        self, x: Input, op: ReduceOp | str | ReduceFunction = ReduceOp.SUM, *, out: object = None
    ) -> Pending:
        """See `ProcessGroup.all_reduce`."""
        entry = self._group._enter(x)
        reduction_for(op, entry.array.dtype, self._group.world_size)  # refuses now, not at the end
        return self._add("all_reduce", op, entry, out)

    def broadcast(self, x: Input, root: int = 0, *, out: object = None) -> Pending:
        """See `ProcessGroup.broadcast`."""
        self._group._check_rank(root, "root")
        return self._add("broadcast", root, self._group._enter(x), out)

    def _add(self, op: str, how: object, entry: InputArray, out: object) -> Pending:
        if self._ended:
            raise UsageError("this coalesce() block has ended: open a new one")
        pending = Pending(entry, OutputBuffer(entry, out, entry.array.shape))
        kind = (op, entry.array.dtype, entry.device, how)
        self._kinds.setdefault(kind, []).append(pending)
        return pending

    def __enter__(self) -> Coalescing:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._ended = True
        if error is not None:
            return
        for (op, _, _, how), several in self._kinds.items():
            ends = np.cumsum([0, *(pending.source.size for pending in several)])
            together = self._memory(several, int(ends[-1]))
            views = [together[start:end] for start, end in pairwise(ends)]
            for view, pending in zip(views, several, strict=True):
                view[...] = pending.source.reshape(-1)
            shapes = ";".join("x".join(map(str, pending.source.shape)) for pending in several)
            self._group._coalesced(op, how, together, shapes)  # type: ignore[arg-type]
            for view, pending in zip(views, several, strict=True):
                pending.land(view)

    def _memory(self, several: Sequence[Pending], count: int) -> Array:
        """Return memory for them together, where they are."""
        entry = several[0].entry
        if entry.device is Device.CPU:
            return self._group.empty(count, entry.array.dtype)
        return entry.empty((count,))


class Pending:
    """The result of a coalesced call, once its block has ended."""

    def __init__(self, entry: InputArray, outlet: OutputBuffer) -> None:
        self.entry = entry
        self.source = entry.array
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
