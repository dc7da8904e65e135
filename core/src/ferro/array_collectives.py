"""The collectives on arrays: what a call needs besides the backend, once for all backends.

Argument checks, shapes, `out`, views and copies; the dispatcher carries the operation out.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any, TypeAlias

import numpy as np

from ferro import objects
from ferro.arrays import Entry, Input, dtype_named, name_of
from ferro.backend import Backend
from ferro.calls import Call, array_call, shape_in_words
from ferro.dispatch import Dispatcher
from ferro.errors import UnsupportedError, UsageError
from ferro.members import Members
from ferro.reduction import ReduceFunction, Reduction, reduction_for
from ferro.row_exchange import RowExchange
from ferro.shapes import (
    Outlet,
    checked_sizes,
    concatenated,
    cut_rows,
    flat,
    gathered_rows,
    reaches_beyond,
)
from ferro.types import Array, Device, ReduceOp

# The result as the caller's own kind of array, or a Work of it when async_op is true. It is Any
# because two overloads for each of fifteen methods would bury the contract.
Outcome: TypeAlias = Any
Op: TypeAlias = "ReduceOp | str | ReduceFunction"


class ArrayCollectives:
    """The part of `ProcessGroup` in which all ranks take part with an array each.

    Arguments that all collectives take
        out: where the result goes: contiguous, writable, of the result's shape and dtype. It may
            be the input itself.
        async_op: return a `Work` at once; its `wait()` returns the result. Any number may be
            outstanding; they run in the order issued.
        timeout_s: deadline of the whole operation in seconds; the group's when None.
    """

    def __init__(self, backend: Backend, members: Members) -> None:
        self.name = members.name
        self.rank = backend.rank
        self.world_size = backend.world_size
        self.backend_name = members.backend_name
        self._members = members
        self._backend = backend
        self._dispatch = Dispatcher(backend, members)
        self._told_host_copy = False

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
        entry = self._enter(x)
        reduction = reduction_for(op, entry.array.dtype, self.world_size)
        result = Outlet(entry, out, entry.array.shape)
        result.fill(entry.array)
        return self._collect(
            self._call("all_reduce", entry.array, reduction=reduction),
            lambda deadline: self._backend.all_reduce(result.flat, reduction, deadline=deadline),
            result,
            async_op,
            timeout_s,
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
        reduction = reduction_for(op, entry.array.dtype, self.world_size)
        at_root = self.rank == root
        result = Outlet(entry, out if at_root else None, entry.array.shape)
        result.fill(entry.array)
        return self._collect(
            self._call("reduce", entry.array, reduction=reduction, root=root),
            lambda deadline: self._backend.reduce(result.flat, reduction, root, deadline=deadline),
            result if at_root else None,
            async_op,
            timeout_s,
            nbytes=result.flat.nbytes,
        )

    def broadcast(
        self,
        x: Input,
        root: int = 0,
        *,
        out: object = None,
        async_op: bool = False,
        timeout_s: float | None = None,
    ) -> Outcome:
        """Return the root's `x` on every rank; elsewhere `x` gives the shape and dtype."""
        self._check_rank(root, "root")
        entry = self._enter(x)
        result = Outlet(entry, out, entry.array.shape)
        if self.rank == root:
            result.fill(entry.array)
        return self._collect(
            self._call("broadcast", entry.array, root=root),
            lambda deadline: self._backend.broadcast(result.flat, root, deadline=deadline),
            result,
            async_op,
            timeout_s,
        )

    def all_gather(
        self,
        x: Input,
        *,
        sizes: Sequence[int] | None = None,
        out: object = None,
        async_op: bool = False,
        timeout_s: float | None = None,
    ) -> Outcome:
        """Concatenate every rank's `x` along axis 0, in order of rank.

        Args:
            x: shape (rows, …), the same on every rank but for rows when `sizes` is given. A 0-d
                array counts as one row: n of them give shape (n,).
            sizes: rows of every rank, the same list on every rank.
            out: see the class; so `async_op` and `timeout_s`.

        Returns:
            An array of shape (sum of rows, …).
        """
        entry = self._enter(x)
        rows = gathered_rows(entry.array, sizes, self.rank, self.world_size)
        shape, counts = concatenated(entry.array, rows)
        result = Outlet(entry, out, shape)
        start = sum(counts[: self.rank])
        own = result.flat[start : start + counts[self.rank]]
        own.reshape(entry.array.shape)[...] = entry.array
        return self._collect(
            self._call("all_gather", entry.array, sizes=sizes),
            lambda deadline: self._backend.all_gather(result.flat, counts, deadline=deadline),
            result,
            async_op,
            timeout_s,
        )

    def gather(
        self,
        x: Input,
        root: int = 0,
        *,
        sizes: Sequence[int] | None = None,
        out: object = None,
        async_op: bool = False,
        timeout_s: float | None = None,
    ) -> Outcome:
        """Concatenate every rank's `x` along axis 0 at `root`; the others get None.

        See `all_gather` for shapes and `sizes`.
        """
        self._check_rank(root, "root")
        entry = self._enter(x)
        rows = gathered_rows(entry.array, sizes, self.rank, self.world_size)
        shape, counts = concatenated(entry.array, rows)
        result = Outlet(entry, out, shape) if self.rank == root else None
        block = flat(entry.array, private=async_op)
        whole = None if result is None else result.flat
        if whole is not None and reaches_beyond(block, whole, counts, root):
            block = block.copy()
        return self._collect(
            self._call("gather", entry.array, sizes=sizes, root=root),
            lambda deadline: self._backend.gather(block, whole, counts, root, deadline=deadline),
            result,
            async_op,
            timeout_s,
            nbytes=block.nbytes,
        )

    def scatter(
        self,
        x: Input | None,
        root: int = 0,
        *,
        sizes: Sequence[int] | None = None,
        out: object = None,
        async_op: bool = False,
        timeout_s: float | None = None,
    ) -> Outcome:
        """Cut the root's `x` along axis 0 and give each rank its block.

        Shape, dtype and sizes travel ahead from the root in a small broadcast that every rank
        waits for.

        Args:
            x: the root's array, shape (rows, …); ignored elsewhere, where None will do.
            root: the rank that has it.
            sizes: rows for every rank, needed at the root only; equal blocks when None.
            out: see the class; so `async_op` and `timeout_s`.

        Returns:
            An array of shape (this rank's rows, …), a NumPy one away from the root.
        """
        self._check_rank(root, "root")
        entry, head = None, None
        if self.rank == root:
            if x is None:
                raise UsageError("scatter: the root must give an array", op="scatter")
            entry = self._enter(x)
            rows = cut_rows(entry.array, sizes, self.world_size, "scatter")
            head = [entry.array.dtype.name, list(entry.array.shape), rows]
        left_s = self._dispatch.countdown(timeout_s)
        dtype, shape, rows = objects.broadcast(self, head, root, "msgpack", left_s)
        source = None if entry is None else flat(entry.array, private=async_op)
        entry = entry or Entry(np.empty(0, dtype_named(dtype)))
        _, counts = concatenated(np.empty((0, *shape[1:])), rows)
        result = Outlet(entry, out, (rows[self.rank], *shape[1:]))
        if source is not None and reaches_beyond(result.flat, source, counts, root):
            source = source.copy()
        return self._collect(
            Call("scatter", dtype=dtype, count=sum(counts), root=root),
            lambda deadline: self._backend.scatter(
                result.flat, source, counts, root, deadline=deadline
            ),
            result,
            async_op,
            left_s(),
        )

    def reduce_scatter(
        self,
        x: Input,
        op: Op = ReduceOp.SUM,
        *,
        sizes: Sequence[int] | None = None,
        out: object = None,
        async_op: bool = False,
        timeout_s: float | None = None,
    ) -> Outcome:
        """Reduce `x` over all ranks and keep this rank's block of axis 0.

        Rank r gets op(x_0, …, x_{n-1})[start of block r : end of block r].

        Args:
            x: shape (rows, …), the same on every rank.
            op: see `all_reduce`.
            sizes: rows of every rank's block, the same list on every rank; equal when None.
            out: see the class; so `async_op` and `timeout_s`.

        Returns:
            An array of shape (this rank's rows, …).
        """
        entry = self._enter(x)
        reduction = reduction_for(op, entry.array.dtype, self.world_size)
        rows = cut_rows(entry.array, sizes, self.world_size, "reduce_scatter")
        _, counts = concatenated(entry.array, rows)
        result = Outlet(entry, out, (rows[self.rank], *entry.array.shape[1:]))
        source = flat(entry.array, private=async_op)
        if out is not None and np.may_share_memory(source, result.flat):
            source = source.copy()
        return self._collect(
            self._call("reduce_scatter", entry.array, reduction=reduction, sizes=sizes),
            lambda deadline: self._backend.reduce_scatter(
                source, result.flat, counts, reduction, deadline=deadline
            ),
            result,
            async_op,
            timeout_s,
            nbytes=source.nbytes,
        )

    def all_to_all(
        self,
        x: Input,
        *,
        send_sizes: Sequence[int] | None = None,
        recv_sizes: Sequence[int] | None = None,
        out: object = None,
        async_op: bool = False,
        timeout_s: float | None = None,
    ) -> Outcome:
        """Cut `x` along axis 0, send block j to rank j, concatenate what comes, in order of rank.

        Args:
            x: shape (rows, …); without sizes, the same on every rank and rows a multiple of n.
            send_sizes: rows for every rank. Given on one rank, it must be given on all.
            recv_sizes: rows from every rank, if known, to be held against what is sent; the ranks
                tell each other in any case.
            out: see the class; so `async_op` and `timeout_s`.

        Returns:
            An array of shape (sum of received rows, …).
        """
        entry = self._enter(x)
        n = self.world_size
        sending = cut_rows(entry.array, send_sizes, n, "all_to_all", "send_sizes")
        uneven = send_sizes is not None
        if recv_sizes is not None and not uneven:
            raise UsageError("all_to_all: recv_sizes needs send_sizes as well", op="all_to_all")
        expected = sending if not uneven else None
        if recv_sizes is not None:
            expected = checked_sizes(recv_sizes, n, "recv_sizes")
            if expected[self.rank] != sending[self.rank]:
                raise UsageError(
                    f"all_to_all: rank {self.rank} sends itself {sending[self.rank]} rows but "
                    f"receives {expected[self.rank]}",
                    op="all_to_all",
                )
        exchange = RowExchange(self._backend, entry, sending, expected, out, async_op=async_op)
        array = entry.array
        if uneven:  # rows differ between ranks
            array = array[:0]
        return self._collect(
            self._call("all_to_all", array, uneven=uneven),
            exchange.run_uneven if uneven else exchange.run,
            exchange,
            async_op,
            timeout_s,
            nbytes=entry.array.nbytes,
        )

    def barrier(self, *, async_op: bool = False, timeout_s: float | None = None) -> Outcome:
        """Return (None) when every rank has called it."""
        return self._collect(
            Call("barrier"),
            lambda deadline: self._backend.barrier(deadline=deadline),
            None,
            async_op,
            timeout_s,
            nbytes=0,
        )

    # -- checks ----------------------------------------------------------------------------------

    def _enter(self, value: Input) -> Entry:
        entry = Entry(value)
        if entry.device in self._members.devices:
            return entry
        if entry.device is Device.CUDA and self._members.host_copies:
            self._tell_host_copy()
            entry.through_host()
            return entry
        raise UnsupportedError(
            f"backend {self.backend_name!r} takes arrays on {', '.join(self._members.devices)}, "
            f"and this one is on {entry.device}: use a backend for {entry.device}, or set "
            "FERRO_ENABLE_GPU_FALLBACK=1 to copy through the host"
        )

    def _tell_host_copy(self) -> None:
        """Log, once, that arrays take the slow way that the user allowed."""
        if not self._told_host_copy:
            self._told_host_copy = True
            import logging  # here, for it is slow to import and seldom needed

            logging.getLogger("ferro").warning(
                "group %r (%s) copies GPU arrays through the host", self.name, self.backend_name
            )

    def _check_rank(self, rank: int, what: str) -> None:
        if not isinstance(rank, int | np.integer) or not 0 <= rank < self.world_size:
            raise UsageError(
                f"{what} is {rank!r}; group {self.name!r} has ranks 0 to {self.world_size - 1}",
                group=self.name,
                rank=self.rank,
            )

    def _call(
        self,
        op: str,
        array: Array,
        *,
        reduction: Reduction | None = None,
        sizes: Sequence[int] | None = None,
        root: int = -1,
        uneven: bool = False,
    ) -> Call:
        """Describe a call as all ranks must make it; rows are left out where they may differ."""
        reduced = reduction.name if reduction else ""
        if sizes is None and not uneven:
            return array_call(op, array.dtype, array.shape, reduced, root)
        rows = "uneven rows" if sizes is None else f"sizes {','.join(map(str, sizes))}"
        shape = array.shape[1:]
        return Call(
            op,
            dtype=name_of(array.dtype),
            count=array.size if sizes is None else sum(sizes) * math.prod(shape),
            reduction=reduced,
            root=root,
            detail=f"{rows} of {shape_in_words(shape)}",
        )

    def _collect(
        self,
        call: Call,
        action: Callable[[float], None],
        result: Outlet | RowExchange | None,
        async_op: bool,
        timeout_s: float | None,
        *,
        nbytes: int | None = None,
    ) -> Outcome:
        if nbytes is None:
            nbytes = result.flat.nbytes if isinstance(result, Outlet) else 0
        return self._dispatch.collective(
            call,
            action,
            _no_result if result is None else result,
            nbytes=nbytes,
            async_op=async_op,
            timeout_s=timeout_s,
        )


def _no_result() -> None:
    """Return what ranks get that have no result."""
