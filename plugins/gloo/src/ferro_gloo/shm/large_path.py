"""LargePath: the fast path of collectives that do not fit a slot.

It spares what the ordinary path does before a backend runs: the backend's methods reduce in place, and find this rank's
block in the result of an all_gather, so that the group copies the input first. Here the native helper copies or reduces
each chunk while it is in the caches for its other use. It also spares most of Python's work, which takes several times
longer here than in small calls: the data that a large collective moves puts the interpreter's out of the caches.
Measured with 2 ranks: of 320 us of an all_to_all of 1 MiB, 150 us passed outside of the native helper.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import cast

import numpy as np

from ferro.collectives.fast_path import BUSY, NUMBER, EvenCollective, Turn
from ferro.collectives.reduction import Reduction
from ferro.types import Array
from ferro_gloo.shm import data_movement, reductions
from ferro_gloo.shm.chunked import ChunkedRunner
from ferro_gloo.shm.chunked_operation import ChunkedOperation
from ferro_gloo.shm.kernels import are_apart, is_same
from ferro_gloo.shm.native import NativePlan
from ferro_gloo.shm.slot_ring import SlotRing

_FROM_ALL = ("all_gather", "gather", "all_to_all")  # the target has a block of every rank
_FOR_ALL = ("scatter", "reduce_scatter", "all_to_all")  # the source has a block for every rank


class LargePath:
    """A `FastPath`, with a native plan for arrays that are apart and one for those that are the same.

    Arrays in shared memory, which need no slots, and others that no plan accepts go a longer way, in Python.

    Args:
        runner: runs the operations of the group.
        ring: its slots.
        collective: what to run.
        turn: the order of the group's collectives.
    """

    def __init__(self, runner: ChunkedRunner, ring: SlotRing, collective: EvenCollective, turn: Turn) -> None:
        n, op, nbytes = runner.ranks, collective.op, collective.count * collective.dtype.itemsize
        here = collective.root in (-1, runner.rank)
        self._runner = runner
        self._ring = ring
        self._collective = collective
        self._turn = turn
        self._counts = [collective.count] * n
        self._source_bytes = 0 if op in ("scatter", "broadcast") and not here else nbytes * (n if op in _FOR_ALL else 1)
        self._target_bytes = 0 if op in ("reduce", "gather") and not here else nbytes * (n if op in _FROM_ALL else 1)
        self._plans: dict[str, NativePlan] = {}  # by `_relation`
        self._as_bytes = collective.dtype.isbuiltin != 1  # NumPy exports no buffers of other dtypes

    def __call__(self, source: Array | None, target: Array | None, /) -> bool:
        """See `FastPath`."""
        turn = self._turn
        if turn.state[BUSY] or turn.pending:
            return False
        if self._as_bytes:
            if not self._accepts(source, target):
                return False
            is_same = source is target
            source = None if source is None else source.reshape(-1).view(np.uint8)
            target = source if is_same else None if target is None else target.reshape(-1).view(np.uint8)
        plan = self._plan_for(source, target)
        if plan is None and not (self._as_bytes or self._accepts(source, target)):
            return False
        if not turn.lock.acquire(blocking=False):
            return False
        try:
            if turn.state[BUSY] or turn.pending:  # another thread was quicker
                return False
            turn.state[NUMBER] += 1
            if plan is not None:
                deadlines: list[float] = []
                number = self._runner.run_plan(plan, source, target, partial(self._wait, plan, deadlines))
                if number is not None:
                    self._ring.set_call(self._collective.call)
                    self._late(deadlines, self._runner.finish, self._operation(source, target), number)
            else:
                self._run_in_python(source, target)
        finally:
            turn.lock.release()
        return True

    def bind(self, source: Array | None, target: Array | None, /) -> BoundLargePath | None:
        """See `FastPath`."""
        return BoundLargePath(partial(self, source, target)) if self._accepts(source, target) else None

    def _wait(self, plan: NativePlan, deadlines: list[float], number: int) -> None:
        """Wait for late ranks, or find those that make another call."""
        self._late(deadlines, self._compare if plan.syncing else self._ring.wait, number)

    def _late(self, deadlines: list[float], wait: Callable[..., object], *args: object) -> None:
        """Wait as `Turn.late` does, with the first wait's deadline for all of one collective."""

        def until_the_first(*, deadline: float) -> None:
            deadlines.append(deadline)
            wait(*args, deadline=deadlines[0])

        self._turn.late(self._collective.call, until_the_first)

    def _compare(self, number: int, *, deadline: float) -> None:
        self._ring.complete(self._collective.call, number, number, deadline=deadline)

    def _plan_for(self, source: Array | None, target: Array | None) -> NativePlan | None:
        """Find the plan for these arrays, if there is one."""
        if target is None or source is target:
            plan = self._plans.get("same")
            return plan if plan is not None and plan.accepts(source, target) else None
        for name in ("apart", "block"):
            plan = self._plans.get(name)
            if plan is not None and plan.accepts(source, target):
                return plan
        return None

    def _run_in_python(self, source: Array | None, target: Array | None) -> None:
        """Run the collective, and remember its plan for the next arrays of the same kind."""
        self._ring.set_call(self._collective.call)
        operation = self._operation(source, target)
        self._turn.late(self._collective.call, partial(_run, self._runner, operation))
        kind = "apart"
        if target is None or source is target:
            kind = "same"
        elif source is not None and not are_apart(source, target):
            kind = "block"
        if kind not in self._plans and (kind != "block" or self._collective.op == "all_gather"):
            plan = self._runner.plan(operation, self._collective.call)
            if plan is not None:
                self._plans[kind] = plan

    def _operation(self, source: Array | None, target: Array | None) -> ChunkedOperation:
        """Describe the collective on arrays that were checked."""
        runner, op, counts, root = self._runner, self._collective.op, self._counts, self._collective.root
        dtype = self._collective.dtype
        given = cast("Array", None if source is None else source.reshape(-1).view(dtype))  # where it has one
        result = cast("Array", None if target is None else target.reshape(-1).view(dtype))
        reduction = cast("Reduction", self._collective.reduction)
        if op == "all_reduce":
            return reductions.all_reduce(runner, given, result, reduction)
        if op == "reduce":
            return reductions.reduce(runner, given, result, reduction)
        if op == "reduce_scatter":
            return reductions.reduce_scatter(runner, given, result, counts, reduction)
        if op == "broadcast":
            return data_movement.broadcast(runner, given, result, root)
        if op == "all_gather":
            return data_movement.all_gather(runner, given, result, counts)
        if op == "gather":
            return data_movement.gather(runner, given, result, counts, root)
        if op == "scatter":
            return data_movement.scatter(runner, result, given, counts, root)
        return data_movement.all_to_all(runner, given, result, counts, counts, synchronized=False)

    def _accepts(self, source: Array | None, target: Array | None) -> bool:
        """Say whether these are buffers that this can use; see `FastPath.__call__`."""
        if not self._fits(source, self._source_bytes):
            return False
        op = self._collective.op
        if op == "broadcast" and source is not None and (target is None or target is source):
            return True  # the root has its result already
        if not self._fits(target, self._target_bytes):
            return False
        if target is None or source is None:
            return target is None or target.flags.writeable
        if not target.flags.writeable:
            return False
        if are_apart(source, target):
            return True
        if op == "all_gather":
            return is_same(source, target.reshape(-1)[self._runner.rank * source.size :])
        return is_same(source, target) and source.nbytes == target.nbytes

    def _fits(self, array: Array | None, nbytes: int) -> bool:
        if array is None or nbytes == 0:
            return array is None and nbytes == 0
        flags = array.flags
        same_dtype = array.dtype == self._collective.dtype
        return array.nbytes == nbytes and same_dtype and flags.c_contiguous and flags.aligned


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


def _run(runner: ChunkedRunner, operation: ChunkedOperation, *, deadline: float) -> None:
    runner.run(operation, deadline)
