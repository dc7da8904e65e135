"""The operations behind the collectives on arrays: argument checks, shapes, `out` and copies, once for all backends."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial
from typing import TYPE_CHECKING, TypeAlias, cast

import numpy as np

from ferro.arrays import Input
from ferro.backend import Backend
from ferro.collectives.label import Call, array_call, uneven_call
from ferro.collectives.reduction import ReduceFunction, reduction_for
from ferro.errors import UsageError
from ferro.group import uneven
from ferro.group.arguments import ArgumentChecker, OutputBuffer, Reads, copy_elements, flattened
from ferro.types import Array, Device, ReduceOp

if TYPE_CHECKING:
    from ferro.group.dispatcher import Action, Finish

Op: TypeAlias = "ReduceOp | str | ReduceFunction"

# What `Dispatcher.collective` runs: the call, without its number; what moves the data; what makes the caller's result;
# the size of this rank's data in bytes; the device. A tuple, since a class would cost each call a third of a
# microsecond.
Operation: TypeAlias = "tuple[Call, Action, Finish, int, Device]"


BARRIER = Call("barrier")


class ArrayOperations:
    """Prepares the operations of one group; `ArrayCollectives` describes the arguments."""

    def __init__(self, backend: Backend, checker: ArgumentChecker) -> None:
        self._backend = backend
        self._rank = backend.rank
        self._world_size = backend.world_size
        self._checker = checker

    def barrier(self) -> Operation:
        return BARRIER, self._backend.barrier, no_result, 0, Device.CPU

    def all_reduce(self, x: Input, op: Op, out: object, reads: Reads = Reads.NOW) -> Operation:
        buffer, dtype, shape, device, finish, copy = self._checker.result_buffer(x, out, reads)
        reduction = reduction_for(op, dtype, self._world_size)
        call = array_call("all_reduce", dtype, shape, reduction.name)
        action = partial(self._backend.all_reduce, buffer, reduction)
        return call, _after_copy(copy, action), finish, buffer.nbytes, device

    def reduce(self, x: Input, root: int, op: Op, out: object, reads: Reads = Reads.NOW) -> Operation:
        self._checker.check_rank(root, "root")
        at_root = self._rank == root
        out = out if at_root else None
        buffer, dtype, shape, device, finish, copy = self._checker.result_buffer(x, out, reads)
        reduction = reduction_for(op, dtype, self._world_size)
        call = array_call("reduce", dtype, shape, reduction.name, root)
        action = partial(self._backend.reduce, buffer, reduction, root)
        return call, _after_copy(copy, action), finish if at_root else no_result, buffer.nbytes, device

    def broadcast(self, x: Input, root: int, out: object, reads: Reads = Reads.NOW) -> Operation:
        self._checker.check_rank(root, "root")
        if x is None:
            raise UsageError(
                "broadcast: every rank must give an array of the root's shape and dtype, and this one gives None: "
                "pass np.empty(shape, dtype), or use broadcast_object, which needs nothing but the root's value",
                op="broadcast",
            )
        at_root = self._rank == root
        buffer, dtype, shape, device, finish, copy = self._checker.result_buffer(x, out, reads, at_root, moved=True)
        call = array_call("broadcast", dtype, shape, root=root)
        action = partial(self._backend.broadcast, buffer, root)
        return call, _after_copy(copy, action), finish, buffer.nbytes, device

    def all_gather(self, x: Input, sizes: tuple[int, ...] | None, out: object, reads: Reads = Reads.NOW) -> Operation:
        """Prepare an all_gather of blocks with these rows; equal ones when None."""
        input_array = self._checker.check_input(x, moved=True)
        array = input_array.array
        layout = uneven.gathered_layout(array.shape, sizes, self._rank, self._world_size)
        result = OutputBuffer(input_array, out, layout.shape)
        block, buffer = result.array[layout.slices[self._rank]], result.flat
        action = partial(self._backend.all_gather, buffer, layout.counts)
        if reads is Reads.AT_RUN:
            action = partial(_copy_first, array, block, action)
        else:
            copy_elements(array, block)
        call = array_call("all_gather", input_array.dtype, array.shape, sizes=sizes)
        return call, action, result, buffer.nbytes, result.device

    def gather(
        self, x: Input, root: int, sizes: tuple[int, ...] | None, out: object, reads: Reads = Reads.NOW
    ) -> Operation:
        """Prepare a gather of blocks with these rows; equal ones when None."""
        self._checker.check_rank(root, "root")
        input_array = self._checker.check_input(x, moved=True)
        array = input_array.array
        layout = uneven.gathered_layout(array.shape, sizes, self._rank, self._world_size)
        result = OutputBuffer(input_array, out, layout.shape) if self._rank == root else None
        source = Source(array, reads)
        whole = None if result is None else result.flat
        if whole is not None and uneven.overlaps_other_blocks(source.flat, whole, layout, root):
            source.copy()
        call = array_call("gather", input_array.dtype, array.shape, root=root, sizes=sizes)
        action = partial(self._backend.gather, source.flat, whole, layout.counts, root)
        return call, source.before(action), result or no_result, array.nbytes, input_array.device

    def scatter(
        self,
        x: Input | None,
        root: int,
        sizes: Sequence[int] | None,
        out: object,
        reads: Reads,
        tell: Callable[[bytes], bytes],
    ) -> Operation:
        """Prepare a scatter; `tell` sends the root's header to all ranks, and returns it."""
        input_array, source, header = None, None, b""
        if self._rank == root:
            if x is None:
                raise UsageError("scatter: the root must give an array", op="scatter")
            input_array = self._checker.check_input(x, moved=True)
            rows = uneven.checked_sizes(sizes, self._world_size)
            layout = uneven.split_layout(input_array.array.shape, rows, self._world_size, "scatter")
            header = uneven.header_of(input_array.dtype, layout)
            source = Source(input_array.array, reads)
        dtype, layout = uneven.read_header(tell(header), self._world_size)
        if input_array is None:  # `out` alone tells which kind of array this rank gets
            kind = cast("Input", out)
            like = np.empty(0, dtype) if out is None else kind
            input_array = self._checker.check_input(like, what="out", moved=True)
            if input_array.dtype != dtype:
                raise UsageError(f"out has dtype {input_array.dtype}; the result has dtype {dtype}")
        result = OutputBuffer(input_array, out, layout.block_shape(self._rank))
        block = result.flat
        if source is not None and uneven.overlaps_other_blocks(block, source.flat, layout, root):
            source.copy()
        call = array_call("scatter", dtype, layout.shape, root=root)
        action = partial(self._backend.scatter, block, source.flat if source else None, layout.counts, root)
        return call, source.before(action) if source else action, result, block.nbytes, result.device

    def reduce_scatter(
        self, x: Input, op: Op, sizes: Sequence[int] | None, out: object, reads: Reads = Reads.NOW
    ) -> Operation:
        input_array = self._checker.check_input(x)
        array = input_array.array
        reduction = reduction_for(op, array.dtype, self._world_size)
        rows = uneven.checked_sizes(sizes, self._world_size)
        layout = uneven.split_layout(array.shape, rows, self._world_size, "reduce_scatter")
        result = OutputBuffer(input_array, out, layout.block_shape(self._rank))
        source = Source(array, reads)
        if result.overlaps(source.flat):
            source.copy()
        call = array_call("reduce_scatter", array.dtype, array.shape, reduction.name, sizes=rows)
        action = partial(self._backend.reduce_scatter, source.flat, result.flat, layout.counts, reduction)
        return call, source.before(action), result, array.nbytes, result.device

    def all_to_all(
        self,
        x: Input,
        send_sizes: Sequence[int] | None,
        recv_sizes: Sequence[int] | None,
        out: object,
        reads: Reads = Reads.NOW,
    ) -> Operation:
        n = self._world_size
        input_array = self._checker.check_input(x, moved=True)
        array, device = input_array.array, input_array.device
        send_rows = uneven.checked_sizes(send_sizes, n, "send_sizes")
        sent = uneven.split_layout(array.shape, send_rows, n, "all_to_all", "send_sizes")
        if send_rows is None and recv_sizes is not None:
            raise UsageError("all_to_all: recv_sizes needs send_sizes as well", op="all_to_all")
        source = Source(array, reads)
        if send_rows is None:
            result = OutputBuffer(input_array, out, array.shape)
            if result.overlaps(source.flat):
                source.copy()
            call = array_call("all_to_all", input_array.dtype, array.shape)
            action = partial(self._backend.all_to_all, source.flat, result.flat, sent.counts, sent.counts)
            return call, source.before(action), result, array.nbytes, device
        expected = uneven.checked_sizes(recv_sizes, n, "recv_sizes")
        make_result = partial(OutputBuffer, input_array, out)
        exchange = uneven.UnevenAllToAll(self._backend, source.flat, sent, expected, make_result)
        call = uneven_call("all_to_all", input_array.dtype, array.shape[1:])
        return call, source.before(exchange.run), exchange, array.nbytes, device


class Source:
    """The flat memory that a backend reads, for an input that need not be contiguous."""

    __slots__ = ("_input", "_reads", "_refill", "flat")

    def __init__(self, array: Array, reads: Reads) -> None:
        self._input = array
        self._reads = reads
        self.flat = flattened(array, copy=reads is Reads.COPY)
        self._refill = reads is Reads.AT_RUN and not array.flags.c_contiguous

    def copy(self) -> None:
        """Move to memory of its own, unless it has that already."""
        if not self._refill:
            self.flat = self.flat.copy()
            self._refill = self._reads is Reads.AT_RUN

    def before(self, action: Action) -> Action:
        """Let an operation begin with a copy of the input, where that is needed each time."""
        return (
            partial(_copy_first, self._input, self.flat.reshape(self._input.shape), action) if self._refill else action
        )


def _copy_first(source: Array, target: Array, action: Action, *, deadline: float) -> None:
    copy_elements(source, target)
    action(deadline=deadline)


def _after_copy(copy: tuple[Array, Array] | None, action: Action) -> Action:
    return action if copy is None else partial(_copy_first, *copy, action)


def no_result() -> None:
    """Make the result of ranks that get none."""
