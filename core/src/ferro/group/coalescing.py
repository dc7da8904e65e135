"""Coalescing: many small collectives sent as few large ones."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import numpy as np

from ferro.arrays import Input, InputArray
from ferro.collectives.label import Call
from ferro.collectives.partition import blocks
from ferro.collectives.reduction import reduction_for
from ferro.errors import UsageError
from ferro.group.arguments import OutputBuffer
from ferro.group.array_collectives import ArrayCollectives
from ferro.group.array_operations import Op, no_result
from ferro.types import Array, Device, ReduceOp


class Coalescing:
    """Collects calls until the end of its `with` block, then runs one collective for each kind.

    Calls are of one kind when they have the same operation, dtype, and reduction or root. All ranks make the same calls
    in the same order; a difference is a `CollectiveMismatch`. Inputs are read when the block ends, and the
    `CoalescedResult` that a call returns has its result then. When the block raises, nothing is sent.
    """

    def __init__(self, group: ArrayCollectives) -> None:
        self._group = group
        self._kinds: dict[tuple[str, Any, np.dtype, Device], list[CoalescedResult]] = {}
        self._ended = False

    def all_reduce(self, x: Input, op: Op = ReduceOp.SUM, *, out: object = None) -> CoalescedResult:
        """See `ProcessGroup.all_reduce`."""
        input_array = self._group._check_input(x)
        reduction = reduction_for(op, input_array.array.dtype, self._group.world_size)  # refuses now, not at the end
        return self._add("all_reduce", reduction.op or op, input_array, out)

    def broadcast(self, x: Input, root: int = 0, *, out: object = None) -> CoalescedResult:
        """See `ProcessGroup.broadcast`."""
        self._group._check_rank(root, "root")
        return self._add("broadcast", int(root), self._group._check_input(x), out)

    def _add(self, op: str, op_or_root: object, input_array: InputArray, out: object) -> CoalescedResult:
        if self._ended:
            raise UsageError("this coalesce() block has ended: open a new one")
        array = input_array.array
        result = CoalescedResult(input_array, OutputBuffer(input_array, out, array.shape))
        self._kinds.setdefault((op, op_or_root, array.dtype, input_array.device), []).append(result)
        return result

    def __enter__(self) -> Coalescing:
        return self

    def __exit__(self, kind: object, error: BaseException | None, trace: object) -> None:
        self._ended = True
        if error is not None:
            return
        with self._group._dispatcher.sequence("coalesce", None) as remaining_s:
            self._run_all(remaining_s)

    def _run_all(self, remaining_s: Callable[[], float]) -> None:
        for (op, op_or_root, dtype, device), results in self._kinds.items():
            sources = [result.input_array.array for result in results]
            sizes = [source.size for source in sources]
            on_cpu = device is Device.CPU
            buffer = self._group.empty(sum(sizes), dtype) if on_cpu else results[0].input_array.empty((sum(sizes),))
            views = blocks(buffer, sizes)
            for view, source in zip(views, sources, strict=True):
                view[...] = source.reshape(-1)
            shapes = ";".join("x".join(map(str, source.shape)) for source in sources)
            remaining_s()
            self._run(op, op_or_root, buffer, device, f"shapes {shapes}")
            for view, result in zip(views, results, strict=True):
                result.buffer.flat[...] = view
                result.complete = True

    def _run(self, op: str, op_or_root: Any, buffer: Array, device: Device, detail: str) -> None:
        """Run one collective in place for many calls, which `detail` names."""
        backend = self._group._backend
        if op == "all_reduce":
            reduction = reduction_for(op_or_root, buffer.dtype, self._group.world_size)
            call = Call(op, 0, buffer.dtype.name, buffer.size, reduction.name, detail=detail)
            action = partial(backend.all_reduce, buffer, reduction)
        else:
            call = Call(op, 0, buffer.dtype.name, buffer.size, root=op_or_root, detail=detail)
            action = partial(backend.broadcast, buffer, op_or_root)
        self._group._dispatcher.collective(call, action, no_result, buffer.nbytes, device, False, None)


class CoalescedResult:
    """The result of a coalesced call, once its block has ended."""

    def __init__(self, input_array: InputArray, buffer: OutputBuffer) -> None:
        self.input_array = input_array
        self.buffer = buffer
        self.complete = False

    def result(self) -> object:
        """Return the result as the caller's own kind of array, or `out`."""
        if not self.complete:
            raise UsageError("the result is there when the coalesce() block has ended")
        return self.buffer()
