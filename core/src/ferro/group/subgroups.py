"""Groups inside a group: the agreement on their numbers, and the backend they have by default."""

from __future__ import annotations

import operator
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import TYPE_CHECKING

from ferro.backend import Backend, Completion
from ferro.collectives.label import MAX_CONTEXT, in_context
from ferro.errors import FerroError, PeerLost, RendezvousError, UsageError
from ferro.group import codec
from ferro.group.group_info import GroupInfo, get_in_time
from ferro.types import Array

if TYPE_CHECKING:
    from ferro.rendezvous.store.interface import Store

_ASK_S = 0.25  # how often a rank that waits for another one asks whether that one has died


def subgroup_backend(parent: Backend, ranks: Sequence[int], context: int) -> Backend:
    """Make the backend of a group of some of the parent's ranks: its own kind, or the default."""
    backend = parent.subgroup(ranks, context)
    return SubgroupBackend(parent, ranks, context) if backend is None else backend


def split_backend(parent: Backend, ranks: Sequence[int] | None, context: int) -> Backend | None:
    """Split a group into several at once; return None on a rank that joins none of them."""
    backend = parent.split(ranks, context)
    return SubgroupBackend(parent, ranks, context) if backend is None and ranks is not None else backend


@contextmanager
def lost_host_named(info: GroupInfo, rank: int, op: str) -> Iterator[None]:
    """Raise PeerLost where a call finds that the rank which hosted the store is dead."""
    try:
        yield
    except RendezvousError as error:
        if error.peer is None or getattr(error, "orderly", True):  # it is not StoreGone, or the host was done
            raise
        peer = info.global_ranks.index(error.peer) if error.peer in info.global_ranks else None
        raise PeerLost(f"{op} on group {info.name!r}: {error}", op=op, group=info.name, rank=rank, peer=peer) from error


class Subgroups:
    """Makes the subgroups of one group, each with a number that no other group of the job has."""

    def __init__(self, backend: Backend, info: GroupInfo) -> None:
        self._backend = backend
        self._info = info
        self._made: dict[tuple[int, ...], int] = {}
        self._shrunk = 0

    def subgroup(self, ranks: Sequence[int], name: str | None, timeout_s: float) -> tuple[Backend, GroupInfo]:
        """Make the group of these ranks, of which this is one."""
        try:
            ranks = tuple(operator.index(rank) for rank in ranks)
        except TypeError:
            raise UsageError(f"subgroup: ranks are whole numbers, not {ranks!r}") from None
        n, me = self._backend.world_size, self._backend.rank
        if any(not 0 <= rank < n for rank in ranks):
            raise UsageError(f"subgroup {ranks}: group {self._info.name!r} has ranks 0 to {n - 1}")
        if len(set(ranks)) != len(ranks):
            raise UsageError(f"subgroup {ranks} names a rank twice")
        if me not in ranks:
            raise UsageError(f"subgroup {ranks} does not include this rank, {me}: only members call it")
        context = self.agree_on_context(ranks, timeout_s)
        name = name or f"{self._info.name}[{','.join(map(str, ranks))}]"
        return subgroup_backend(self._backend, ranks, context), self._info.subgroup(ranks, name, context)

    def shrink(self, lost: int | None, timeout_s: float) -> tuple[Backend, GroupInfo]:
        """Make the group of all ranks that call this in time.

        The first rank to call it waits for the others, except the one known to be lost, and publishes the members.
        """
        n, rank, name = self._backend.world_size, self._backend.rank, self._info.name
        deadline = time.monotonic() + timeout_s
        store = self._info.store.prefix(f"shrink/{self._shrunk}")
        self._shrunk += 1
        store.set(f"present/{rank}", b"1")
        members, attempt = b"", 0
        while not members and store.add(f"first/{attempt}", 1) > 1:  # another rank decides, unless it dies meanwhile
            decider = int(get_in_time(store, f"decider/{attempt}", deadline + timeout_s) or -1)
            members = self._get_from(decider, store, "members", deadline + timeout_s)
            attempt += 1
            if not members and time.monotonic() > deadline + timeout_s:
                message = f"nobody decided who is left within {2 * timeout_s:g} s; another rank may have died meanwhile"
                raise RendezvousError(f"shrink of group {name!r}: {message}", op="shrink", rank=rank)
        if members:
            context, ranks = codec.decode(members)  # type: ignore[misc]
        else:
            store.set(f"decider/{attempt}", str(rank).encode())
            others = [r for r in range(n) if r not in (rank, lost)]
            present = [r for r in others if self._get_from(r, store, f"present/{r}", deadline)]
            context, ranks = self._new_context(), sorted((rank, *present))
            store.set("members", codec.encode([context, ranks]))
        if rank not in ranks:
            message = f"rank {rank} came later than {timeout_s:g} s after the first, and ranks {ranks} go on without it"
            raise RendezvousError(f"shrink of group {name!r}: {message}", op="shrink", rank=rank)
        info = self._info.subgroup(ranks, f"{name}-{n - len(ranks)}", context)
        return self._backend.shrink(ranks, context), info

    def _get_from(self, rank: int, store: Store, key: str, deadline: float) -> bytes:
        """Return the value that a rank stores, or b"" once it has died, or at the deadline."""
        from ferro.rendezvous.store.liveness import lost_ranks  # here, since it would slow down `import ferro`

        while not (value := get_in_time(store, key, min(deadline, time.monotonic() + _ASK_S))):
            dead = rank >= 0 and self._info.global_ranks[rank] in lost_ranks(self._info.job_store)
            if dead or time.monotonic() >= deadline:
                return get_in_time(store, key, time.monotonic())  # it may have come before the death
        return value

    def _new_context(self) -> int:
        """Take a number that no other group of the job has."""
        context = self._info.job_store.add("groups", 1)
        if context > MAX_CONTEXT:
            raise UsageError(f"this job has made more than {MAX_CONTEXT} groups")
        return context

    def agree_on_context(self, ranks: tuple[int, ...], timeout_s: float) -> int:
        """Agree on the group's number: its first rank takes one and publishes it."""
        import hashlib  # here, since it would add milliseconds to `import ferro`

        made = self._made.get(ranks, 0)
        digest = hashlib.sha256(repr(ranks).encode()).hexdigest()[:32]
        key = f"subgroup/{digest}/{made}"
        if self._backend.rank == ranks[0]:
            context = self._new_context()
            self._info.store.set(key, str(context).encode())
        else:
            try:
                context = int(self._info.store.get(key, deadline=time.monotonic() + timeout_s))
            except TimeoutError as error:
                if not isinstance(error, FerroError):
                    raise  # it is the program's own, from a signal handler
                message = (
                    f"subgroup {ranks}: rank {ranks[0]} did not create it within {timeout_s:g} s; "
                    "every member must call subgroup() with the same list"
                )
                raise RendezvousError(message, op="subgroup", rank=self._backend.rank, peer=ranks[0]) from error
        self._made[ranks] = made + 1
        return context


class SubgroupBackend(Backend):
    """A group inside a group: the parent's transfers, with ranks and tags translated.

    It is the default for backends that have nothing better. Aborting it aborts the parent as well, since its calls
    block in the parent's.
    """

    def __init__(self, parent: Backend, ranks: Sequence[int], context: int) -> None:
        super().__init__(tuple(ranks).index(parent.rank), len(ranks), parent.choice)
        self.labels_frames = False
        self.devices, self.streams = parent.devices, parent.streams
        self._parent = parent
        self._ranks = tuple(ranks)
        self._context = context

    def send(self, buffer: Array, peer: int, *, tag: int, deadline: float) -> None:
        self._transfer(self._parent.send, buffer, self._ranks[peer], tag=tag, deadline=deadline)

    def recv(self, buffer: Array, peer: int, *, tag: int, deadline: float) -> None:
        self._transfer(self._parent.recv, buffer, self._ranks[peer], tag=tag, deadline=deadline)

    def exchange(
        self, sends: Sequence[tuple[int, Array]], recvs: Sequence[tuple[int, Array]], *, tag: int, deadline: float
    ) -> None:
        sends = [(self._ranks[peer], buffer) for peer, buffer in sends]
        recvs = [(self._ranks[peer], buffer) for peer, buffer in recvs]
        self._transfer(self._parent.exchange, sends, recvs, tag=tag, deadline=deadline)

    def _transfer(self, method: Callable[..., None], *arguments: object, tag: int, deadline: float) -> None:
        """Call the parent, and name the peer in its error by its rank in this group."""
        try:
            method(*arguments, tag=in_context(tag, self._context), deadline=deadline)
        except PeerLost as error:
            peer = self._ranks.index(error.peer) if error.peer in self._ranks else None
            raise PeerLost(str(error), peer=peer, host=error.host) from error

    def subgroup(self, ranks: Sequence[int], context: int) -> Backend:
        """Make a group of some of these ranks, out of the outermost parent."""
        return subgroup_backend(self._parent, [self._ranks[rank] for rank in ranks], context)

    def launched(self) -> Completion:
        return self._parent.launched()

    def allocate(self, nbytes: int) -> Array:
        return self._parent.allocate(nbytes)

    def abort(self) -> None:
        self._parent.abort()

    def close(self) -> None:
        """Do nothing: the connections belong to the parent."""
