"""ProcessGroup: the ranks that work together, as one of them sees it.

It checks a call, then hands it to the backend. The collectives on arrays are next door, in
`array_collectives`; here are transfers, Python values, groups inside the group, and its end.
"""

from __future__ import annotations

import math
import weakref
from collections.abc import Callable, Sequence
from dataclasses import replace
from types import TracebackType
from typing import TYPE_CHECKING, Any

import numpy as np

from ferro.arrays import Input, device_of
from ferro.backend import Backend
from ferro.collectives.label import Call, array_call
from ferro.collectives.reduction import reduction_for
from ferro.errors import PeerLost, UsageError
from ferro.group import objects
from ferro.group.arguments import OutputBuffer, flat
from ferro.group.array_collectives import ArrayCollectives, Op, Outcome, no_result
from ferro.group.coalescing import Coalescing
from ferro.group.dispatcher import ChannelKey
from ferro.group.group_info import GroupInfo
from ferro.group.subgroups import Subgroups
from ferro.types import Array

if TYPE_CHECKING:
    import numpy.typing as npt

# How long a rank that others still need at the end (it hosts the store) waits for them, when all
# went well and when not.
_PATIENCE_S = 10.0
_HASTE_S = 2.0
_SPLIT = Call("barrier", detail="split")


class ProcessGroup(ArrayCollectives):
    """The ranks that work together, as one of them sees it.

    All ranks make the same collective calls in the same order, with the same shapes (but for
    sizes declared uneven), dtypes, reductions and roots. Inputs are never modified and may be
    reused as soon as a call returns, even an asynchronous one (but with `copy=False`); what is
    given as `out` may not be touched before the operation has ended. Arrays are NumPy's, CuPy's,
    or any library's that speaks DLPack; the result is of the same kind, or `out` itself where
    that is given. Collectives on arrays are in `ArrayCollectives`, with the arguments that all
    take.
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
        self, backend: Backend, members: GroupInfo, *, on_close: Callable[[float, bool], None] | None = None
    ) -> None:
        super().__init__(backend, members)
        self.local_rank = members.local_rank
        self.global_ranks = members.global_ranks
        self.timeout_s = members.timeout_s
        self._subgroups = Subgroups(backend, members)
        self._on_close = on_close
        # In the order made: on all ranks the same, as some libraries need when groups are closed.
        self._children: list[weakref.ref[ProcessGroup]] = []

    def __repr__(self) -> str:
        return (
            f"<ProcessGroup {self.name!r}, rank {self.rank} of {self.world_size}, "
            f"{self.backend_name}, {self._dispatch.state}>"
        )

    def __deepcopy__(self, memo: dict[int, object]) -> ProcessGroup:
        """Return the group itself: a copied model works with the same ranks."""
        return self

    def __enter__(self) -> ProcessGroup:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if error is None:
            self.close()
        else:
            self.abandon()

    @property
    def backend(self) -> Backend:
        """The backend below, for what it alone offers; a group's calls go through the group."""
        return self._backend

    def coalesce(self) -> Coalescing:
        """Collect all_reduce and broadcast calls in a `with` block; send them as few.

        with group.coalesce() as together:
            for array in many:
                together.all_reduce(array, out=array)
        """
        return Coalescing(self)

    def _coalesced(self, op: str, how: Op | int, together: Array, parts: str) -> None:
        """Make one call of a coalesced many, in place; `parts` says what it is made of."""
        if op == "all_reduce":
            reduction = reduction_for(how, together.dtype, self.world_size)  # type: ignore[arg-type]
            call = array_call(op, together.dtype, together.shape, reduction.name)

            def action(deadline: float) -> None:
                self._backend.all_reduce(together, reduction, deadline=deadline)
        else:
            assert isinstance(how, int), "a broadcast has a root"
            call = array_call(op, together.dtype, together.shape, root=how)

            def action(deadline: float) -> None:
                self._backend.broadcast(together, how, deadline=deadline)

        call = replace(call, detail=f"shapes {parts}")
        device = device_of(together)
        self._dispatch.collective(call, action, no_result, together.nbytes, False, None, device)

    # -- transfers between two ranks -------------------------------------------------------------

    def send(
        self,
        x: Input,
        dst: int,
        tag: int = 0,
        *,
        async_op: bool = False,
        copy: bool = True,
        timeout_s: float | None = None,
    ) -> Outcome:
        """Send `x` to rank `dst`, which must call `recv` with the same tag, dtype and size.

        Messages with one tag arrive in the order sent; those with different tags do not wait
        for each other. Returns None, or a Work.
        """
        self._check_peer(dst, "send to", tag)
        entry = self._enter(x)
        buffer = flat(entry.array, private=async_op and copy)
        return self._dispatch.transfer(
            "send",
            (ChannelKey("send", dst, tag),),
            lambda deadline: self._dispatch.send(buffer, dst, tag, deadline),
            no_result,
            nbytes=buffer.nbytes,
            async_op=async_op,
            timeout_s=timeout_s,
            device=entry.device,
        )

    def recv(
        self, buffer: Input, src: int, tag: int = 0, *, async_op: bool = False, timeout_s: float | None = None
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
            "recv",
            (ChannelKey("recv", src, tag),),
            lambda deadline: self._dispatch.recv(target.flat, src, tag, deadline),
            target,
            nbytes=target.flat.nbytes,
            async_op=async_op,
            timeout_s=timeout_s,
            device=target.device,
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
        copy: bool = True,
        timeout_s: float | None = None,
    ) -> Outcome:
        """Send `x` to `dst` and fill `buffer` from `src` (or `dst`) at the same time.

        Never deadlocks, whatever the ranks' order. Returns `buffer`, or a Work.
        """
        src = dst if src is None else src
        self._check_peer(dst, "send to", tag)
        self._check_peer(src, "receive from", tag)
        entry = self._enter(x)
        source = flat(entry.array, private=async_op and copy)
        target = self._target(buffer)
        if entry.device is target.device and np.may_share_memory(source, target.flat):
            source = source.copy()
        return self._dispatch.transfer(
            "sendrecv",
            (ChannelKey("send", dst, tag), ChannelKey("recv", src, tag)),
            lambda deadline: self._dispatch.exchange(source, dst, target.flat, src, tag, deadline),
            target,
            nbytes=source.nbytes + target.flat.nbytes,
            async_op=async_op,
            timeout_s=timeout_s,
            device=entry.device,
        )

    # -- small Python values ---------------------------------------------------------------------

    def broadcast_object(
        self, value: object = None, root: int = 0, *, codec: objects.Codec = "msgpack", timeout_s: float | None = None
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
        return objects.broadcast(self, value, root, codec, self._dispatch.countdown(timeout_s))

    def all_gather_object(
        self, value: object, *, codec: objects.Codec = "msgpack", timeout_s: float | None = None
    ) -> list[Any]:
        """Return the list of every rank's `value`, in order of rank. See `broadcast_object`."""
        return objects.all_gather(self, value, codec, self._dispatch.countdown(timeout_s))

    def gather_object(
        self, value: object, root: int = 0, *, codec: objects.Codec = "msgpack", timeout_s: float | None = None
    ) -> list[Any] | None:
        """Return the list of every rank's `value` at `root`, None elsewhere."""
        self._check_rank(root, "root")
        return objects.gather(self, value, root, codec, self._dispatch.countdown(timeout_s))

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
        return objects.scatter(self, values, root, codec, self._dispatch.countdown(timeout_s))

    def send_object(
        self, value: object, dst: int, tag: int = 0, *, codec: objects.Codec = "msgpack", timeout_s: float | None = None
    ) -> None:
        """Send a small Python value to rank `dst`."""
        objects.send(self, value, dst, tag, codec, self._dispatch.countdown(timeout_s))

    def recv_object(
        self, src: int, tag: int = 0, *, codec: objects.Codec = "msgpack", timeout_s: float | None = None
    ) -> Any:
        """Return the value that rank `src` sends with `send_object`."""
        return objects.recv(self, src, tag, codec, self._dispatch.countdown(timeout_s))

    # -- memory and groups -----------------------------------------------------------------------

    def empty(self, shape: int | Sequence[int], dtype: npt.DTypeLike = np.float32) -> Array:
        """Return an uninitialised array in the memory that this backend moves fastest.

        A late rank may write to it when a collective with it has failed: then take a new one.
        """
        sizes = (shape,) if isinstance(shape, int | np.integer) else tuple(shape)
        if any(size < 0 for size in sizes):
            raise UsageError(f"empty: no size may be negative, but the shape is {sizes}")
        kind = np.dtype(dtype)
        nbytes = math.prod(sizes) * kind.itemsize
        return self._backend.allocate(nbytes)[:nbytes].view(kind).reshape(sizes)

    def split(self, color: int | None, *, key: int = 0, timeout_s: float | None = None) -> ProcessGroup | None:
        """Return the group of all ranks that gave the same `color`; all ranks call it.

        Args:
            color: which group to be in, not negative; None for none (and None is returned).
            key: members are ordered by it, then by their rank here.
            timeout_s: deadline in seconds; the group's when None.
        """
        whole = isinstance(color, int | np.integer)
        if color is not None and (not whole or color < 0):
            raise UsageError(f"split: color must be None or a number from 0, not {color!r}")
        mine = np.array([[-1 if color is None else color, key]])
        left_s = self._dispatch.countdown(timeout_s)
        table = self.all_gather(mine, timeout_s=left_s())
        members = [r for r in range(self.world_size) if color is not None and table[r, 0] == color]
        members.sort(key=lambda r: (table[r, 1], r))
        parting = self._subgroups.part(members, f"{self.name}.{color}", left_s())
        made = self._dispatch.collective(_SPLIT, parting.run, parting, 0, False, left_s())
        return None if made is None else self._child(ProcessGroup(*made))

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
        return self._child(ProcessGroup(backend, members))

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
        return self._child(ProcessGroup(backend, members))

    def close(self) -> None:
        """Let outstanding operations end, then release the connections. Idempotent.

        Subgroups share their parent's connections, and are closed with it.
        """
        for child in self._living_children():
            child.close()
        patience_s = _HASTE_S if self._dispatch.state == "dead" else _PATIENCE_S
        self._dispatch.close(self.timeout_s)
        self._leave(patience_s, farewell=True)

    def abandon(self) -> None:
        """Release the connections at once; peers that still wait for this rank lose it."""
        for child in self._living_children():
            child.abandon()
        self._dispatch.close(0.0)
        self._leave(_HASTE_S, farewell=False)

    def abort(self) -> None:
        """End all operations at once, on every rank; the group is dead afterwards."""
        self._dispatch.abort()

    def _child(self, group: ProcessGroup) -> ProcessGroup:
        self._children = [ref for ref in self._children if ref() is not None]
        self._children.append(weakref.ref(group))
        return group

    def _living_children(self) -> list[ProcessGroup]:
        return [child for ref in self._children if (child := ref()) is not None]

    def _leave(self, patience_s: float, *, farewell: bool) -> None:
        on_close, self._on_close = self._on_close, None
        if on_close is not None:
            on_close(patience_s, farewell)

    def _target(self, buffer: Input) -> OutputBuffer:
        entry = self._enter(buffer)
        return OutputBuffer(entry, buffer, entry.array.shape, what="buffer")
