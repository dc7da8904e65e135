"""Pieces of arrays, and how results land: through the caches or past them, the same bytes."""

from __future__ import annotations

import numpy as np
import pytest

from ferro_gloo.shm import pieces
from ferro_gloo.shm.native import ABSENT, NATIVE

needs_native = pytest.mark.skipif(NATIVE is None, reason=ABSENT)
LENGTHS = [0, 1, 15, 63, 64, 65, 1000, 300_000]
WAYS = [
    pieces.get,
    pieces.get_in_blocks,
    pytest.param(pieces.get_past, marks=needs_native),
]


@pytest.mark.parametrize("get", WAYS)
@pytest.mark.parametrize("length", LENGTHS)
def test_what_lands_is_the_beginning_of_the_source(get, length):
    random = np.random.default_rng(length)
    source = random.integers(0, 255, length + 10, np.uint8)
    for start in (0, 1, 33):  # not on a cache line
        memory = np.zeros(start + length + 5, np.uint8)
        get(memory[start : start + length], source)
        assert (memory[start : start + length] == source[:length]).all()
        assert not memory[:start].any()
        assert not memory[start + length :].any()


@needs_native
def test_large_results_land_past_the_caches_and_small_ones_do_not(monkeypatch):
    large = 1 << 30
    assert pieces.landing(large) == (pieces.get_past, pieces.get_past)
    assert pieces.landing(1 << 20) == (pieces.get, pieces.get_in_blocks)
    monkeypatch.setattr(pieces, "NATIVE", None)
    assert pieces.landing(large) == (pieces.get, pieces.get_in_blocks)


@needs_native
def test_the_helper_copies_between_apart_arrays_of_one_size_only():
    data = np.zeros(100, np.uint8)
    for target, source in [(data[:50], data[:49]), (data[:50], data[49:99]), (data, data)]:
        with pytest.raises(ValueError, match="two apart arrays of one size"):
            NATIVE.copy(target, source)
    with pytest.raises(TypeError, match="2 arguments"):
        NATIVE.copy(data)
    data.flags.writeable = False
    with pytest.raises((ValueError, BufferError)):
        NATIVE.copy(data[:10], data[10:20])


@pytest.mark.parametrize("ranks", [1, 2, 3, 7])
def test_pieces_for_all_others_fit_a_slot_and_do_not_overlap(ranks):
    slot = np.zeros(4096, np.uint8)
    length = pieces.piece_bytes(slot.size, ranks)
    for shower in range(ranks):
        slot[...] = 0
        for taker in range(ranks):
            if taker != shower:
                part = pieces.piece(slot, shower, taker, length)
                assert part.size == length
                part += 1
        assert slot.max(initial=0) <= 1


def test_chunks_are_the_whole_in_order():
    data = np.arange(10)
    count = pieces.rounds_of(10, 4)
    assert [pieces.chunk(data, k, 4).tolist() for k in range(count)] == [
        [0, 1, 2, 3],
        [4, 5, 6, 7],
        [8, 9],
    ]
    assert pieces.rounds_of(0, 4) == 1
