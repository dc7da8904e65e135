"""All-gathers out of band: over real stores, between threads, and as functions that C calls."""

from __future__ import annotations

import ctypes
import threading
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor

import pytest

from ferro.errors import GroupClosed
from ferro.rendezvous import MemoryStore, StoreClient, StoreServer
from ferro.rendezvous.store.wire import Reply, StoreOp
from ferro_ucc.abi import UccStatus
from ferro_ucc.oob import OobAllGather, OobCallbacks
from ferro_ucc.waiting import AbortFlag, PeerLiveness, PollBackoff

SECRET = b"a secret of thirty-two characters"
PATIENT_S = 20.0
NO_PEER_LOST = PeerLiveness(frozenset, ())


def on_ranks(count: int, function: Callable[[int], object]) -> list[object]:
    with ThreadPoolExecutor(count) as pool:
        return list(pool.map(function, range(count)))


class CountingStore(MemoryStore):
    """A store that knows its keys, to see what is left."""

    def __init__(self) -> None:
        super().__init__()
        self.keys: set[str] = set()

    def _ask(self, op: StoreOp, key: str, number: int = 0, value: bytes = b"") -> Reply:
        if op is StoreOp.DELETE:
            self.keys.discard(key)
        else:
            self.keys.add(key)
        return super()._ask(op, key, number, value)


@pytest.mark.parametrize("count", [1, 2, 5])
def test_every_rank_gets_all_values_in_order(count):
    store = CountingStore()

    def gather(rank: int) -> object:
        ranks = OobAllGather(store, rank, count, time.monotonic() + PATIENT_S)
        return [ranks.gather(bytes([rank, number])) for number in range(3)]

    wanted = [[bytes([rank, number]) for rank in range(count)] for number in range(3)]
    assert on_ranks(count, gather) == [wanted] * count
    assert store.keys == set(), "keys are left behind"


def test_it_works_through_the_real_store():
    with StoreServer(secret=SECRET) as server:

        def gather(rank: int) -> object:
            deadline = time.monotonic() + PATIENT_S
            with StoreClient(server.address, SECRET, deadline=deadline) as client:
                ranks = OobAllGather(client.prefix("ucc"), rank, 3, deadline)
                return ranks.gather(b"x" * 1000 + bytes([rank]))

        wanted = [b"x" * 1000 + bytes([rank]) for rank in range(3)]
        assert on_ranks(3, gather) == [wanted] * 3


@pytest.mark.parametrize(("rank", "named"), [(0, "rank 1"), (1, "rank 0")])
def test_a_rank_that_does_not_come_is_named(rank, named):
    ranks = OobAllGather(MemoryStore(), rank, 2, time.monotonic() + 0.05)
    with pytest.raises(TimeoutError, match=named):
        ranks.gather(b"here")


def call(callbacks: OobCallbacks, mine: bytes, size: int) -> bytes:
    """Make an all-gather as libucc does, from its own memory."""
    table = callbacks.table
    source, target = ctypes.create_string_buffer(mine, len(mine)), ctypes.create_string_buffer(size)
    request = ctypes.c_void_p()
    assert table.allgather(source, target, len(mine), None, ctypes.byref(request)) == UccStatus.OK
    assert request.value
    end = time.monotonic() + PATIENT_S
    while (status := table.req_test(request)) == UccStatus.IN_PROGRESS:
        assert time.monotonic() < end
    assert status == UccStatus.OK
    assert table.req_test(request) == UccStatus.OK  # it may be asked again
    assert table.req_free(request) == UccStatus.OK
    return target.raw


def test_c_calls_it():
    store = MemoryStore()

    def gather(rank: int) -> object:
        ranks = OobAllGather(store, rank, 3, time.monotonic() + PATIENT_S)
        callbacks = OobCallbacks(ranks, 0.01)
        assert (callbacks.table.n_oob_eps, callbacks.table.oob_ep) == (3, rank)
        return [call(callbacks, bytes([rank] * size), 3 * size) for size in (1, 5)]

    wanted = [bytes([0, 1, 2]), bytes([0] * 5 + [1] * 5 + [2] * 5)]
    assert on_ranks(3, gather) == [wanted] * 3


def test_two_may_be_under_way():
    store = MemoryStore()
    first, second = (OobAllGather(store, rank, 2, time.monotonic() + PATIENT_S) for rank in (0, 1))
    here = [first.start(b"a"), first.start(b"b")]
    there = [second.start(b"c"), second.start(b"d")]
    assert [gathering.poll(0.0) for gathering in (*reversed(here), *there)] == [True] * 4
    assert [gathering.joined for gathering in (*here, *there)] == [b"ac", b"bd"] * 2


def test_nothing_is_raised_through_c():
    """A store that fails gives the library an error, and the caller the reason."""
    store = MemoryStore()
    callbacks = OobCallbacks(OobAllGather(store, 0, 2, time.monotonic() + PATIENT_S), 0.0)
    request = ctypes.c_void_p()
    memory = ctypes.create_string_buffer(2)
    callbacks.table.allgather(memory, memory, 1, None, ctypes.byref(request))
    store.close()
    assert callbacks.table.req_test(request) < 0
    assert "closed" in str(callbacks.error)


def test_at_the_deadline_the_library_is_told():
    callbacks = OobCallbacks(OobAllGather(MemoryStore(), 0, 2, time.monotonic()), 0.0)
    request = ctypes.c_void_p()
    memory = ctypes.create_string_buffer(2)
    callbacks.table.allgather(memory, memory, 1, None, ctypes.byref(request))
    assert callbacks.table.req_test(request) == UccStatus.TIMED_OUT
    assert isinstance(callbacks.error, TimeoutError)


def wait_out(patience: PollBackoff) -> None:
    while True:
        patience.pause()


def test_a_wait_ends_at_its_deadline():
    with pytest.raises(TimeoutError, match="deadline"):
        wait_out(PollBackoff(time.monotonic() + 0.03, AbortFlag(MemoryStore()), NO_PEER_LOST))


def test_a_wait_ends_by_an_abort_here_or_elsewhere():
    store = MemoryStore()
    here, elsewhere = AbortFlag(store), AbortFlag(store)
    here.set()
    here.set()
    for abort in (here, elsewhere):  # the other rank finds it in the store
        with pytest.raises(GroupClosed, match="aborted"):
            wait_out(PollBackoff(time.monotonic() + PATIENT_S, abort, NO_PEER_LOST))


def test_an_abort_wakes_a_wait_that_began():
    abort = AbortFlag(MemoryStore())
    threading.Thread(target=abort.set).start()
    with pytest.raises(GroupClosed):
        wait_out(PollBackoff(time.monotonic() + PATIENT_S, abort, NO_PEER_LOST))
