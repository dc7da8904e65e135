"""Entering a world: ranks with any past, of any order, in a store that has seen other worlds."""

from __future__ import annotations

import json
import re
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass, field

import pytest

from ferro.errors import RendezvousError
from ferro.rendezvous import MemoryStore, Store, StoreClient, StoreServer
from ferro.rendezvous.meeting import membership
from ferro.rendezvous.meeting.membership import RankRecord, enter_world
from ferro.rendezvous.store.liveness import FailureDetector

SECRET = b"a job's secret"


def soon(seconds: float = 20.0) -> float:
    return time.monotonic() + seconds


def record(rank: int, world_size: int = 2, **others: str) -> RankRecord:
    fields = {"host": "n01", "pid": 7, "address": "::1", "version": "0.1", "backend": "gloo", **others}
    return RankRecord(rank=rank, world_size=world_size, **fields)


@dataclass
class Process:
    """A process that enters worlds, as `ferro.runtime.world.World` does."""

    client: StoreClient
    world: Store | None = None
    records: list[RankRecord] = field(default_factory=list)

    def enter(self, mine: RankRecord, seconds: float = 20.0) -> int:
        """Enter a world; return its number."""
        _, self.records = enter_world(self.client, mine, begin=self.begin, deadline=soon(seconds))
        assert [found.rank for found in self.records] == list(range(mine.world_size))
        return self.number

    @property
    def number(self) -> int:
        return int(re.fullmatch(r"world(\d+)", self.world._name)[1])

    def begin(self, world: Store) -> None:
        if self.world is not None:
            self.client.declare_lost()
        self.world = world

    def leave(self) -> None:
        self.client.declare_lost()
        self.world.add("goodbye", 1)
        self.world = None


@pytest.fixture
def processes(monkeypatch):
    monkeypatch.setattr(membership, "_POLL_S", 0.05)
    monkeypatch.setattr(membership, "_LEAVING_S", 0.5)
    with StoreServer(secret=SECRET) as server:
        made = [Process(StoreClient(server.address, SECRET, deadline=soon())) for _ in range(4)]
        yield made
        for process in made:
            process.client.close()


@pytest.fixture
def pool():
    with ThreadPoolExecutor(4) as pool:
        yield pool


def meet(pool, *entering) -> list[int]:
    return [future.result(30) for future in [pool.submit(process.enter, mine) for process, mine in entering]]


def test_a_rank_that_is_early_waits_in_the_next_world(processes, pool):
    zero, one, *_ = processes
    assert meet(pool, (zero, record(0)), (one, record(1))) == [0, 0]
    one.leave()
    early = pool.submit(one.enter, record(1))
    zero.leave()
    assert [zero.enter(record(0)), early.result(20)] == [1, 1]


def test_an_attempt_that_failed_is_not_entered_later(processes, pool):
    zero, one, *_ = processes
    for _ in range(2):
        with pytest.raises(RendezvousError, match=r"rank 0 still misses ranks \[1\] of 2 \(present: \[0\]\)"):
            zero.enter(record(0), 0.1)
        zero.leave()
    late = pool.submit(one.enter, record(1))
    assert [zero.enter(record(0)), late.result(20)] == [2, 2]


def test_ranks_that_wait_follow_to_the_next_world_when_one_dies(processes, pool):
    zero, dying, two, replacement = processes
    waiting = pool.submit(zero.enter, record(0, 3))
    while zero.world is None:
        time.sleep(0.01)
    place = zero.world.add("joined", 1)
    FailureDetector(dying.client.prefix("world0"), 1)
    zero.world.set(f"join/{place}", json.dumps(asdict(record(1, 3))).encode())
    dying.client.declare_lost()  # as its death would
    others = [pool.submit(replacement.enter, record(1, 3)), pool.submit(two.enter, record(2, 3))]
    assert {future.result(20) for future in (waiting, *others)} == {1}


def test_a_rank_enters_the_world_that_another_entered_and_died_in(processes, pool, monkeypatch):
    zero, one, *_ = processes
    gave_up = membership._is_over
    slow, goes_on = threading.Event(), threading.Event()

    def wait_before_the_last_look(world: Store) -> bool:
        if world._store is one.client and one.world is not None:
            slow.set()
            goes_on.wait(20)
        return gave_up(world)

    monkeypatch.setattr(membership, "_is_over", wait_before_the_last_look)
    entering = pool.submit(one.enter, record(1))
    assert zero.enter(record(0)) == 0
    assert slow.wait(20)
    zero.client.declare_lost()  # as its death would
    while not gave_up(zero.world):
        time.sleep(0.01)
    goes_on.set()
    assert entering.result(20) == 0


def test_a_rank_that_gave_up_is_named_with_the_one_that_never_came(processes, pool):
    zero, one, *_ = processes
    waiting = pool.submit(zero.enter, record(0, 3), 1.0)
    with pytest.raises(RendezvousError, match=r"misses ranks \[2\] of 3 \(present: \[0, 1\]\)"):
        one.enter(record(1, 3), 0.2)
    one.leave()
    gone = r"misses ranks \[2\] of 3 \(present: \[0\]; came, and gave up or died: rank 1 \(host n01, pid 7\)\)"
    with pytest.raises(RendezvousError, match=gone):
        waiting.result(20)


def test_a_world_may_have_another_size_than_the_one_before(processes, pool):
    zero, one, two, _ = processes
    assert meet(pool, (zero, record(0)), (one, record(1))) == [0, 0]
    for process in (zero, one):
        process.leave()
    assert meet(pool, (two, record(2, 3)), (zero, record(0, 3)), (one, record(1, 3))) == [1, 1, 1]


def test_a_rank_too_many_harms_no_world_at_work(processes, pool):
    zero, one, stranger, _ = processes
    assert meet(pool, (zero, record(0)), (one, record(1))) == [0, 0]
    for mine in (record(1), record(2, 3)):
        with pytest.raises(RendezvousError, match="world of 2 that is complete and at work") as error:
            stranger.enter(mine)
        assert ("is this rank already" in str(error.value)) is (mine.rank == 1)
    assert stranger.world is None
    assert not membership._is_over(zero.world)


def test_ranks_that_do_not_fit_are_told_to_one_that_comes_later(processes, pool):
    zero, one, two, three = processes
    futures = [pool.submit(zero.enter, record(0, 3)), pool.submit(one.enter, record(1, 3, backend="mpi"))]
    for process, future in zip((zero, one), futures, strict=True):
        with pytest.raises(RendezvousError, match="differ in the backend"):
            future.result(20)
        process.leave()
    with pytest.raises(RendezvousError, match="differ in the backend"):
        two.enter(record(2, 3))
    again = [pool.submit(process.enter, record(rank, 3)) for rank, process in enumerate((zero, one))]
    while zero.world is None:
        time.sleep(0.01)
    assert three.enter(record(2, 3)) == 1
    assert [future.result(20) for future in again] == [1, 1]


def test_a_rank_of_another_version_with_other_fields_is_named():
    shared = MemoryStore()
    world = shared.prefix("world0")
    world.add("joined", 1)
    stranger = {"rank": 1, "world_size": 2, "version": "9.9", "host": "n02", "pid": 7, "new": 1}
    world.set("join/1", json.dumps(stranger).encode())
    with pytest.raises(RendezvousError, match="differ in the version of ferro") as caught:
        enter_world(shared, record(0), begin=lambda _: None, deadline=0.0)
    assert "rank 1 (host n02, pid 7) has '9.9'" in str(caught.value)
