"""Gathered reductions of ranks that are threads, against the arithmetic of one process."""

from __future__ import annotations

import threading
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pytest

from ferro.collectives import gathered_reduction
from ferro.collectives.gathered_reduction import GatheredReduction
from ferro.collectives.reduction import reduction_for
from ferro_testing.samples import dtype_of, noise, reduced

JOIN_S = 30.0


class ThreadTransfers:
    """The transfers of one rank among threads; it remembers how much memory was asked for."""

    def __init__(self, rank, barrier, shared):
        self.rank, self.barrier, self.shared = rank, barrier, shared
        self.allocated = []

    def empty(self, count, dtype):
        made = np.frombuffer(b"\xa5" * (count * np.dtype(dtype).itemsize), dtype).copy()
        self.allocated.append(made.nbytes)
        return made

    def all_gather(self, buffer, counts):
        starts = np.cumsum([0, *counts])
        assert starts[-1] == buffer.size
        for rank, theirs in enumerate(self._exchange(buffer)):
            block = slice(starts[rank], starts[rank + 1])
            if rank != self.rank:
                buffer[block] = theirs[block]
        self.barrier.wait(JOIN_S)

    def all_to_all(self, source, offsets, counts, out):
        sent = [source[at : at + count] for at, count in zip(offsets, counts, strict=True)]
        blocks = out.reshape(len(counts), -1)
        for block, theirs in zip(blocks, self._exchange(sent), strict=True):
            block[...] = theirs[self.rank]
        self.barrier.wait(JOIN_S)

    def _exchange(self, item):
        self.shared[self.rank] = item
        self.barrier.wait(JOIN_S)
        return list(self.shared)


def on_ranks(n, op, dtype, function, segment_bytes=1 << 20):
    """Run `function(reduction, rank)` on ranks; return the results and the largest allocation."""
    barrier, shared = threading.Barrier(n), [None] * n
    transfers = [ThreadTransfers(rank, barrier, shared) for rank in range(n)]

    def run(rank):
        reduction = reduction_for(op, dtype_of(dtype), n)
        one = GatheredReduction(transfers[rank], rank, n, reduction, segment_bytes=segment_bytes)
        try:
            return function(one, rank)
        except BaseException:
            barrier.abort()
            raise

    with ThreadPoolExecutor(n) as pool:
        results = list(pool.map(run, range(n)))
    return results, max(size for one in transfers for size in (0, *one.allocated))


def contributions(n, count, dtype):
    return [noise(rank, count, dtype) for rank in range(n)]


@pytest.fixture(params=["small", "large"])
def segment_bytes(request, monkeypatch):
    """Bytes of a segment, with buffers of these tests taken as small ones or as large ones."""
    if request.param == "large":
        monkeypatch.setattr(gathered_reduction, "SMALL_BYTES", 0)
        return 64
    return 1 << 20


CASES = pytest.mark.parametrize(
    ("n", "count", "op", "dtype"),
    [
        (1, 5, "sum", "float16"),
        (2, 101, "mean", "float16"),
        (3, 100, "sum", "bfloat16"),
        (3, 2, "prod", "float32"),  # fewer elements than ranks
        (4, 257, "min", "float64"),
        (3, 0, "sum", "float32"),
    ],
)


@CASES
def test_all_reduce(n, count, op, dtype, segment_bytes):
    given = contributions(n, count, dtype)
    wanted = reduced(given, op)

    def work(one, rank):
        buffer = given[rank].copy()
        one.all_reduce(buffer)
        return buffer.tobytes()

    results, _ = on_ranks(n, op, dtype, work, segment_bytes)
    assert results == [wanted.tobytes()] * n


@CASES
def test_reduce_to_a_root(n, count, op, dtype, segment_bytes):
    given = contributions(n, count, dtype)
    root = n - 1

    def work(one, rank):
        buffer = given[rank].copy()
        one.reduce(buffer, root)
        return buffer.tobytes()

    results, _ = on_ranks(n, op, dtype, work, segment_bytes)
    assert results[root] == reduced(given, op).tobytes()
    assert results[:root] == [buffer.tobytes() for buffer in given[:root]]


@pytest.mark.parametrize("counts", [[4, 4, 4], [0, 50, 7], [1, 0, 0], [0, 0, 0]])
def test_reduce_scatter(counts, segment_bytes):
    n, starts = len(counts), np.cumsum([0, *counts])
    given = contributions(n, int(starts[-1]), "bfloat16")
    wanted = reduced(given, "mean")

    def work(one, rank):
        source, out = given[rank].copy(), np.empty(counts[rank], given[rank].dtype)
        one.reduce_scatter(source, out, counts)
        return out.tobytes(), source.tobytes()

    results, _ = on_ranks(n, "mean", "bfloat16", work, segment_bytes)
    for rank, (out, source) in enumerate(results):
        assert out == wanted[starts[rank] : starts[rank + 1]].tobytes()
        assert source == given[rank].tobytes()


def test_contributions_are_combined_in_order_of_rank(segment_bytes):
    def first_digits(a, b, out):  # neither commutative nor associative
        np.add(10 * a, b, out=out)

    def work(one, rank):
        buffer = np.full(40, rank + 1)
        one.all_reduce(buffer)
        return buffer.tolist()

    results, _ = on_ranks(3, first_digits, "int64", work, segment_bytes)
    assert results == [[123] * 40] * 3


@pytest.mark.parametrize("collective", ["all_reduce", "reduce", "reduce_scatter"])
def test_a_large_reduction_takes_no_more_memory_than_a_segment(monkeypatch, collective):
    monkeypatch.setattr(gathered_reduction, "SMALL_BYTES", 16)
    n = 3
    arguments = {"all_reduce": (), "reduce": (1,), "reduce_scatter": (np.empty(333, np.int16), [333] * n)}

    def work(one, rank):
        getattr(one, collective)(np.ones(333 * n, np.int16), *arguments[collective])

    _, most = on_ranks(n, "sum", "int16", work, segment_bytes=200)
    assert 100 <= most <= 200 + 2 * n  # blocks of one segment differ by an element at most
