"""Long messages between ranks of one host: through shared memory, right in every case."""

from __future__ import annotations

import threading

import numpy as np
import pytest

import ferro
from ferro_gloo.shm import transfer
from ferro_gloo.tcp.protocol import MAX_BODY

LONG = MAX_BODY // 4 + 3  # float32 elements


@pytest.fixture
def copied(monkeypatch):
    """Count the messages that are copied from shared memory."""
    copied = []
    copy_from = transfer.ShmTransfers._copy_from

    def counting(self, peer, buffer, span):
        found = copy_from(self, peer, buffer, span)
        copied.append(found)
        return found

    monkeypatch.setattr(transfer.ShmTransfers, "_copy_from", counting)
    return copied


def numbers(seed, count=LONG):
    return np.random.default_rng(seed).standard_normal(count, np.float32)


@pytest.mark.parametrize("shared", [False, True], ids=["private", "from group.empty"])
def test_a_ring_of_long_messages(on_ranks, copied, shared):
    def send_round(group):
        n = group.world_size
        x = group.empty(LONG) if shared else np.empty(LONG, np.float32)
        x[...] = numbers(group.rank)
        got = group.sendrecv(x, np.empty_like(x), (group.rank + 1) % n, (group.rank - 1) % n)
        assert (x == numbers(group.rank)).all(), "the input is as it was"
        return bool((got == numbers((group.rank - 1) % n)).all())

    assert on_ranks(3, send_round) == {0: True, 1: True, 2: True}
    assert copied == [True] * 3


def test_long_one_way_and_short_the_other(on_ranks, copied):
    def exchange(group):
        mine = numbers(0, LONG if group.rank == 0 else 5)
        theirs = np.empty(5 if group.rank == 0 else LONG, np.float32)
        group.sendrecv(mine, theirs, 1 - group.rank)
        return bool((theirs == numbers(0, theirs.size)).all())

    assert on_ranks(2, exchange) == {0: True, 1: True}
    assert copied == [True]


def test_many_tags_from_several_threads(on_ranks, copied):
    def exchange(group):
        right = {}

        def use(tag):
            if group.rank == 0:
                group.send(numbers(tag, LONG + tag), 1, tag)
                right[tag] = True
            else:
                got = group.recv(np.empty(LONG + tag, np.float32), 0, tag)
                right[tag] = bool((got == numbers(tag, LONG + tag)).all())

        threads = [threading.Thread(target=use, args=(tag,)) for tag in range(4)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        return right

    assert on_ranks(2, exchange)[1] == {0: True, 1: True, 2: True, 3: True}
    assert copied == [True] * 4


def test_messages_with_one_tag_keep_their_order_long_or_short(on_ranks):
    sizes = [LONG, 3, LONG + 1, 0, LONG + 2]

    def exchange(group):
        if group.rank == 0:
            works = [group.send(numbers(i, size), 1, async_op=True) for i, size in enumerate(sizes)]
            for work in works:
                work.wait()
            return True
        got = [group.recv(np.empty(size, np.float32), 0) for size in sizes]
        return all((part == numbers(i, part.size)).all() for i, part in enumerate(got))

    assert on_ranks(2, exchange) == {0: True, 1: True}


def test_without_room_in_the_arena_it_goes_over_tcp(on_ranks, copied, monkeypatch):
    monkeypatch.setattr("ferro_gloo.shm.arena.HostArenas.allocate", lambda self, nbytes: np.empty(nbytes, np.uint8))

    def exchange(group):
        mine = numbers(group.rank)
        theirs = group.sendrecv(mine, np.empty_like(mine), 1 - group.rank)
        return bool((theirs == numbers(1 - group.rank)).all())

    assert on_ranks(2, exchange) == {0: True, 1: True}
    assert copied == [False, False]


def test_another_size_is_a_mismatch_on_both_ends(start_ranks):
    def exchange(group):
        call = [lambda: group.send(numbers(0), 1), lambda: group.recv(np.empty(LONG + 1, np.float32), 0)][group.rank]
        with pytest.raises(ferro.CollectiveMismatch, match="send") as caught:
            call()
        return str(caught.value)

    ranks = start_ranks(2)
    ranks.start(exchange)
    results = ranks.join()
    assert not ranks.errors
    assert results[0] == results[1]


def test_a_send_that_nobody_receives_ends_at_its_deadline(on_ranks):
    told = threading.Event()

    def exchange(group):
        if group.rank == 1:
            told.wait(20)
            return
        with pytest.raises(ferro.CollectiveTimeout, match="send with rank 1"):
            group.send(numbers(0), 1, timeout_s=0.3)
        told.set()

    on_ranks(2, exchange)


def test_the_arena_is_free_again_when_the_message_has_been_received(on_ranks):
    def exchange(group):
        for _ in range(20):
            if group.rank == 0:
                group.send(numbers(0), 1)
            else:
                group.recv(np.empty(LONG, np.float32), 0)
        return group._backend._host.arenas._own._reserved

    reserved = on_ranks(2, exchange)
    assert reserved[0] < 4 * LONG * 4
