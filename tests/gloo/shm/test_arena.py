"""Arenas: arrays are allocated and freed, and peers see them."""

from __future__ import annotations

import gc
import logging
import os
import threading
from itertools import pairwise

import numpy as np
import pytest

from ferro_gloo.shm.arena import PACKED_SPAN, ArenaSpan, HostArenas, address_of, arena_bytes
from ferro_gloo.shm.segment import ShmSegment

KIB, MIB = 1 << 10, 1 << 20
PAGE = 4096
SIZE = 256 * MIB


class Room:
    """Shared memory with an end."""

    def __init__(self, monkeypatch):
        self.left = SIZE
        reserve = ShmSegment.reserve

        def limited(segment, offset, nbytes):
            if nbytes > self.left:
                raise OSError("there is no room")
            self.left -= nbytes
            reserve(segment, offset, nbytes)

        monkeypatch.setattr(ShmSegment, "reserve", limited)


@pytest.fixture
def room(monkeypatch):
    return Room(monkeypatch)


@pytest.fixture
def arenas():
    return HostArenas(0, ShmSegment.create(SIZE), {})


@pytest.fixture
def pair():
    """The arenas of two ranks, as each of them sees them."""
    return a_pair()


def a_pair(size=SIZE):
    own = [ShmSegment.create(size) for _ in range(2)]
    seen = [ShmSegment.open(segment.expose(), size) for segment in own]
    for segment in own:
        segment.unlink()
    return [HostArenas(rank, own[rank], {1 - rank: seen[1 - rank]}) for rank in range(2)]


def is_shared(arenas, array):
    return arenas.span_of(array) is not None


# -- allocating ----------------------------------------------------------------------------------


def test_arrays_lie_apart_and_are_aligned(arenas):
    arrays = [arenas.allocate(nbytes) for nbytes in (1, PAGE, PAGE + 1, 0, 100_000)]
    spans = sorted((address_of(array), address_of(array) + array.nbytes) for array in arrays)
    assert all(start % PAGE == 0 for start, _ in spans)
    assert all(end <= start for (_, end), (start, _) in pairwise(spans))
    assert [array.nbytes for array in arrays] == [PAGE, PAGE, 2 * PAGE, PAGE, 102_400]


@pytest.mark.parametrize(
    "keep",
    [
        lambda array: array[100:200],
        lambda array: array.view(np.float32).reshape(-1, 8)[::2].T,
        memoryview,
        lambda array: np.frombuffer(array[64:], np.int16),
        lambda array: np.lib.stride_tricks.as_strided(array, (4,), (1,)),
    ],
    ids=["slice", "view", "memoryview", "buffer", "strided"],
)
def test_memory_is_free_again_when_the_last_view_has_gone(arenas, keep):
    first = arenas.allocate(MIB)
    where = address_of(first)
    view = keep(first)
    del first
    gc.collect()
    assert address_of(arenas.allocate(MIB)) != where
    del view
    gc.collect()
    assert address_of(arenas.allocate(MIB)) == where


def test_adjacent_free_pieces_become_one_again(arenas):
    pieces = [arenas.allocate(MIB) for _ in range(4)]
    where = address_of(pieces[0])
    for index in (2, 0, 3, 1):
        pieces[index] = None
    assert address_of(arenas.allocate(4 * MIB)) == where


def test_a_training_loop_takes_no_more_and_more(arenas, room):
    for step in range(300):  # six arrays at most, of half a MiB on average
        arrays = [arenas.allocate((step * 7919 + index * 104_729) % MIB) for index in range(3)]
    assert len(arrays) == 3
    assert SIZE - room.left <= 8 * MIB


def test_not_much_more_is_reserved_than_asked_for(arenas, room):
    arrays = [arenas.allocate(MIB) for _ in range(128)]
    assert len({address_of(array) for array in arrays}) == 128
    assert SIZE - room.left <= 1.25 * 128 * MIB


def test_an_array_takes_in_what_is_free_at_the_end(arenas, room):
    first = arenas.allocate(MIB)  # 4 MiB are reserved
    array = arenas.allocate(33 * MIB)
    assert array.nbytes == 33 * MIB
    assert SIZE - room.left == 34 * MIB
    assert is_shared(arenas, first)


def test_what_is_left_is_used_to_the_end(arenas, room):
    room.left = 5 * MIB
    arrays = [arenas.allocate(4 * MIB), arenas.allocate(MIB)]
    assert [is_shared(arenas, array) for array in arrays] == [True, True]
    assert room.left == 0


def test_threads_may_allocate_and_free_at_once(arenas):
    wrong = []

    def work(number):
        for step in range(300):
            array = arenas.allocate(PAGE * (1 + step % 5))
            array[:] = number
            other = arenas.allocate(PAGE)
            other[:] = 255
            if not (array == number).all():
                wrong.append(number)
            del array, other

    threads = [threading.Thread(target=work, args=(number,)) for number in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(30)
    assert wrong == []


def test_a_forked_child_is_given_memory_of_its_own(arenas):
    arenas.allocate(PAGE)
    child = os.fork()
    if child == 0:
        os._exit(int(is_shared(arenas, arenas.allocate(PAGE))))
    assert os.waitpid(child, 0)[1] == 0


def test_the_user_is_told_once_when_memory_has_run_out(arenas, room, caplog):
    room.left = 0
    with caplog.at_level(logging.WARNING):
        arrays = [arenas.allocate(1000) for _ in range(3)]
    assert [array.nbytes for array in arrays] == [1000] * 3
    assert [is_shared(arenas, array) for array in arrays] == [False] * 3
    (record,) = caplog.records
    assert "group.empty has no shared memory left (there is no room)" in record.message
    assert "--shm-size" in record.message


def test_more_than_an_arena_holds_is_ordinary_memory():
    arenas = HostArenas(0, ShmSegment.create(8 * MIB), {})
    whole = arenas.allocate(8 * MIB)
    assert is_shared(arenas, whole)
    assert not is_shared(arenas, arenas.allocate(PAGE))
    assert not is_shared(arenas, arenas.allocate(8 * MIB + 1))


def test_memory_that_comes_back_is_used_again(arenas, room):
    room.left = 4 * MIB
    first = arenas.allocate(4 * MIB)
    assert not is_shared(arenas, arenas.allocate(PAGE))
    del first
    assert is_shared(arenas, arenas.allocate(PAGE))


def test_retired_memory_is_never_allocated_again(arenas, room):
    first, second = arenas.allocate(MIB), arenas.allocate(MIB)
    retired = range(address_of(first), address_of(first) + MIB)
    arenas.retire(arenas.span_of(first[5000:6000]))
    del first, second
    arrays = [arenas.allocate(MIB) for _ in range(3)]
    assert not any(address_of(array) in retired for array in arrays)
    assert SIZE - room.left == 4 * MIB, "the rest is used"


def test_a_rank_without_peers_has_ordinary_memory():
    arenas = HostArenas(0, None, {})
    array = arenas.allocate(PAGE)
    assert array.nbytes == PAGE
    assert not is_shared(arenas, array)


# -- sharing --------------------------------------------------------------------------------------


def seen(pair, array):
    """View an array of rank 0 on rank 1, which is told its span."""
    span = pair[0].span_of(array)
    return pair[1].view(0, ArenaSpan(*PACKED_SPAN.unpack(PACKED_SPAN.pack(*span))))


def test_a_peer_sees_the_very_array(pair):
    pair[0].allocate(100)
    array = pair[0].allocate(100_000)
    theirs = seen(pair, array)
    array[:] = np.arange(len(array)) % 251
    np.testing.assert_array_equal(theirs, array)
    theirs[77] = 255
    assert array[77] == 255


@pytest.mark.parametrize("part", [slice(0, 1), slice(4095, 9000), slice(99_999, 100_000)])
def test_a_peer_sees_a_part_of_an_array(pair, part):
    array = pair[0].allocate(100_000)
    array[:] = np.arange(len(array)) % 251
    np.testing.assert_array_equal(seen(pair, array[part]), array[part])


def test_the_owner_sees_its_own(pair):
    array = pair[0].allocate(PAGE)
    span = pair[0].span_of(array[10:20])
    assert address_of(pair[0].view(0, span)) == address_of(array) + 10


def test_each_sees_the_others(pair):
    arrays = [arenas.allocate(3 * MIB) for arenas in pair]
    spans = [pair[rank].span_of(arrays[rank]) for rank in range(2)]
    for reader in range(2):
        for rank in range(2):
            arrays[rank][-1] = 10 * rank + reader
            assert pair[reader].view(rank, spans[rank])[-1] == 10 * rank + reader


def test_looking_takes_no_memory(pair, room):
    arrays = [pair[0].allocate(5 * MIB) for _ in range(4)]
    left = os.statvfs("/dev/shm").f_bavail
    for value, array in enumerate(arrays):
        array[:] = value
    assert [int(seen(pair, array)[-1]) for array in reversed(arrays)] == [3, 2, 1, 0]
    assert left - os.statvfs("/dev/shm").f_bavail < 5 * MIB // PAGE


def test_ordinary_arrays_and_those_of_others_have_no_span(pair):
    mine, theirs = pair[0].allocate(PAGE), pair[1].allocate(PAGE)
    assert is_shared(pair[0], mine)
    assert not is_shared(pair[0], theirs)
    assert not is_shared(pair[0], pair[0].view(1, pair[1].span_of(theirs)))
    assert not is_shared(pair[0], np.zeros(10, np.uint8))
    assert not is_shared(pair[0], mine[:0])


def test_arrays_outlive_their_arenas():
    array = HostArenas(0, ShmSegment.create(SIZE), {}).allocate(PAGE)
    gc.collect()
    array[:] = 1
    assert array.sum() == PAGE


def test_arenas_fit_the_address_space():
    assert 0 < 1024 * arena_bytes(1024) < 1 << 46
    assert arena_bytes(2) % PAGE == 0


def test_arenas_heed_a_limit_of_address_space(monkeypatch):
    limit = (40 * MIB, 40 * MIB)
    monkeypatch.setattr("resource.getrlimit", lambda _: limit)
    assert 4 * arena_bytes(4) <= 10 * MIB
