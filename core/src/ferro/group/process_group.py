"""ProcessGroup: the ranks that work together, as one of them sees it.

The group checks a call, then hands it to the backend. Its collectives on arrays are in `array_collectives` and
`blockwise_collectives`, its transfers in `transfer_methods`, Python values in `object_methods`, its persistent
operations in `persistent_methods`; here are groups inside the group, and its end.
"""

from __future__ import annotations

import weakref
from collections.abc import Callable, Sequence
from typing import NoReturn

import numpy as np

from ferro.backend import Backend
from ferro.collectives.label import Call
from ferro.errors import PeerLost, UsageError
from ferro.group.coalescing import Coalescing
from ferro.group.group_info import GroupInfo
from ferro.group.persistent_methods import PersistentMethods
from ferro.group.subgroups import Subgroups, lost_host_named, split_backend
from ferro.types import Device

# How long the rank that hosts the store waits at the end for the ranks that still need it: in a group that works, and
# in a group that has failed.
_CLOSE_TIMEOUT_S = 10.0
_FAILED_CLOSE_TIMEOUT_S = 2.0
_SPLIT = Call("barrier", detail="split")


class ProcessGroup(PersistentMethods):
    """The ranks that work together, as one of them sees it.

    All ranks make the same collective calls in the same order, with the same shapes (except sizes declared uneven),
    dtypes, reductions and roots. Inputs are never modified and may be reused as soon as a call returns, even an
    asynchronous one (unless with `copy=False`); an array given as `out` may not be touched before the operation has
    ended. Arrays are NumPy's, CuPy's, or any library's that supports DLPack; the result is of the same kind, or `out`
    itself where that is given. Collectives on arrays are in `ArrayCollectives`, with the arguments
    that all take, transfers in `TransferMethods`.

    Errors that all may raise
        UsageError, UnsupportedError: wrong or impossible arguments. Nothing was sent; the group is still good.
        CollectiveMismatch, CollectiveTimeout, PeerLost: on every rank, with one cause. The group is dead, `out` is
            undefined.
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
        self, backend: Backend, info: GroupInfo, *, on_close: Callable[[float, bool], None] | None = None
    ) -> None:
        super().__init__(backend, info)
        self._info = info
        self.local_rank = info.local_rank
        self.global_ranks = info.global_ranks
        self.timeout_s = info.timeout_s
        self._subgroups = Subgroups(backend, info)
        self._on_close = on_close
        # The order of creation, the same on all ranks, in which some libraries need their groups to be closed.
        self._children: list[weakref.ref[ProcessGroup]] = []

    def __repr__(self) -> str:
        return (
            f"<ProcessGroup {self.name!r}, rank {self.rank} of {self.world_size}, "
            f"{self.backend_name}, {self._dispatcher.state}>"
        )

    def __reduce__(self) -> NoReturn:
        """Refuse pickle, because a group stands for connections of this process.

        Raises:
            UsageError: always.
        """
        raise UsageError(
            f"group {self.name!r} cannot be pickled, nor can an object that holds it, such as a model: it stands for "
            "this process's connections. Save the model's state_dict(), or pickle a model without its strategy."
        )

    def __deepcopy__(self, memo: dict[int, object]) -> ProcessGroup:
        """Return the group itself: a copied model works with the same ranks."""
        return self

    def __enter__(self) -> ProcessGroup:
        return self

    def __exit__(self, kind: object, error: BaseException | None, trace: object) -> None:
        self._end(in_good_order=error is None)

    @property
    def state(self) -> str:
        """The group's state: "open", "dead" after a failure, or "closed"."""
        return self._dispatcher.state

    @property
    def backend(self) -> Backend:
        """The group's backend, for features that only it has; collectives and transfers go through the group."""
        return self._backend

    def coalesce(self) -> Coalescing:
        """Collect all_reduce and broadcast calls in a `with` block; send them as a few large ones.

        with group.coalesce() as together:
            for array in many:
                together.all_reduce(array, out=array)
        """
        return Coalescing(self)

    # -- groups inside the group, and its end ----------------------------------------------------

    def split(self, color: int | None, *, key: float = 0, timeout_s: float | None = None) -> ProcessGroup | None:
        """Return the group of all ranks that gave the same `color`; all ranks call it.

        Args:
            color: number of the group to join, not negative; None joins no group and returns None.
            key: any number; members are ordered by key, then by their rank in this group.
        """
        if color is not None and (not isinstance(color, int | np.integer) or color < 0):
            raise UsageError(f"split: color must be None or a number from 0, not {color!r}")
        if not isinstance(key, int | float | np.integer | np.floating) or key != key:
            raise UsageError(f"split: key must be a number, by which the members are ordered, not {key!r}")
        with self._dispatcher.sequence("split", timeout_s) as remaining_s:
            table = self.all_gather_object([color, key], timeout_s=remaining_s())
            members = [r for r in range(self.world_size) if color is not None and table[r][0] == color]
            ranks = tuple(sorted(members, key=lambda r: (table[r][1], r)))
            with lost_host_named(self._info, self.rank, "split"):
                context = self._subgroups.agree_on_context(ranks, remaining_s()) if ranks else 0
            made: list[Backend | None] = []

            def split(*, deadline: float) -> None:
                made.append(split_backend(self._backend, ranks or None, context))

            backend = self._dispatcher.collective(_SPLIT, split, made.pop, 0, Device.CPU, False, remaining_s())
            if backend is None:
                return None
            return self._child(ProcessGroup(backend, self._info.subgroup(ranks, f"{self.name}.{color}", context)))

    def subgroup(
        self, ranks: Sequence[int], *, name: str | None = None, timeout_s: float | None = None
    ) -> ProcessGroup:
        """Return the group of these ranks, in this order; only its members call it.

        Groups may overlap and be used at the same time. Every member calls it with the same list, and groups with the
        same list in the same order.
        """
        timeout_s = self._dispatcher.checked_timeout(timeout_s)
        self._dispatcher.check_open("subgroup")
        with lost_host_named(self._info, self.rank, "subgroup"):
            return self._child(ProcessGroup(*self._subgroups.subgroup(ranks, name, timeout_s)))

    def shrink(self, *, timeout_s: float | None = None) -> ProcessGroup:
        """Return the group of the ranks that are left, after this group died; all of them call it.

        A rank that has not called it `timeout_s` after the first is left out. This group's own subgroups that lost a
        member are dead as well; make them anew from the result.

        Args:
            timeout_s: how long to wait for the others in seconds; the group's when None.

        Raises:
            UsageError: the group is not dead.
            UnsupportedError: the backend cannot go on after a failure.
            RendezvousError: this rank came too late, or the rank that decides died as well.
        """
        timeout_s = self._dispatcher.checked_timeout(timeout_s)
        failure = self._dispatcher.failure("shrink")
        lost = failure.peer if isinstance(failure, PeerLost) else None
        with lost_host_named(self._info, self.rank, "shrink"):
            return self._child(ProcessGroup(*self._subgroups.shrink(lost, timeout_s)))

    def close(self) -> None:
        """Let outstanding operations end, then release the connections. Idempotent.

        Subgroups share their parent's connections, and are closed with it.
        """
        self._end(in_good_order=True)

    def abandon(self) -> None:
        """Release the connections at once; peers that still wait for this rank lose it."""
        self._end(in_good_order=False)

    def abort(self) -> None:
        """End all operations at once, on every rank; the group is dead afterwards."""
        self._dispatcher.abort()

    def _child(self, group: ProcessGroup) -> ProcessGroup:
        self._children = [ref for ref in self._children if ref() is not None]
        self._children.append(weakref.ref(group))
        return group

    def _end(self, *, in_good_order: bool, leaving: bool = False) -> None:
        leaving = leaving or self._on_close is not None  # only the world has it
        for ref in self._children:
            if (child := ref()) is not None:
                child._end(in_good_order=in_good_order, leaving=leaving)
        works = in_good_order and self._dispatcher.state != "dead"
        self._dispatcher.close(self.timeout_s if in_good_order else 0.0, leaving=leaving)
        on_close, self._on_close = self._on_close, None
        if on_close is not None:
            on_close(_CLOSE_TIMEOUT_S if works else _FAILED_CLOSE_TIMEOUT_S, in_good_order)
