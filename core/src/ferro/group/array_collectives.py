"""The collectives on arrays: argument checks, shapes, `out` and copies, once for all backends.

`Dispatcher` runs the operation that a method prepares.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any, Literal, TypeAlias

import numpy as np

from ferro.arrays import Input
from ferro.backend import Backend
from ferro.errors import UsageError
from ferro.group import uneven
from ferro.group.arguments import ArgumentChecker, Reads, reads_when
from ferro.group.array_operations import ArrayOperations, Op
from ferro.group.dispatcher import Dispatcher
from ferro.group.fast_calls import NOT_TAKEN, FastCalls
from ferro.group.group_info import GroupInfo
from ferro.types import Array, ReduceOp

if TYPE_CHECKING:
    import numpy.typing as npt

# The result as the caller's own kind of array, or a Work of it when async_op is true. It is Any because two overloads
# for each of fifteen methods would bury the contract.
ResultOrWork: TypeAlias = Any
Timeout: TypeAlias = "float | None"  # in seconds; the group's when None
Sizes: TypeAlias = Sequence[int] | Literal["any"] | None


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
        self._checker = checker = ArgumentChecker(backend, info)
        self._operations = ArrayOperations(backend, checker)
        dispatcher = self._dispatcher
        self._fast_calls = FastCalls(dispatcher, backend.rank, backend.world_size)
        self._run_fast = self._fast_calls.run
        self._check_input = checker.check_input
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
        self, x: Input, op: Op = ReduceOp.SUM, *, out: object = None, async_op: bool = False, timeout_s: Timeout = None
    ) -> ResultOrWork:
        """Reduce `x` over all ranks, elementwise; every rank gets op(x_0, …, x_{n-1}).

        The result has the shape and dtype of `x` and the same bits on every rank. Half precision is accumulated in
        float32.

        Args:
            x: any shape, the same on every rank.
            op: a `ReduceOp`, its name, or a function (a, b, out) that is associative.
        """
        now = not async_op and timeout_s is None
        if now and (result := self._run_fast("all_reduce", x, op, -1, out)) is not NOT_TAKEN:
            return result
        return self._dispatcher.collective(*self._operations.all_reduce(x, op, out), async_op, timeout_s)

    def reduce(
        self,
        x: Input,
        root: int = 0,
        op: Op = ReduceOp.SUM,
        *,
        out: object = None,
        async_op: bool = False,
        timeout_s: Timeout = None,
    ) -> ResultOrWork:
        """Reduce `x` over all ranks; `root` gets the result, the others None. See `all_reduce`."""
        now = not async_op and timeout_s is None
        if now and (result := self._run_fast("reduce", x, op, root, out)) is not NOT_TAKEN:
            return result
        return self._dispatcher.collective(*self._operations.reduce(x, root, op, out), async_op, timeout_s)

    def broadcast(
        self, x: Input, root: int = 0, *, out: object = None, async_op: bool = False, timeout_s: Timeout = None
    ) -> ResultOrWork:
        """Return the root's `x` on every rank; elsewhere `x` gives the shape and dtype."""
        now = not async_op and timeout_s is None
        if now and (result := self._run_fast("broadcast", x, None, root, out)) is not NOT_TAKEN:
            return result
        return self._dispatcher.collective(*self._operations.broadcast(x, root, out), async_op, timeout_s)

    def all_gather(
        self,
        x: Input,
        *,
        sizes: Sizes = None,
        out: object = None,
        async_op: bool = False,
        copy: bool = True,
        timeout_s: Timeout = None,
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
        now = sizes is None and not async_op and timeout_s is None
        if now and (result := self._run_fast("all_gather", x, None, -1, out)) is not NOT_TAKEN:
            return result
        rows, timeout_s = self._gathered_rows(sizes, x, timeout_s)
        operation = self._operations.all_gather(x, rows, out, reads_when(async_op, copy))
        return self._dispatcher.collective(*operation, async_op, timeout_s)

    def gather(
        self,
        x: Input,
        root: int = 0,
        *,
        sizes: Sizes = None,
        out: object = None,
        async_op: bool = False,
        copy: bool = True,
        timeout_s: Timeout = None,
    ) -> ResultOrWork:
        """Concatenate every rank's `x` along axis 0 at `root`; the others get None.

        See `all_gather` for shapes and `sizes`.
        """
        now = sizes is None and not async_op and timeout_s is None
        if now and (result := self._run_fast("gather", x, None, root, out)) is not NOT_TAKEN:
            return result
        self._check_rank(root, "root")
        rows, timeout_s = self._gathered_rows(sizes, x, timeout_s)
        operation = self._operations.gather(x, root, rows, out, reads_when(async_op, copy))
        return self._dispatcher.collective(*operation, async_op, timeout_s)

    def scatter(
        self,
        x: Input | None,
        root: int = 0,
        *,
        sizes: Sequence[int] | None = None,
        out: object = None,
        async_op: bool = False,
        copy: bool = True,
        timeout_s: Timeout = None,
    ) -> ResultOrWork:
        """Split the root's `x` along axis 0 and give each rank its block, of shape (this rank's rows, …).

        On other ranks than the root, the block is a NumPy array unless `out` is given. The root first sends shape,
        dtype and sizes in a small broadcast that every rank waits for.

        Args:
            x: the root's array, shape (rows, …); ignored on other ranks, which may give None.
            root: the rank whose `x` is split.
            sizes: rows for every rank, needed at the root only; equal blocks when None.
        """
        told: object = b""
        if sizes is None and not async_op and timeout_s is None:
            told = self._fast_calls.scatter(x, root, out)
            if told is not NOT_TAKEN and type(told) is not bytes:
                return told
        return self._tell_and_scatter(x, root, sizes, out, reads_when(async_op, copy), timeout_s, told)

    def _tell_and_scatter(
        self, x: Any, root: int, sizes: Any, out: object, reads: Reads, timeout_s: float | None, told: object
    ) -> ResultOrWork:
        """Scatter after the broadcast of a header, unless that was `told` before."""
        self._check_rank(root, "root")
        with self._dispatcher.sequence("scatter", timeout_s) as remaining_s:

            def broadcast(header: Array) -> None:
                left_s = remaining_s()
                self.broadcast(header, root, out=header, timeout_s=None if timeout_s is None else left_s)

            def tell(header: bytes) -> bytes:
                remaining_s()  # an operation has been issued
                header = uneven.tell_header(header, broadcast, told if isinstance(told, bytes) else b"")
                dtype, layout = uneven.read_header(header, self.world_size)
                self._fast_calls.blocks[root] = dtype, layout.block_shape(self.rank)
                return header

            operation = self._operations.scatter(x, root, sizes, out, reads, tell)
            return self._dispatcher.collective(*operation, reads is not Reads.NOW, remaining_s())

    def reduce_scatter(
        self,
        x: Input,
        op: Op = ReduceOp.SUM,
        *,
        sizes: Sequence[int] | None = None,
        out: object = None,
        async_op: bool = False,
        copy: bool = True,
        timeout_s: Timeout = None,
    ) -> ResultOrWork:
        """Reduce `x` over all ranks and keep this rank's block of axis 0.

        Rank r gets op(x_0, …, x_{n-1})[start of block r : end of block r], of shape (this rank's rows, …).

        Args:
            x: shape (rows, …), the same on every rank.
            op: a `ReduceOp`, its name, or a function (a, b, out) that is associative.
            sizes: rows of every rank's block, the same list on every rank; equal when None.
        """
        now = sizes is None and not async_op and timeout_s is None
        if now and (result := self._run_fast("reduce_scatter", x, op, -1, out)) is not NOT_TAKEN:
            return result
        operation = self._operations.reduce_scatter(x, op, sizes, out, reads_when(async_op, copy))
        return self._dispatcher.collective(*operation, async_op, timeout_s)

    def all_to_all(
        self,
        x: Input,
        *,
        send_sizes: Sequence[int] | None = None,
        recv_sizes: Sequence[int] | None = None,
        out: object = None,
        async_op: bool = False,
        copy: bool = True,
        timeout_s: Timeout = None,
    ) -> ResultOrWork:
        """Split `x` along axis 0, send block j to rank j, concatenate the received blocks in order of rank.

        The result has the shape (sum of received rows, …).

        Args:
            x: shape (rows, …); without sizes, the same on every rank and rows a multiple of n.
            send_sizes: rows for every rank. Given on one rank, it must be given on all.
            recv_sizes: rows from every rank, if known, to be compared with the sent ones; the ranks exchange their
                sizes in any case.
        """
        now = send_sizes is None and recv_sizes is None and not async_op and timeout_s is None
        if now and (result := self._run_fast("all_to_all", x, None, -1, out)) is not NOT_TAKEN:
            return result
        operation = self._operations.all_to_all(x, send_sizes, recv_sizes, out, reads_when(async_op, copy))
        return self._dispatcher.collective(*operation, async_op, timeout_s)

    def barrier(self, *, async_op: bool = False, timeout_s: Timeout = None) -> ResultOrWork:
        """Wait until every rank has called it; return None."""
        try:
            if not async_op and timeout_s is None and self._fast_calls.barrier():
                return None
        except BaseException as error:  # it may have left the call in the middle
            self._dispatcher.interrupted("barrier", error)
            raise
        return self._dispatcher.collective(*self._operations.barrier(), async_op, timeout_s)

    def _gathered_rows(
        self, sizes: Sizes, x: Input, timeout_s: float | None
    ) -> tuple[tuple[int, ...] | None, float | None]:
        """Check the rows of all ranks, or exchange them where `sizes` is "any"; return them and the time left."""
        if not isinstance(sizes, str) or sizes != "any":
            return uneven.checked_sizes(sizes, self.world_size), timeout_s
        array = self._check_input(x, moved=True).array
        with self._dispatcher.sequence("all_gather", timeout_s) as remaining_s:
            own = array.shape[0] if array.ndim else 1
            return tuple(self.all_gather(np.array(own), timeout_s=remaining_s()).tolist()), remaining_s()
