"""LargePath: the fast path of collectives that do not fit a slot.

It spares what the ordinary path does before a backend runs: the backend's methods reduce in place, and find this rank's
block in the result of an all_gather, so that the group copies the input first. Here the native helper copies or reduces
it chunk by chunk, while it is in the caches for its other use.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import cast

import numpy as np

from ferro.collectives.fast_path import BUSY, NUMBER, EvenCollective, Turn
from ferro.collectives.label import Call
from ferro.collectives.reduction import Reduction
from ferro.types import Array
from ferro_gloo.shm import data_movement, reductions
from ferro_gloo.shm.arena import address_of
from ferro_gloo.shm.chunked import ChunkedRunner

_FROM_ALL = ("all_gather", "gather", "all_to_all")  # the target has a block of every rank
_FOR_ALL = ("scatter", "reduce_scatter", "all_to_all")  # the source has a block for every rank
_REDUCED_WHOLE = ("all_reduce", "reduce")


class LargePath:
    """A `FastPath`, which runs in Python but for its chunks.

    Args:
        runner: runs the operations of the group.
        collective: what to run.
        turn: the order of the group's collectives.
        set_call: told of the call before each operation.
    """

    def __init__(
        self, runner: ChunkedRunner, collective: EvenCollective, turn: Turn, set_call: Callable[[Call], None]
    ) -> None:
        n, op, nbytes = runner.ranks, collective.op, collective.count * collective.dtype.itemsize
        here = collective.root in (-1, runner.rank)
        self._runner = runner
        self._collective = collective
        self._turn = turn
        self._set_call = set_call
        self._counts = [collective.count] * n
        self._source_bytes = 0 if op in ("scatter", "broadcast") and not here else nbytes * (n if op in _FOR_ALL else 1)
        self._target_bytes = 0 if op in ("reduce", "gather") and not here else nbytes * (n if op in _FROM_ALL else 1)

    def __call__(self, source: Array | None, target: Array | None, /) -> bool:
        """See `FastPath`."""
        turn = self._turn
        if turn.state[BUSY] or turn.pending or not self._accepts(source, target):
            return False
        if not turn.lock.acquire(blocking=False):
            return False
        try:
            if turn.state[BUSY] or turn.pending:  # another thread was quicker
                return False
            turn.state[NUMBER] += 1
            self._set_call(self._collective.call)
            given = None if source is None else source.reshape(-1)
            result = None if target is None else target.reshape(-1)
            if given is not None and result is not None and _is_in_place(given, result):
                result = given
            turn.late(self._collective.call, partial(self._run, given, result))
        finally:
            turn.lock.release()
        return True

    def bind(self, source: Array | None, target: Array | None, /) -> BoundLargePath | None:
        """See `FastPath`."""
        return BoundLargePath(partial(self, source, target)) if self._accepts(source, target) else None

    def _run(self, source: Array | None, target: Array | None, *, deadline: float) -> None:
        """Run the collective on arrays that were checked."""
        runner, op, reduction = self._runner, self._collective.op, self._collective.reduction
        counts, root = self._counts, self._collective.root
        given, result = cast("Array", source), cast("Array", target)  # where the collective has them
        if op == "all_reduce":
            reductions.all_reduce(runner, given, result, cast("Reduction", reduction), deadline)
        elif op == "reduce":
            reductions.reduce(runner, given, target, cast("Reduction", reduction), root, deadline)
        elif op == "reduce_scatter":
            reductions.reduce_scatter(runner, given, result, counts, cast("Reduction", reduction), deadline)
        elif op == "broadcast":
            data_movement.broadcast(runner, result if source is None else source, result, root, deadline)
        elif op == "all_gather":
            data_movement.all_gather(runner, given, result, counts, deadline)
        elif op == "gather":
            data_movement.gather(runner, given, target, counts, root, deadline)
        elif op == "scatter":
            data_movement.scatter(runner, result, source, counts, root, deadline)
        else:
            data_movement.all_to_all(runner, given, result, counts, counts, deadline, synchronized=False)

    def _accepts(self, source: Array | None, target: Array | None) -> bool:
        """Say whether these are buffers that this can use; see `FastPath.__call__`."""
        if not self._fits(source, self._source_bytes) or not self._fits(target, self._target_bytes):
            return False
        if target is None or source is None:
            return target is None or target.flags.writeable
        if not target.flags.writeable:
            return False
        op, own, start = self._collective.op, address_of(source), address_of(target)
        if own + source.nbytes <= start or start + target.nbytes <= own:
            # Where the ranks reduce in place in shared memory, they do it in the target.
            return op != "all_reduce" or not self._runner.is_shared(source)
        if op == "all_gather":
            start += self._runner.rank * source.nbytes
            return own == start
        return own == start and op in (*_REDUCED_WHOLE, "broadcast")

    def _fits(self, array: Array | None, nbytes: int) -> bool:
        if array is None:
            return nbytes == 0
        if nbytes == 0:
            return False
        flags = array.flags
        return (
            array.nbytes == nbytes
            and array.dtype == self._collective.dtype
            and flags.c_contiguous
            and flags.aligned
            and isinstance(array, np.ndarray)
        )


class BoundLargePath:
    """A `BoundFastPath` that does not begin before it is waited for: the ordinary path starts what runs beside others.

    Args:
        run: runs the collective, or returns False, having done nothing.
    """

    def __init__(self, run: Callable[[], bool]) -> None:
        self._run = run

    def __call__(self) -> bool:
        """See `BoundFastPath`."""
        return self._run()

    def start(self) -> bool:
        """See `BoundFastPath`; decline."""
        return False

    def test(self) -> bool:
        """See `BoundFastPath`; nothing was started."""
        raise AssertionError("nothing was started")

    def finish(self) -> None:
        """See `BoundFastPath`; nothing was started."""
        raise AssertionError("nothing was started")

    def close(self) -> None:
        """See `BoundFastPath`."""
        del self._run


def _is_in_place(source: Array, target: Array) -> bool:
    return source.nbytes == target.nbytes and address_of(source) == address_of(target)
