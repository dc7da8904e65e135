"""The backend over a stand-in for libucc: what it asks of UCC is right, on any machine.

Ranks are threads. With a real libucc, `test_real.py` says the same of the whole.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Sequence
from dataclasses import replace

import numpy as np
import pytest

from ferro import BackendConfig, CollectiveTimeout, GroupClosed, PeerLost, ProcessGroup, UnsupportedError
from ferro.collectives import Choice
from ferro.errors import RendezvousError
from ferro.group.group_info import GroupInfo
from ferro.rendezvous import MemoryStore
from ferro_testing import conformance
from ferro_testing.case import Case, attempt
from ferro_testing.outcome import Outcome
from ferro_ucc import waiting
from ferro_ucc.connect import connect

from ..world_sizes import sizes_for
from .standin import Network, StandIn
from .test_real import UNSUPPORTED

# Threads die without any store that would notice; `test_real.py` kills processes.
NO_DEATHS = {**UNSUPPORTED, "lost_peer": "the stand-in's ranks are threads"}


class Ranks:
    """Ranks of one world as threads."""

    def __init__(
        self, world_size: int, *, deterministic: bool = False, has_gather: bool = True, timeout_s: float = 10.0
    ) -> None:
        self.store = MemoryStore()
        self.world_size = world_size
        self.timeout_s = timeout_s
        self.choice = Choice(deterministic=deterministic)
        network = Network()
        self.libraries = [StandIn(network, has_gather=has_gather) for _ in range(world_size)]
        self.lost: frozenset[int] = frozenset()  # as the store would tell
        self.results: dict[int, object] = {}
        self.errors: dict[int, BaseException] = {}

    def run(self, function: Callable[[ProcessGroup], object]) -> dict[int, object]:
        """Run a function on all ranks; return results by rank, raise the first error."""
        threads = [
            threading.Thread(target=self._on_rank, args=(rank, function), daemon=True)
            for rank in range(self.world_size)
        ]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join(30)
            assert not thread.is_alive(), "a rank did not end"
        for error in self.errors.values():
            raise error
        return self.results

    def config(self, rank: int) -> BackendConfig:
        return BackendConfig(
            rank=rank,
            world_size=self.world_size,
            store=self.store.prefix("group/0"),
            timeout_s=self.timeout_s,
            choice=self.choice,
            lost=lambda: self.lost,
        )

    def _on_rank(self, rank: int, function: Callable[[ProcessGroup], object]) -> None:
        members = GroupInfo(
            name="world",
            backend_name="ucc",
            global_ranks=tuple(range(self.world_size)),
            hosts=("here",) * self.world_size,
            job_store=self.store,
            store=self.store.prefix("group/0"),
            timeout_s=self.timeout_s,
        )
        try:
            backend = connect(self.config(rank), self.libraries[rank])
            with ProcessGroup(backend, members) as group:
                self.results[rank] = function(group)
        except BaseException as error:  # noqa: BLE001 - looked at by the test
            self.errors[rank] = error


def case(*world_sizes: int, has_gather: bool) -> Case:
    def runner(
        function: Callable[..., object],
        world_size: int,
        args: Sequence[object],
        *,
        timeout_s: float,
        deterministic: bool,
    ) -> list[Outcome]:
        outcomes: dict[int, Outcome] = {}

        def on_rank(group: ProcessGroup) -> None:
            outcomes[group.rank], error = attempt(function, group, args)
            if error is not None:
                raise error

        ranks = Ranks(world_size, deterministic=deterministic, has_gather=has_gather, timeout_s=timeout_s)
        try:
            ranks.run(on_rank)
        except Exception as error:  # noqa: BLE001 - told rank by rank
            for rank in range(world_size):
                outcomes.setdefault(rank, Outcome(rank=rank, error_text=repr(error)))
        return [outcomes[rank] for rank in range(world_size)]

    return Case(backend="ucc", world_sizes=world_sizes, unsupported=NO_DEATHS, timeout_s=20, runner=runner)


@pytest.fixture(autouse=True)
def few_spins(monkeypatch):
    """Let ranks that wait sleep soon: they are threads here, and keep the interpreter from the rank they wait for."""
    monkeypatch.setattr(waiting, "_SPINS", 3)
    monkeypatch.setattr(waiting, "_YIELDS", 10)


# UCC 1.1 has no gather and scatter with sizes; other operations do not ask for its version.
WITH_GATHER = (
    conformance.check_reductions,
    conformance.check_deterministic,
    conformance.check_movements,
    conformance.check_moved_dtypes,
    conformance.check_uneven,
    conformance.check_buffers,
    conformance.check_objects,
    conformance.check_repeated_calls,
    conformance.check_persistent,
)


@pytest.mark.parametrize("check", conformance.CHECKS, ids=lambda check: check.__name__)
def test_it_conforms(check):
    check(case(*sizes_for(check), has_gather=True))


@pytest.mark.parametrize("check", WITH_GATHER, ids=lambda check: check.__name__)
def test_it_conforms_without_gather_and_scatter(check):
    check(replace(case(3, has_gather=False), dtypes=("bool", "int8", "bfloat16", "float32", "complex64")))


def test_all_is_released_at_the_end():
    """Teams of groups that nobody closed, too: the stand-in notes what is closed too early."""
    ranks = Ranks(3)

    def forget_a_group(group: ProcessGroup) -> None:
        group.subgroup([2, 1, 0]).all_reduce(np.ones(2))
        kept = group.subgroup([0, 1, 2])
        kept.all_reduce(np.ones(2))
        kept.backend.close()
        kept.backend.close()

    ranks.run(forget_a_group)
    assert [library.closed for library in ranks.libraries] == [True] * 3
    assert [library.misuse for library in ranks.libraries] == [[]] * 3


def test_nothing_is_released_that_ucc_may_still_use():
    """A rank stays away from a group's operation: it is named, and the world goes on."""
    ranks = Ranks(2)

    def stay_away(group: ProcessGroup) -> object:
        pair = group.subgroup([1, 0])
        pair.barrier()
        if group.rank == 1:
            return int(group.all_reduce(np.array(1)))
        with pytest.raises(CollectiveTimeout) as caught:
            pair.all_reduce(np.ones(3), timeout_s=0.05)
        with pytest.raises(GroupClosed):
            pair.all_reduce(np.ones(3))
        return caught.value.missing, int(group.all_reduce(np.array(1)))

    assert ranks.run(stay_away) == {0: ((0,), 2), 1: 2}
    assert not ranks.libraries[0].closed
    assert [library.misuse for library in ranks.libraries] == [[]] * 2


def test_a_rank_that_the_store_lost_is_named_by_its_rank_in_the_group():
    """Rank 2 dies; a group without it waits as long, and is not told."""
    ranks = Ranks(4)
    told = threading.Event()

    def lose_one(group: ProcessGroup) -> object:
        three = group.subgroup([3, 2, 1]) if group.rank else None
        pair = group.subgroup([0, 3]) if group.rank in (0, 3) else None
        group.barrier()
        if group.rank == 2:
            ranks.lost = frozenset({2})
            assert told.wait(10)
            return None
        if three is not None:
            with pytest.raises(PeerLost, match=r"rank 1 \(rank 2 of the world, host here\) of 3 is gone") as caught:
                three.all_reduce(np.ones(3))
            assert caught.value.peer == 1
        if pair is None:
            return None
        total = int(pair.all_reduce(np.array(1)))  # of which rank 3 comes as late as it is told
        told.set()
        return total

    assert ranks.run(lose_one) == {0: 2, 1: None, 2: None, 3: 2}
    assert [library.misuse for library in ranks.libraries] == [[]] * 4


def test_too_many_groups_are_refused_before_ucc_confuses_them():
    ranks = Ranks(2)
    ranks.store.add("groups", 32_766)

    def make_group(group: ProcessGroup) -> None:
        with pytest.raises(UnsupportedError, match="32767"):
            group.subgroup([0, 1])
        assert group.all_reduce(np.array(1)) == 2

    ranks.run(make_group)


def test_ranks_with_different_versions_are_told_so():
    ranks = Ranks(2)
    ranks.libraries[1].version = (1, 2, 0)
    with pytest.raises(RendezvousError, match=r"1\.8\.0.*1\.2\.0|1\.2\.0.*1\.8\.0"):
        ranks.run(lambda group: None)
    assert len(ranks.errors) == 2


def test_a_rank_that_does_not_connect_is_waited_for_no_longer_than_allowed():
    ranks = Ranks(2, timeout_s=0.1)
    with pytest.raises(RendezvousError, match="rank 1"):
        connect(ranks.config(0), ranks.libraries[0])
