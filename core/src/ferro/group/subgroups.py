"""Making a group inside a group: its members agree on a number that no other group has."""

from __future__ import annotations

import time
from collections.abc import Sequence
from typing import TYPE_CHECKING

from ferro.backend import Backend
from ferro.collectives.label import MAX_CONTEXT
from ferro.errors import RendezvousError, UsageError
from ferro.group.group_info import GroupInfo
from ferro.group.subgroup_backend import split_backend, subgroup_backend
from ferro.rendezvous import codec

if TYPE_CHECKING:
    from ferro.rendezvous.store.interface import Store


class Subgroups:
    """Makes the subgroups of one group."""

    def __init__(self, backend: Backend, members: GroupInfo) -> None:
        self._backend = backend
        self._members = members
        self._made: dict[tuple[int, ...], int] = {}
        self._shrunk = 0

    def make(self, ranks: Sequence[int], name: str | None, timeout_s: float) -> tuple[Backend, GroupInfo]:
        """Return backend and members of the group of these ranks, of which this is one."""
        chosen = self._checked(ranks)
        context = self._context(chosen, timeout_s)
        backend = subgroup_backend(self._backend, chosen, context)
        name = name or f"{self._members.name}[{','.join(map(str, chosen))}]"
        return backend, self._some(chosen, name, context)

    def part(self, ranks: Sequence[int], name: str, timeout_s: float) -> Parting:
        """Return this rank's side of a split of the whole group; no `ranks` when it is in none."""
        if not ranks:
            return Parting(self._backend, None, 0, None)
        chosen = self._checked(ranks)
        context = self._context(chosen, timeout_s)
        return Parting(self._backend, chosen, context, self._some(chosen, name, context))

    def survivors(self, lost: int | None, timeout_s: float) -> tuple[Backend, GroupInfo]:
        """Return backend and members of the group of all ranks that call this in time.

        The first to come waits for the others, all but the one known to be lost, and then says
        who is in.

        Raises:
            UnsupportedError: this backend cannot go on after a failure.
            RendezvousError: this rank came too late, or the one that decides is gone as well.
        """
        n, me, members = self._backend.world_size, self._backend.rank, self._members
        deadline = time.monotonic() + timeout_s
        store = members.store.prefix(f"shrink/{self._shrunk}")
        self._shrunk += 1
        store.set(f"here/{me}", b"1")
        if store.add("first", 1) == 1:
            here = [r for r in range(n) if r == me or (r != lost and _came(store, r, deadline))]
            context = self._new_context()
            store.set("who", codec.encode([context, here]))
        else:
            try:
                raw = store.get("who", deadline=deadline + timeout_s)
            except TimeoutError as error:
                raise RendezvousError(
                    f"shrink of group {members.name!r}: nobody decided who is left within "
                    f"{2 * timeout_s:g} s; another rank may have died meanwhile",
                    op="shrink",
                    rank=me,
                ) from error
            context, here = codec.decode(raw)  # type: ignore[misc]
        if me not in here:
            raise RendezvousError(
                f"shrink of group {members.name!r}: rank {me} came later than {timeout_s:g} s "
                f"after the first, and ranks {here} go on without it",
                op="shrink",
                rank=me,
            )
        backend = self._backend.shrink(here, context)
        part = members.job.prefix(f"group/{context}")
        return backend, members.some(here, f"{members.name}-{n - len(here)}", part)

    def _some(self, ranks: Sequence[int], name: str, context: int) -> GroupInfo:
        return self._members.some(ranks, name, self._members.job.prefix(f"group/{context}"))

    def _checked(self, ranks: Sequence[int]) -> tuple[int, ...]:
        chosen = tuple(int(rank) for rank in ranks)
        n, me, name = self._backend.world_size, self._backend.rank, self._members.name
        if any(not 0 <= rank < n for rank in chosen):
            raise UsageError(f"subgroup {chosen}: group {name!r} has ranks 0 to {n - 1}")
        if len(set(chosen)) != len(chosen):
            raise UsageError(f"subgroup {chosen} names a rank twice")
        if me not in chosen:
            raise UsageError(f"subgroup {chosen} does not include this rank, {me}: only members call it")
        return chosen

    def _new_context(self) -> int:
        """Take a number that no other group of the job has."""
        context = self._members.job.add("groups", 1)
        if context > MAX_CONTEXT:
            raise UsageError(f"this job has made more than {MAX_CONTEXT} groups")
        return context

    def _context(self, ranks: tuple[int, ...], timeout_s: float) -> int:
        """Agree on the group's number: its first rank takes one and publishes it."""
        import hashlib  # here, for it costs milliseconds that `import ferro` should not

        made = self._made.get(ranks, 0)
        digest = hashlib.sha256(repr(ranks).encode()).hexdigest()[:32]
        key = f"subgroup/{digest}/{made}"
        store = self._members.store
        if self._backend.rank == ranks[0]:
            context = self._new_context()
            store.set(key, str(context).encode())
            self._made[ranks] = made + 1
            return context
        try:
            context = int(store.get(key, deadline=time.monotonic() + timeout_s))
            self._made[ranks] = made + 1
            return context
        except TimeoutError as error:
            raise RendezvousError(
                f"subgroup {ranks}: rank {ranks[0]} did not create it within {timeout_s:g} s; "
                "every member must call subgroup() with the same list",
                op="subgroup",
                rank=self._backend.rank,
                peer=ranks[0],
            ) from error


class Parting:
    """A split of a group under way, on one rank; called at its end for what it made."""

    def __init__(
        self, backend: Backend, ranks: tuple[int, ...] | None, context: int, members: GroupInfo | None
    ) -> None:
        self._backend = backend
        self._ranks = ranks
        self._context = context
        self._members = members
        self._made: Backend | None = None

    def run(self, _deadline: float) -> None:
        """Make the groups, on all ranks at once."""
        self._made = split_backend(self._backend, self._ranks, self._context)

    def __call__(self) -> tuple[Backend, GroupInfo] | None:
        """Return backend and members of this rank's group; None when it is in none."""
        if self._made is None or self._members is None:
            return None
        return self._made, self._members


def _came(store: Store, rank: int, deadline: float) -> bool:
    """Wait for a rank's note."""
    try:
        store.get(f"here/{rank}", deadline=deadline)
    except TimeoutError:
        return False
    return True
