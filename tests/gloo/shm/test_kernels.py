"""Chunks and copies of arrays, and sums of half precision: the same bytes in each way."""

from __future__ import annotations

import ml_dtypes
import numpy as np
import pytest

from ferro.collectives.reduction import reduction_for
from ferro_gloo.shm import kernels
from ferro_gloo.shm.native import ABSENT, NATIVE

needs_native = pytest.mark.skipif(NATIVE is None, reason=ABSENT)
LENGTHS = [0, 1, 15, 63, 64, 65, 1000, 300_000]
COPIES = [kernels.copy_in_blocks, kernels.copy_large]


@pytest.mark.parametrize("copy", COPIES)
@pytest.mark.parametrize("length", LENGTHS)
def test_a_copy_is_the_beginning_of_the_source(copy, length):
    random = np.random.default_rng(length)
    source = random.integers(0, 255, length + 10, np.uint8)
    for start in (0, 1, 33):  # not on a cache line
        memory = np.zeros(start + length + 5, np.uint8)
        copy(memory[start : start + length], source)
        assert (memory[start : start + length] == source[:length]).all()
        assert not memory[:start].any()
        assert not memory[start + length :].any()


@pytest.mark.parametrize("native", [pytest.param(True, marks=needs_native), False])
def test_a_large_copy(monkeypatch, native):
    """Four pages side by side, and the rest; past the caches."""
    if not native:
        monkeypatch.setattr(kernels, "NATIVE", None)
    source = np.random.default_rng(0).integers(0, 255, 3 << 20, np.uint8)
    for start, length in [(0, 3 << 20), (1, (1 << 20) + 77), (63, 2 << 20), (64, (1 << 20) + 16383)]:
        memory = np.zeros((3 << 20) + 100, np.uint8)
        kernels.copy_large(memory[start : start + length], source)
        assert (memory[start : start + length] == source[:length]).all()
        assert not memory[:start].any()
        assert not memory[start + length :].any()


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


@pytest.mark.parametrize("ranks", [2, 3, 7])
def test_blocks_for_all_others_do_not_overlap(ranks):
    for writer in range(ranks):
        starts = [kernels.slot_block_start(writer, reader, 64) for reader in range(ranks) if reader != writer]
        assert starts == list(range(0, 64 * (ranks - 1), 64))


def test_arrays_that_overlap_are_copied():
    memory = np.arange(10)
    assert kernels.are_apart(memory[:5], memory[5:])
    assert not kernels.are_apart(memory[:5], memory[4:])
    assert kernels.is_same(memory, memory[:3])
    apart = memory[5:]
    assert kernels.apart_from(memory[:5], apart) is apart
    overlapping = memory[4:]
    copied = kernels.apart_from(memory[:5], overlapping)
    assert kernels.are_apart(copied, memory)
    assert (copied == overlapping).all()


def test_chunks_are_the_whole_in_order():
    data = np.arange(10)
    count = kernels.chunk_count(10, 4)
    assert [kernels.chunk(data, k, 4).tolist() for k in range(count)] == [[0, 1, 2, 3], [4, 5, 6, 7], [8, 9]]
    assert kernels.chunk_count(0, 4) == 1


# -- half precision -------------------------------------------------------------------------------

DTYPES = [np.dtype(np.float16), np.dtype(ml_dtypes.bfloat16), np.dtype(np.float32)]


def numbers(dtype, rank, count=1000):
    return np.random.default_rng(rank).standard_normal(count).astype(dtype)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("op", ["sum", "mean", "prod", "max"])
def test_the_bits_are_those_of_core(dtype, op):
    operands = [numbers(dtype, rank) for rank in range(3)]
    reduction = reduction_for(op, dtype, 3)
    expected, found = np.empty_like(operands[0]), np.empty_like(operands[0])
    reduction.into(expected, operands, at_once=True)
    kernels.reduce_into(reduction, found, operands)
    assert found.tobytes() == expected.tobytes()


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_arrays_at_odd_addresses(dtype):
    raw = np.zeros(10 * dtype.itemsize + 1, np.uint8)
    odd = raw[1:].view(dtype)
    odd[...] = 1
    kernels.reduce_into(reduction_for("sum", dtype, 2), odd, [odd, np.ones(10, dtype)])
    assert (odd == 2).all()
