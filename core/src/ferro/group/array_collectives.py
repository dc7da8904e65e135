"""The collectives on arrays: what a call needs besides the backend, once for all backends.

Argument checks, shapes, `out`, views and copies; the dispatcher carries the operation out.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, TypeAlias, cast

import numpy as np

from ferro.arrays import Input, InputArray
from ferro.backend import Backend
from ferro.collectives.label import Call, array_call, uneven_call
from ferro.collectives.reduction import ReduceFunction, reduction_for
from ferro.errors import UsageError
from ferro.group.arguments import InPlace, Operands, OutputBuffer, fill, flat, takes_in_place
from ferro.group.dispatcher import Dispatcher
from ferro.group.group_info import GroupInfo
from ferro.group.uneven import (
    RowExchange,
    blank_header,
    checked_sizes,
    cut,
    gathered,
    reaches_beyond,
    read_header,
    write_header,
)
from ferro.types import Device, ReduceOp

# The result as the caller's own kind of array, or a Work of it when async_op is true. It is Any
# because two overloads for each of fifteen methods would bury the contract.
Outcome: TypeAlias = Any
Op: TypeAlias = "ReduceOp | str | ReduceFunction"

_BARRIER = Call("barrier")


class ArrayCollectives:
    """The part of `ProcessGroup` in which all ranks take part with an array each.

    Arguments that all collectives take
        out: where the result goes: contiguous, writable, of the result's shape and dtype. It may
            be the input itself.
        async_op: return a `Work` at once; its `wait()` returns the result. Any number may be
            outstanding; they run in the order issued.
        copy: False: an asynchronous operation uses the input where it is, instead of a copy of its
            own; nothing of the input may be touched until it has ended.
        timeout_s: deadline of the whole operation in seconds; the group's when None.
    """

    def __init__(self, backend: Backend, members: GroupInfo) -> None:
        self.name = members.name
        self.rank = backend.rank
        self.world_size = backend.world_size
        self.backend_name = members.backend_name
        self._backend = backend
        self._dispatch = Dispatcher(backend, members)
        operands = Operands(backend, members)
        self._enter = operands.enter
        self._on_cpu = Device.CPU in members.devices
        self._check_rank = operands.check_rank
        self._check_peer = operands.check_peer

    def all_reduce(
        self,
        x: Input,
        op: Op = ReduceOp.SUM,
        *,
        out: object = None,
        async_op: bool = False,
        timeout_s: float | None = None,
    ) -> Outcome:
        """Reduce `x` over all ranks, elementwise; every rank gets op(x_0, …, x_{n-1}).

        The result has the same bits on every rank. Half precision is accumulated in float32.

        Args:
            x: any shape, the same on every rank.
            op: a `ReduceOp`, its name, or a function (a, b, out) that is associative.
            out: see the class; so `async_op` and `timeout_s`.

        Returns:
            An array of the shape and dtype of `x`.
        """
        if out is x and self._on_cpu and takes_in_place(x):
            result: InPlace | OutputBuffer = InPlace(x)
        else:
            result = self._result(x, out, filled=True)
        flat = result.flat
        dtype = flat.dtype
        reduction = reduction_for(op, dtype, self.world_size)
        return self._dispatch.collective(
            array_call("all_reduce", dtype, result.array.shape, reduction.name),
            lambda deadline: self._backend.all_reduce(flat, reduction, deadline=deadline),
            result,
            flat.nbytes,
            async_op,
            timeout_s,
            result.device,
        )

    def reduce(
        self,
        x: Input,
        root: int = 0,
        op: Op = ReduceOp.SUM,
        *,
        out: object = None,
        async_op: bool = False,
        timeout_s: float | None = None,
    ) -> Outcome:
        """Reduce `x` over all ranks; `root` gets the result, the others None."""
        self._check_rank(root, "root")
        entry = self._enter(x)
        array = entry.array
        reduction = reduction_for(op, array.dtype, self.world_size)
        at_root = self.rank == root
        result = OutputBuffer(entry, out if at_root else None, array.shape)
        result.fill(array)
        return self._dispatch.collective(
            array_call("reduce", array.dtype, array.shape, reduction.name, root),
            lambda deadline: self._backend.reduce(result.flat, reduction, root, deadline=deadline),
            result if at_root else no_result,
            array.nbytes,
            async_op,
            timeout_s,
            entry.device,
        )

    def broadcast(
        self, x: Input, root: int = 0, *, out: object = None, async_op: bool = False, timeout_s: float | None = None
    ) -> Outcome:
        """Return the root's `x` on every rank; elsewhere `x` gives the shape and dtype."""
        self._check_rank(root, "root")
        if out is x and self._on_cpu and takes_in_place(x):
            result: InPlace | OutputBuffer = InPlace(x)
        else:
            result = self._result(x, out, filled=self.rank == root)
        flat = result.flat
        return self._dispatch.collective(
            array_call("broadcast", flat.dtype, result.array.shape, root=root),
            lambda deadline: self._backend.broadcast(flat, root, deadline=deadline),
            result,
            flat.nbytes,
            async_op,
            timeout_s,
            result.device,
        )

    def all_gather(
        self,
        x: Input,
        *,
        sizes: Sequence[int] | None = None,
        out: object = None,
        async_op: bool = False,
        copy: bool = True,
        timeout_s: float | None = None,
    ) -> Outcome:
        """Concatenate every rank's `x` along axis 0, in order of rank.

        Args:
            x: shape (rows, …), the same on every rank but for rows when `sizes` is given. A 0-d
                array counts as one row: n of them give shape (n,).
            sizes: rows of every rank, the same list on every rank.
            out: see the class; so `async_op`, `copy` and `timeout_s`. On a CPU, with copy=False,
                `out` is not written to before operations issued earlier have ended.

        Returns:
            An array of shape (sum of rows, …).
        """
        entry = self._enter(x)
        array = entry.array
        rows = checked_sizes(sizes, self.world_size)
        layout = gathered(array.shape, rows, self.rank, self.world_size)
        result = OutputBuffer(entry, out, layout.shape)
        own, in_turn = result.array[layout.places[self.rank]], async_op and not copy
        if not in_turn:
            fill(own, array)

        def action(deadline: float) -> None:
            if in_turn:
                fill(own, array)
            self._backend.all_gather(result.flat, layout.counts, deadline=deadline)

        return self._dispatch.collective(
            array_call("all_gather", array.dtype, array.shape, sizes=rows),
            action,
            result,
            result.flat.nbytes,
            async_op,
            timeout_s,
            entry.device,
        )

    def gather(
        self,
        x: Input,
        root: int = 0,
        *,
        sizes: Sequence[int] | None = None,
        out: object = None,
        async_op: bool = False,
        copy: bool = True,
        timeout_s: float | None = None,
    ) -> Outcome:
        """Concatenate every rank's `x` along axis 0 at `root`; the others get None.

        See `all_gather` for shapes and `sizes`.
        """
        self._check_rank(root, "root")
        entry = self._enter(x)
        array = entry.array
        rows = checked_sizes(sizes, self.world_size)
        layout = gathered(array.shape, rows, self.rank, self.world_size)
        result = OutputBuffer(entry, out, layout.shape) if self.rank == root else None
        block = flat(array, private=async_op and copy)
        whole = None if result is None else result.flat
        if whole is not None and reaches_beyond(block, whole, layout, root):
            block = block.copy()
        return self._dispatch.collective(
            array_call("gather", array.dtype, array.shape, root=root, sizes=rows),
            lambda deadline: self._backend.gather(block, whole, layout.counts, root, deadline=deadline),
            result or no_result,
            array.nbytes,
            async_op,
            timeout_s,
            entry.device,
        )

    def scatter(
        self,
        x: Input | None,
        root: int = 0,
        *,
        sizes: Sequence[int] | None = None,
        out: object = None,
        async_op: bool = False,
        copy: bool = True,
        timeout_s: float | None = None,
    ) -> Outcome:
        """Cut the root's `x` along axis 0 and give each rank its block.

        Shape, dtype and sizes travel ahead from the root in a small broadcast that every rank
        waits for.

        Args:
            x: the root's array, shape (rows, …); ignored elsewhere, where None will do.
            root: the rank that has it.
            sizes: rows for every rank, needed at the root only; equal blocks when None.
            out: see the class; so `async_op`, `copy` and `timeout_s`.

        Returns:
            An array of shape (this rank's rows, …), a NumPy one away from the root.
        """
        self._check_rank(root, "root")
        left_s = self._dispatch.countdown(timeout_s)
        entry, source, head = None, None, blank_header(self.world_size)
        if self.rank == root:
            if x is None:
                raise UsageError("scatter: the root must give an array", op="scatter")
            entry = self._enter(x)
            rows = checked_sizes(sizes, self.world_size)
            layout = cut(entry.array.shape, rows, self.world_size, "scatter")
            write_header(head, entry.array.dtype, layout)
            source = flat(entry.array, private=async_op and copy)
        self.broadcast(head, root, out=head, timeout_s=left_s())
        dtype, layout = read_header(head, self.world_size)
        entry = entry or self._elsewhere(out, dtype)
        result = OutputBuffer(entry, out, layout.block_shape(self.rank))
        if source is not None and reaches_beyond(result.flat, source, layout, root):
            source = source.copy()
        return self._dispatch.collective(
            array_call("scatter", dtype, layout.shape, root=root),
            lambda deadline: self._backend.scatter(result.flat, source, layout.counts, root, deadline=deadline),
            result,
            result.flat.nbytes,
            async_op,
            left_s(),
            entry.device,
        )

    def _elsewhere(self, out: object, dtype: np.dtype) -> InputArray:
        """Return what stands for the operand where a rank gives none: `out` says of which kind."""
        entry = InputArray(np.empty(0, dtype)) if out is None else self._enter(cast(Input, out), what="out")
        if entry.array.dtype != dtype:
            raise UsageError(f"out has dtype {entry.array.dtype}; the result has dtype {dtype}")
        return entry

    def reduce_scatter(
        self,
        x: Input,
        op: Op = ReduceOp.SUM,
        *,
        sizes: Sequence[int] | None = None,
        out: object = None,
        async_op: bool = False,
        copy: bool = True,
        timeout_s: float | None = None,
    ) -> Outcome:
        """Reduce `x` over all ranks and keep this rank's block of axis 0.

        Rank r gets op(x_0, …, x_{n-1})[start of block r : end of block r].

        Args:
            x: shape (rows, …), the same on every rank.
            op: see `all_reduce`.
            sizes: rows of every rank's block, the same list on every rank; equal when None.
            out: see the class; so `async_op`, `copy` and `timeout_s`.

        Returns:
            An array of shape (this rank's rows, …).
        """
        entry = self._enter(x)
        array = entry.array
        reduction = reduction_for(op, array.dtype, self.world_size)
        rows = checked_sizes(sizes, self.world_size)
        layout = cut(array.shape, rows, self.world_size, "reduce_scatter")
        result = OutputBuffer(entry, out, layout.block_shape(self.rank))
        source = result.apart(flat(array, private=async_op and copy))
        return self._dispatch.collective(
            array_call("reduce_scatter", array.dtype, array.shape, reduction.name, sizes=rows),
            lambda deadline: self._backend.reduce_scatter(
                source, result.flat, layout.counts, reduction, deadline=deadline
            ),
            result,
            array.nbytes,
            async_op,
            timeout_s,
            entry.device,
        )

    def all_to_all(
        self,
        x: Input,
        *,
        send_sizes: Sequence[int] | None = None,
        recv_sizes: Sequence[int] | None = None,
        out: object = None,
        async_op: bool = False,
        copy: bool = True,
        timeout_s: float | None = None,
    ) -> Outcome:
        """Cut `x` along axis 0, send block j to rank j, concatenate what comes, in order of rank.

        Args:
            x: shape (rows, …); without sizes, the same on every rank and rows a multiple of n.
            send_sizes: rows for every rank. Given on one rank, it must be given on all.
            recv_sizes: rows from every rank, if known, to be held against what is sent; the ranks
                tell each other in any case.
            out: see the class; so `async_op`, `copy` and `timeout_s`.

        Returns:
            An array of shape (sum of received rows, …).
        """
        n = self.world_size
        entry = self._enter(x)
        array = entry.array
        rows = checked_sizes(send_sizes, n, "send_sizes")
        sending = cut(array.shape, rows, n, "all_to_all", "send_sizes")
        if rows is not None:
            expected = checked_sizes(recv_sizes, n, "recv_sizes")
            exchange = RowExchange(self._backend, entry, sending, expected, out, private=async_op and copy)
            call = uneven_call("all_to_all", array.dtype, array.shape[1:])
            return self._dispatch.collective(
                call, exchange.run, exchange, array.nbytes, async_op, timeout_s, entry.device
            )
        if recv_sizes is not None:
            raise UsageError("all_to_all: recv_sizes needs send_sizes as well", op="all_to_all")
        result = OutputBuffer(entry, out, array.shape)
        source, counts = result.apart(flat(array, private=async_op and copy)), sending.counts
        return self._dispatch.collective(
            array_call("all_to_all", array.dtype, array.shape),
            lambda deadline: self._backend.all_to_all(source, result.flat, counts, counts, deadline=deadline),
            result,
            array.nbytes,
            async_op,
            timeout_s,
            entry.device,
        )

    def barrier(self, *, async_op: bool = False, timeout_s: float | None = None) -> Outcome:
        """Return (None) when every rank has called it."""
        return self._dispatch.collective(
            _BARRIER, lambda deadline: self._backend.barrier(deadline=deadline), no_result, 0, async_op, timeout_s
        )

    def _result(self, x: Input, out: object, *, filled: bool) -> OutputBuffer:
        """Return where a result of the operand's shape goes; with the operand in it if `filled`."""
        entry = self._enter(x)
        result = OutputBuffer(entry, out, entry.array.shape)
        if filled:
            result.fill(entry.array)
        return result


def no_result() -> None:
    """Return what ranks get that have no result."""
