"""The collectives on arrays: argument checks, shapes, `out` and copies, once for all backends.

`Dispatcher` runs the operation that a method prepares.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from functools import partial
from typing import TYPE_CHECKING, Any, Literal, TypeAlias, cast

import numpy as np

from ferro.arrays import Input
from ferro.backend import Backend
from ferro.collectives.label import Call, array_call, uneven_call
from ferro.collectives.reduction import ReduceFunction, reduction_for
from ferro.errors import UsageError
from ferro.group import uneven
from ferro.group.arguments import ArgumentChecker, OutputBuffer, copy_elements, flattened
from ferro.group.dispatcher import Dispatcher
from ferro.group.group_info import GroupInfo
from ferro.types import Array, ReduceOp

if TYPE_CHECKING:
    import numpy.typing as npt

# The result as the caller's own kind of array, or a Work of it when async_op is true. It is Any because two overloads
# for each of fifteen methods would bury the contract.
ResultOrWork: TypeAlias = Any
Op: TypeAlias = "ReduceOp | str | ReduceFunction"
Sizes: TypeAlias = Sequence[int] | Literal["any"] | None

_BARRIER = Call("barrier")


class ArrayCollectives:
    """The methods of `ProcessGroup` in which all ranks take part with an array each.

    They are a class of their own because they would make the file of `ProcessGroup` too long, and because `coalesce()`
    builds on them alone.

    Arguments that all collectives take
        out: the array that takes the result: contiguous, writable, of the result's shape and dtype. It may be the input
            itself.
        async_op: return a `Work` at once; its `wait()` returns the result. Any number may be outstanding; they run in
            the order issued.
        copy: False: an asynchronous operation uses the input where it is, instead of a copy of its own; nothing of the
            input may be touched until the operation has ended.
        timeout_s: deadline of the whole operation in seconds; the group's when None.
    """

    def __init__(self, backend: Backend, info: GroupInfo) -> None:
        self.name = info.name
        self.rank = backend.rank
        self.world_size = backend.world_size
        self.backend_name = info.backend_name
        self._backend = backend
        self._dispatcher = Dispatcher(backend, info)
        checker = ArgumentChecker(backend, info)
        self._check_input = checker.check_input
        self._result_buffer = checker.result_buffer
        self._check_rank = checker.check_rank
        self._check_peer = checker.check_peer

    def empty(self, shape: int | Sequence[int], dtype: npt.DTypeLike = np.float32) -> Array:
        """Return an uninitialised array in the memory that this backend moves fastest.

        After a failed collective a late rank may still write to the array, so allocate a new one.
        """
        sizes = (shape,) if isinstance(shape, int | np.integer) else tuple(shape)
        if any(size < 0 for size in sizes):
            raise UsageError(f"empty: no size may be negative, but the shape is {sizes}")
        kind = np.dtype(dtype)
        nbytes = math.prod(sizes) * kind.itemsize
        return self._backend.allocate(nbytes)[:nbytes].view(kind).reshape(sizes)

    def all_reduce(
        self,
        x: Input,
        op: Op = ReduceOp.SUM,
        *,
        out: object = None,
        async_op: bool = False,
        timeout_s: float | None = None,
    ) -> ResultOrWork:
        """Reduce `x` over all ranks, elementwise; every rank gets op(x_0, …, x_{n-1}).

        The result has the shape and dtype of `x` and the same bits on every rank. Half precision is accumulated in
        float32.

        Args:
            x: any shape, the same on every rank.
            op: a `ReduceOp`, its name, or a function (a, b, out) that is associative.
            out, async_op, timeout_s: as in all collectives, see `ArrayCollectives`.
        """
        buffer, dtype, shape, device, finish = self._result_buffer(x, out)
        reduction = reduction_for(op, dtype, self.world_size)
        call = array_call("all_reduce", dtype, shape, reduction.name)
        action = partial(self._backend.all_reduce, buffer, reduction)
        return self._dispatcher.collective(call, action, finish, buffer.nbytes, async_op, timeout_s, device)

    def reduce(
        self,
        x: Input,
        root: int = 0,
        op: Op = ReduceOp.SUM,
        *,
        out: object = None,
        async_op: bool = False,
        timeout_s: float | None = None,
    ) -> ResultOrWork:
        """Reduce `x` over all ranks; `root` gets the result, the others None. See `all_reduce`."""
        self._check_rank(root, "root")
        at_root = self.rank == root
        buffer, dtype, shape, device, finish = self._result_buffer(x, out if at_root else None)
        reduction = reduction_for(op, dtype, self.world_size)
        call = array_call("reduce", dtype, shape, reduction.name, root)
        action = partial(self._backend.reduce, buffer, reduction, root)
        finish = finish if at_root else no_result
        return self._dispatcher.collective(call, action, finish, buffer.nbytes, async_op, timeout_s, device)

    def broadcast(
        self, x: Input, root: int = 0, *, out: object = None, async_op: bool = False, timeout_s: float | None = None
    ) -> ResultOrWork:
        """Return the root's `x` on every rank; elsewhere `x` gives the shape and dtype."""
        self._check_rank(root, "root")
        if x is None:
            raise UsageError(
                "broadcast: every rank must give an array of the root's shape and dtype, and this one gives None: "
                "pass np.empty(shape, dtype), or use broadcast_object, which needs nothing but the root's value",
                op="broadcast",
            )
        buffer, dtype, shape, device, finish = self._result_buffer(x, out, copy=self.rank == root, moved=True)
        call = array_call("broadcast", dtype, shape, root=root)
        action = partial(self._backend.broadcast, buffer, root)
        return self._dispatcher.collective(call, action, finish, buffer.nbytes, async_op, timeout_s, device)

    def all_gather(
        self,
        x: Input,
        *,
        sizes: Sizes = None,
        out: object = None,
        async_op: bool = False,
        copy: bool = True,
        timeout_s: float | None = None,
    ) -> ResultOrWork:
        """Concatenate every rank's `x` along axis 0, in order of rank: an array of shape (sum of rows, …).

        Args:
            x: shape (rows, …), the same on every rank; rows may differ if `sizes` is given. A 0-d array counts as one
                row: n of them give shape (n,).
            sizes: rows of every rank, the same list on every rank; or "any", on every rank, to let the ranks exchange
                their rows first, in a small all_gather that every rank waits for.
            out, async_op, copy, timeout_s: as in all collectives, see `ArrayCollectives`. On a CPU, with copy=False,
                `out` is not written to before operations issued earlier have ended.
        """
        input_array = self._check_input(x, moved=True)
        array = input_array.array
        rows, timeout_s = self._gathered_rows(sizes, array, timeout_s)
        layout = uneven.gathered_layout(array.shape, rows, self.rank, self.world_size)
        result = OutputBuffer(input_array, out, layout.shape)
        block, buffer = result.array[layout.slices[self.rank]], result.flat
        action = partial(self._backend.all_gather, buffer, layout.counts)
        if async_op and not copy:
            action = partial(_copy_first, array, block, action)
        else:
            copy_elements(array, block)
        call = array_call("all_gather", input_array.dtype, array.shape, sizes=rows)
        return self._dispatcher.collective(call, action, result, buffer.nbytes, async_op, timeout_s, result.device)

    def gather(
        self,
        x: Input,
        root: int = 0,
        *,
        sizes: Sizes = None,
        out: object = None,
        async_op: bool = False,
        copy: bool = True,
        timeout_s: float | None = None,
    ) -> ResultOrWork:
        """Concatenate every rank's `x` along axis 0 at `root`; the others get None.

        See `all_gather` for shapes and `sizes`.
        """
        self._check_rank(root, "root")
        input_array = self._check_input(x, moved=True)
        array = input_array.array
        rows, timeout_s = self._gathered_rows(sizes, array, timeout_s)
        layout = uneven.gathered_layout(array.shape, rows, self.rank, self.world_size)
        result = OutputBuffer(input_array, out, layout.shape) if self.rank == root else None
        block = flattened(array, copy=async_op and copy)
        whole = None if result is None else result.flat
        if whole is not None and uneven.overlaps_other_blocks(block, whole, layout, root):
            block = block.copy()
        call = array_call("gather", input_array.dtype, array.shape, root=root, sizes=rows)
        action = partial(self._backend.gather, block, whole, layout.counts, root)
        finish = result or no_result
        return self._dispatcher.collective(call, action, finish, array.nbytes, async_op, timeout_s, input_array.device)

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
    ) -> ResultOrWork:
        """Split the root's `x` along axis 0 and give each rank its block, of shape (this rank's rows, …).

        On other ranks than the root, the block is a NumPy array unless `out` is given. The root first sends shape,
        dtype and sizes in a small broadcast that every rank waits for.

        Args:
            x: the root's array, shape (rows, …); ignored on other ranks, which may give None.
            root: the rank whose `x` is split.
            sizes: rows for every rank, needed at the root only; equal blocks when None.
            out, async_op, copy, timeout_s: as in all collectives, see `ArrayCollectives`.
        """
        self._check_rank(root, "root")
        with self._dispatcher.sequence("scatter", timeout_s) as remaining_s:
            return self._scatter(x, root, sizes, out, async_op, copy, remaining_s)

    def _scatter(
        self,
        x: Input | None,
        root: int,
        sizes: Sequence[int] | None,
        out: object,
        async_op: bool,
        copy: bool,
        remaining_s: Callable[[], float],
    ) -> ResultOrWork:
        input_array, source, header = None, None, uneven.blank_header(self.world_size)
        if self.rank == root:
            if x is None:
                raise UsageError("scatter: the root must give an array", op="scatter")
            input_array = self._check_input(x, moved=True)
            rows = uneven.checked_sizes(sizes, self.world_size)
            layout = uneven.split_layout(input_array.array.shape, rows, self.world_size, "scatter")
            uneven.write_header(header, input_array.dtype, layout)
            source = flattened(input_array.array, copy=async_op and copy)
        self.broadcast(header, root, out=header, timeout_s=remaining_s())
        dtype, layout = uneven.read_header(header, self.world_size)
        if input_array is None:  # `out` alone tells which kind of array this rank gets
            kind = cast("Input", out)
            like = np.empty(0, dtype) if out is None else kind
            input_array = self._check_input(like, what="out", moved=True)
            if input_array.dtype != dtype:
                raise UsageError(f"out has dtype {input_array.dtype}; the result has dtype {dtype}")
        result = OutputBuffer(input_array, out, layout.block_shape(self.rank))
        block = result.flat
        if source is not None and uneven.overlaps_other_blocks(block, source, layout, root):
            source = source.copy()
        call = array_call("scatter", dtype, layout.shape, root=root)
        action = partial(self._backend.scatter, block, source, layout.counts, root)
        return self._dispatcher.collective(call, action, result, block.nbytes, async_op, remaining_s(), result.device)

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
    ) -> ResultOrWork:
        """Reduce `x` over all ranks and keep this rank's block of axis 0.

        Rank r gets op(x_0, …, x_{n-1})[start of block r : end of block r], of shape (this rank's rows, …).

        Args:
            x: shape (rows, …), the same on every rank.
            op: a `ReduceOp`, its name, or a function (a, b, out) that is associative.
            sizes: rows of every rank's block, the same list on every rank; equal when None.
            out, async_op, copy, timeout_s: as in all collectives, see `ArrayCollectives`.
        """
        input_array = self._check_input(x)
        array = input_array.array
        reduction = reduction_for(op, array.dtype, self.world_size)
        rows = uneven.checked_sizes(sizes, self.world_size)
        layout = uneven.split_layout(array.shape, rows, self.world_size, "reduce_scatter")
        result = OutputBuffer(input_array, out, layout.block_shape(self.rank))
        source = result.copy_if_overlapping(flattened(array, copy=async_op and copy))
        call = array_call("reduce_scatter", array.dtype, array.shape, reduction.name, sizes=rows)
        action = partial(self._backend.reduce_scatter, source, result.flat, layout.counts, reduction)
        return self._dispatcher.collective(call, action, result, array.nbytes, async_op, timeout_s, result.device)

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
    ) -> ResultOrWork:
        """Split `x` along axis 0, send block j to rank j, concatenate the received blocks in order of rank.

        The result has the shape (sum of received rows, …).

        Args:
            x: shape (rows, …); without sizes, the same on every rank and rows a multiple of n.
            send_sizes: rows for every rank. Given on one rank, it must be given on all.
            recv_sizes: rows from every rank, if known, to be compared with the sent ones; the ranks exchange their
                sizes in any case.
            out, async_op, copy, timeout_s: as in all collectives, see `ArrayCollectives`.
        """
        n = self.world_size
        input_array = self._check_input(x, moved=True)
        array, device = input_array.array, input_array.device
        send_rows = uneven.checked_sizes(send_sizes, n, "send_sizes")
        sent = uneven.split_layout(array.shape, send_rows, n, "all_to_all", "send_sizes")
        if send_rows is None and recv_sizes is not None:
            raise UsageError("all_to_all: recv_sizes needs send_sizes as well", op="all_to_all")
        source = flattened(array, copy=async_op and copy)
        if send_rows is None:
            result = OutputBuffer(input_array, out, array.shape)
            source, counts = result.copy_if_overlapping(source), sent.counts
            call = array_call("all_to_all", input_array.dtype, array.shape)
            action = partial(self._backend.all_to_all, source, result.flat, counts, counts)
            return self._dispatcher.collective(call, action, result, array.nbytes, async_op, timeout_s, device)
        expected = uneven.checked_sizes(recv_sizes, n, "recv_sizes")
        make_result = partial(OutputBuffer, input_array, out)
        exchange = uneven.UnevenAllToAll(self._backend, source, sent, expected, make_result)
        call = uneven_call("all_to_all", input_array.dtype, array.shape[1:])
        return self._dispatcher.collective(call, exchange.run, exchange, array.nbytes, async_op, timeout_s, device)

    def barrier(self, *, async_op: bool = False, timeout_s: float | None = None) -> ResultOrWork:
        """Wait until every rank has called it; return None."""
        return self._dispatcher.collective(_BARRIER, self._backend.barrier, no_result, 0, async_op, timeout_s)

    def _gathered_rows(
        self, sizes: Sizes, array: Array, timeout_s: float | None
    ) -> tuple[tuple[int, ...] | None, float | None]:
        """Check the rows of all ranks, or exchange them where `sizes` is "any"; return them and the time left."""
        if not isinstance(sizes, str) or sizes != "any":
            return uneven.checked_sizes(sizes, self.world_size), timeout_s
        with self._dispatcher.sequence("all_gather", timeout_s) as remaining_s:
            own = array.shape[0] if array.ndim else 1
            return tuple(self.all_gather(np.array(own), timeout_s=remaining_s()).tolist()), remaining_s()


def _copy_first(source: Array, target: Array, action: partial[None], *, deadline: float) -> None:
    copy_elements(source, target)
    action(deadline=deadline)


def no_result() -> None:
    """Make the result of ranks that get none."""
