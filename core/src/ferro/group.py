"""ProcessGroup: checks a call, then hands it to the backend.

Everything that a user's call needs and no backend should repeat happens here, once: argument
checks, shapes, `out`, views and copies. The dispatcher carries the operation out.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from types import TracebackType
from typing import Any, TypeAlias

import numpy as np
import numpy.typing as npt

from ferro import objects
from ferro.arrays import Array, Entry, Input, dtype_named, name_of, writable
from ferro.backend import Backend
from ferro.calls import MAX_TAG, Call, transfer_call
from ferro.coalesce import Coalescing
from ferro.dispatch import Dispatcher
from ferro.errors import PeerLost, UnsupportedError, UsageError
from ferro.members import Members
from ferro.reduction import ReduceFunction, Reduction, reduction_for
from ferro.shapes import Outlet, checked_sizes, concatenated, cut_rows, flat, gathered_rows
from ferro.subgroups import Subgroups
from ferro.types import Device, ReduceOp

# The result as the caller's own kind of array, or a Work of it when async_op is true. It is Any
# because two overloads for each of fifteen methods would bury the contract.
Outcome: TypeAlias = Any
Op: TypeAlias = ReduceOp | str | ReduceFunction

# How long a rank that others still need at the end (it hosts the store) waits for them, when all
# went well and when not.
_PATIENCE_S = 10.0
_HASTE_S = 2.0


class ProcessGroup:
    """The ranks that work together, as one of them sees it.

    All ranks make the same collective calls in the same order, with the same shapes (but for
    sizes declared uneven), dtypes, reductions and roots. Inputs are never modified and may be
    reused as soon as a call returns, even an asynchronous one; what is given as `out` may not be
    touched before the operation has ended. Arrays are NumPy's, CuPy's, or any library's that
    speaks DLPack; the result is of the same kind, or `out` itself where that is given.

    Arguments that all collectives take
        out: where the result goes: contiguous, writable, of the result's shape and dtype. It may
            be the input itself.
        async_op: return a `Work` at once; its `wait()` returns the result. Any number may be
            outstanding; they run in the order issued.
        timeout_s: deadline of the whole operation in seconds; the group's when None.

    Errors that all may raise
        UsageError, UnsupportedError: wrong or impossible arguments. Nothing was sent; the group
            is still good.
        CollectiveMismatch, CollectiveTimeout, PeerLost: on every rank, with one cause. The
            group is dead, `out` is undefined.
        GroupClosed: it was closed or aborted, or died before.

    Attributes:
        name: its name, for messages.
        rank: this process's rank in it.
        world_size: number of ranks in it.
        local_rank: number of this process on its host.
        backend_name: name of the backend.
        global_ranks: the members' ranks in the world, by rank in this group.
        timeout_s: deadline of calls that give none, in seconds.
    """

    def __init__(
        self,
        backend: Backend,
        members: Members,
        *,
        on_close: Callable[[float], None] | None = None,
    ) -> None:
        self.name = members.name
        self.rank = backend.rank
        self.world_size = backend.world_size
        self.local_rank = members.local_rank
        self.backend_name = members.backend_name
        self.global_ranks = members.global_ranks
        self.timeout_s = members.timeout_s
        self._members = members
        self._backend = backend
        self._dispatch = Dispatcher(backend, members)
        self._subgroups = Subgroups(backend, members)
        self._on_close = on_close
        self._told_host_copy = False

    def __repr__(self) -> str:
        return (
            f"<ProcessGroup {self.name!r}, rank {self.rank} of {self.world_size}, "
            f"{self.backend_name}, {self._dispatch.state}>"
        )

    def __enter__(self) -> ProcessGroup:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        if error is None:
            self.close()
        else:
            self.abandon()

    # -- collectives on arrays -------------------------------------------------------------------

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
        result.array[...] = entry.array
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
        result.array[...] = entry.array
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
            result.array[...] = entry.array
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
        own[...] = entry.array.reshape(-1)
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
        dtype, shape, rows = objects.broadcast(self, head, root, "msgpack", timeout_s)
        source = None if entry is None else flat(entry.array, private=async_op)
        entry = entry or Entry(np.empty(0, dtype_named(dtype)))
        _, counts = concatenated(np.empty((0, *shape[1:])), rows)
        result = Outlet(entry, out, (rows[self.rank], *shape[1:]))
        return self._collect(
            Call("scatter", dtype=dtype, count=sum(counts), root=root),
            lambda deadline: self._backend.scatter(
                result.flat, source, counts, root, deadline=deadline
            ),
            result,
            async_op,
            timeout_s,
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
        private = async_op or (out is not None and np.may_share_memory(result.array, entry.array))
        source = flat(entry.array, private=private)
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
            recv_sizes: rows from every rank; when None, the ranks tell each other first.
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
        if recv_sizes is not None:
            receiving = checked_sizes(recv_sizes, n, "recv_sizes")
        elif uneven:
            receiving = self.all_to_all(np.array(sending), timeout_s=timeout_s).tolist()
        else:
            receiving = sending
        if sending[self.rank] != receiving[self.rank]:
            raise UsageError(
                f"all_to_all: rank {self.rank} sends itself {sending[self.rank]} rows but "
                f"receives {receiving[self.rank]}",
                op="all_to_all",
            )
        _, send_counts = concatenated(entry.array, sending)
        shape, recv_counts = concatenated(entry.array, receiving)
        result = Outlet(entry, out, shape)
        private = async_op or (out is not None and np.may_share_memory(result.array, entry.array))
        source = flat(entry.array, private=private)
        shape_call = self._call("all_to_all", entry.array[:0] if uneven else entry.array)
        return self._collect(
            shape_call,
            lambda deadline: self._backend.all_to_all(
                source, result.flat, send_counts, recv_counts, deadline=deadline
            ),
            result,
            async_op,
            timeout_s,
            nbytes=source.nbytes,
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

    def coalesce(self) -> Coalescing:
        """Collect all_reduce and broadcast calls in a `with` block; send them as few.

        with group.coalesce() as together:
            for array in many:
                together.all_reduce(array, out=array)
        """
        return Coalescing(self)

    # -- transfers between two ranks -------------------------------------------------------------

    def send(
        self,
        x: Input,
        dst: int,
        tag: int = 0,
        *,
        async_op: bool = False,
        timeout_s: float | None = None,
    ) -> Outcome:
        """Send `x` to rank `dst`, which must call `recv` with the same tag, dtype and size.

        Messages with one tag arrive in the order sent. Returns None, or a Work.
        """
        self._check_peer(dst, "send to", tag)
        entry = self._enter(x)
        buffer = flat(entry.array, private=async_op)
        return self._dispatch.transfer(
            (("send", dst),),
            transfer_call(name_of(buffer.dtype), buffer.size),
            lambda deadline: self._dispatch.send(buffer, dst, tag, deadline),
            lambda: None,
            nbytes=buffer.nbytes,
            async_op=async_op,
            timeout_s=timeout_s,
        )

    def recv(
        self,
        buffer: Input,
        src: int,
        tag: int = 0,
        *,
        async_op: bool = False,
        timeout_s: float | None = None,
    ) -> Outcome:
        """Fill `buffer` with what rank `src` sends with this tag; return `buffer`, or a Work.

        Args:
            buffer: contiguous and writable, with the dtype and number of elements sent.
            src: the sender.
            tag: from 0 to 2**31 - 1.
            async_op: see the class; so `timeout_s`.
        """
        self._check_peer(src, "receive from", tag)
        target = self._target(buffer)
        return self._dispatch.transfer(
            (("recv", src),),
            transfer_call(name_of(target.dtype), target.size),
            lambda deadline: self._dispatch.recv(target, src, tag, deadline),
            lambda: buffer,
            nbytes=target.nbytes,
            async_op=async_op,
            timeout_s=timeout_s,
        )

    def sendrecv(
        self,
        x: Input,
        buffer: Input,
        dst: int,
        src: int | None = None,
        tag: int = 0,
        *,
        async_op: bool = False,
        timeout_s: float | None = None,
    ) -> Outcome:
        """Send `x` to `dst` and fill `buffer` from `src` (or `dst`) at the same time.

        Never deadlocks, whatever the ranks' order. Returns `buffer`, or a Work.
        """
        src = dst if src is None else src
        self._check_peer(dst, "send to", tag)
        self._check_peer(src, "receive from", tag)
        source = flat(self._enter(x).array, private=async_op)
        target = self._target(buffer)
        if np.may_share_memory(source, target):
            source = source.copy()
        return self._dispatch.transfer(
            (("send", dst), ("recv", src)),
            transfer_call(name_of(source.dtype), source.size),
            lambda deadline: self._dispatch.exchange(source, dst, target, src, tag, deadline),
            lambda: buffer,
            nbytes=source.nbytes + target.nbytes,
            async_op=async_op,
            timeout_s=timeout_s,
        )

    # -- small Python values ---------------------------------------------------------------------

    def broadcast_object(
        self,
        value: object = None,
        root: int = 0,
        *,
        codec: objects.Codec = "msgpack",
        timeout_s: float | None = None,
    ) -> Any:
        """Return the root's `value` on every rank.

        Args:
            value: None, numbers, strings, bytes, lists, dicts, NumPy arrays, nested; anything
                with codec="pickle". Tuples come back as lists.
            root: the rank that gives it.
            codec: "msgpack" runs no code. "pickle" lets every rank run code on every other: only
                where all are trusted.
            timeout_s: deadline in seconds; the group's when None.
        """
        self._check_rank(root, "root")
        return objects.broadcast(self, value, root, codec, timeout_s)

    def all_gather_object(
        self,
        value: object,
        *,
        codec: objects.Codec = "msgpack",
        timeout_s: float | None = None,
    ) -> list[Any]:
        """Return the list of every rank's `value`, in order of rank. See `broadcast_object`."""
        return objects.all_gather(self, value, codec, timeout_s)

    def gather_object(
        self,
        value: object,
        root: int = 0,
        *,
        codec: objects.Codec = "msgpack",
        timeout_s: float | None = None,
    ) -> list[Any] | None:
        """Return the list of every rank's `value` at `root`, None elsewhere."""
        self._check_rank(root, "root")
        return objects.gather(self, value, root, codec, timeout_s)

    def scatter_object(
        self,
        values: Sequence[object] | None = None,
        root: int = 0,
        *,
        codec: objects.Codec = "msgpack",
        timeout_s: float | None = None,
    ) -> Any:
        """Return this rank's item of the root's list of n `values`."""
        self._check_rank(root, "root")
        return objects.scatter(self, values, root, codec, timeout_s)

    def send_object(
        self,
        value: object,
        dst: int,
        tag: int = 0,
        *,
        codec: objects.Codec = "msgpack",
        timeout_s: float | None = None,
    ) -> None:
        """Send a small Python value to rank `dst`."""
        objects.send(self, value, dst, tag, codec, timeout_s)

    def recv_object(
        self,
        src: int,
        tag: int = 0,
        *,
        codec: objects.Codec = "msgpack",
        timeout_s: float | None = None,
    ) -> Any:
        """Return the value that rank `src` sends with `send_object`."""
        return objects.recv(self, src, tag, codec, timeout_s)

    # -- memory and groups -----------------------------------------------------------------------

    def empty(self, shape: int | Sequence[int], dtype: npt.DTypeLike = np.float32) -> Array:
        """Return an uninitialised array in the memory that this backend moves fastest."""
        shape = (shape,) if isinstance(shape, int) else tuple(shape)
        kind = np.dtype(dtype)
        nbytes = math.prod(shape) * kind.itemsize
        return self._backend.allocate(nbytes)[:nbytes].view(kind).reshape(shape)

    def split(
        self, color: int | None, *, key: int = 0, timeout_s: float | None = None
    ) -> ProcessGroup | None:
        """Return the group of all ranks that gave the same `color`; all ranks call it.

        Args:
            color: which group to be in, not negative; None for none (and None is returned).
            key: members are ordered by it, then by their rank here.
            timeout_s: deadline in seconds; the group's when None.
        """
        if color is not None and color < 0:
            raise UsageError(f"split: color must be None or at least 0, not {color}")
        mine = np.array([[-1 if color is None else color, key]])
        table = self.all_gather(mine, timeout_s=timeout_s)
        if color is None:
            return None
        members = [r for r in range(self.world_size) if table[r, 0] == color]
        members.sort(key=lambda r: (table[r, 1], r))
        return self.subgroup(members, name=f"{self.name}.{color}", timeout_s=timeout_s)

    def subgroup(
        self, ranks: Sequence[int], *, name: str | None = None, timeout_s: float | None = None
    ) -> ProcessGroup:
        """Return the group of these ranks, in this order; only its members call it.

        Groups may overlap and be used at the same time. Every member calls it with the same
        list, and groups with the same list in the same order.
        """
        seconds = self._dispatch.seconds(timeout_s)
        self._dispatch.check_open("subgroup")
        backend, members = self._subgroups.make(ranks, name, seconds)
        return ProcessGroup(backend, members)

    def shrink(self, *, timeout_s: float | None = None) -> ProcessGroup:
        """Return the group of the ranks that are left, after this group died; all of them call it.

        Whoever has not called it `timeout_s` after the first is left out. This group's own
        subgroups that lost a member are dead as well; make them anew from the result.

        Args:
            timeout_s: how long to wait for the others in seconds; the group's when None.

        Raises:
            UsageError: the group is not dead.
            UnsupportedError: the backend cannot go on after a failure.
            RendezvousError: this rank came too late, or whoever decides died as well.
        """
        seconds = self._dispatch.seconds(timeout_s)
        cause = self._dispatch.cause_of_death("shrink")
        lost = cause.peer if isinstance(cause, PeerLost) else None
        backend, members = self._subgroups.survivors(lost, seconds)
        return ProcessGroup(backend, members)

    def close(self) -> None:
        """Let outstanding operations end, then release the connections. Idempotent."""
        self._dispatch.close(self.timeout_s)
        self._leave(_PATIENCE_S)

    def abandon(self) -> None:
        """Release the connections at once; peers that still wait for this rank lose it."""
        self._dispatch.close(0.0)
        self._leave(_HASTE_S)

    def abort(self) -> None:
        """End all operations at once, on every rank; the group is dead afterwards."""
        self._dispatch.abort()

    def _leave(self, patience_s: float) -> None:
        on_close, self._on_close = self._on_close, None
        if on_close is not None:
            on_close(patience_s)

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

    def _target(self, buffer: Input) -> Array:
        entry = self._enter(buffer)
        array = writable(buffer, entry.array.shape, entry.array.dtype, entry.device)
        return array.reshape(-1)

    def _check_rank(self, rank: int, what: str) -> None:
        if not isinstance(rank, int | np.integer) or not 0 <= rank < self.world_size:
            raise UsageError(
                f"{what} is {rank!r}; group {self.name!r} has ranks 0 to {self.world_size - 1}",
                group=self.name,
                rank=self.rank,
            )

    def _check_peer(self, peer: int, what: str, tag: int) -> None:
        self._check_rank(peer, "peer")
        if peer == self.rank:
            raise UsageError(
                f"rank {self.rank} cannot {what} itself: copy the array instead",
                group=self.name,
                rank=self.rank,
                peer=peer,
            )
        if not 0 <= tag <= MAX_TAG:
            raise UsageError(f"tag is {tag}; tags go from 0 to {MAX_TAG}")

    def _call(
        self,
        op: str,
        array: Array,
        *,
        reduction: Reduction | None = None,
        sizes: Sequence[int] | None = None,
        root: int = -1,
    ) -> Call:
        """Describe a call as all ranks must make it; rows are left out where they may differ."""
        shape = array.shape if sizes is None else array.shape[1:]
        detail = f"shape {'x'.join(map(str, shape)) or 'scalar'}"
        if sizes is not None:
            detail = f"sizes {','.join(map(str, sizes))} of {detail}"
        return Call(
            op,
            dtype=name_of(array.dtype),
            count=array.size if sizes is None else sum(sizes),
            reduction=reduction.name if reduction else "",
            root=root,
            detail=detail,
        )

    def _collect(
        self,
        call: Call,
        action: Callable[[float], None],
        result: Outlet | None,
        async_op: bool,
        timeout_s: float | None,
        *,
        nbytes: int | None = None,
    ) -> Outcome:
        if nbytes is None:
            nbytes = 0 if result is None else result.flat.nbytes
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
