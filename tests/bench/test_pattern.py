"""The check of results finds what libraries get wrong: stale, misplaced, missing, doubled."""

import numpy as np
import pytest

from ferro_bench.rank import pattern
from ferro_bench.rank.buffers import Buffers
from ferro_bench.rank.case import COLLECTIVES, OPS, BenchCase

DTYPES = ("float16", "bfloat16", "float32", "float64", "int8", "uint8", "int64")
CHECKED = [name for name in COLLECTIVES if name != "barrier"]
N = 3


def case(collective, count=6, dtype="float32", op="sum"):
    return BenchCase(collective=collective, count=count, dtype=dtype, op=op, calls=1, check=True, async_op=False)


def buffers(collective, count=6, **more):
    """One rank's buffers for each rank."""

    def allocate(size, dtype):
        return np.zeros(size, pattern.dtype_of(dtype))

    return [Buffers(case(collective, count, **more), rank, N, allocate) for rank in range(N)]


def carry_out(collective, ranks, op="sum"):
    """Do in one process what the collective does, with NumPy."""
    sources = [rank.source.copy() for rank in ranks]
    reduce = {"sum": np.add, "prod": np.multiply, "min": np.minimum, "max": np.maximum}[op].reduce
    blocks = [np.split(source, N) if source.size % N == 0 else [] for source in sources]
    results = {
        "all_reduce": lambda r: reduce(sources),
        "reduce": lambda r: reduce(sources) if r == 0 else ranks[r].target,
        "broadcast": lambda r: sources[0],
        "all_gather": lambda r: np.concatenate(sources),
        "gather": lambda r: np.concatenate(sources) if r == 0 else ranks[r].target,
        "scatter": lambda r: blocks[0][r],
        "reduce_scatter": lambda r: np.split(reduce(sources), N)[r],
        "all_to_all": lambda r: np.concatenate([blocks[s][r] for s in range(N)]),
        "sendrecv": lambda r: sources[r - 1],
        "copy": lambda r: sources[r],
    }
    for number, rank in enumerate(ranks):
        rank.target[...] = results[collective](number)


@pytest.mark.parametrize("collective", CHECKED)
@pytest.mark.parametrize("count", [3, 6, 3 * pattern.TILE + 3])
def test_the_right_result_is_right(collective, count):
    ranks = buffers(collective, count)
    for rank in ranks:
        rank.renew(5)
    carry_out(collective, ranks)
    assert [rank.mismatches(5) for rank in ranks] == [0] * N


@pytest.mark.parametrize("collective", [name for name in CHECKED if name != "broadcast"])
def test_nothing_done_is_wrong(collective):
    ranks = buffers(collective)
    for rank in ranks:
        rank.renew(1)
    assert ranks[0].mismatches(1) > 0


def test_a_broadcast_that_did_nothing_is_wrong_but_at_the_root():
    ranks = buffers("broadcast")
    for rank in ranks:
        rank.renew(1)
    assert [rank.mismatches(1) for rank in ranks] == [0, 6, 6]


@pytest.mark.parametrize("collective", CHECKED)
def test_the_last_calls_result_is_wrong(collective):
    ranks = buffers(collective)
    for rank in ranks:
        rank.renew(1)
    carry_out(collective, ranks)
    assert ranks[0].mismatches(2) > 0


def test_one_wrong_element_is_counted():
    ranks = buffers("all_reduce", 100_000)
    for rank in ranks:
        rank.renew(0)
    carry_out("all_reduce", ranks)
    ranks[1].target[70_000] += 1
    assert [rank.mismatches(0) for rank in ranks] == [0, 1, 0]


def test_not_a_number_is_wrong():
    ranks = buffers("copy")
    ranks[0].renew(0)
    ranks[0].target[...] = ranks[0].source
    ranks[0].target[2] = np.nan
    assert ranks[0].mismatches(0) == 1


@pytest.mark.parametrize("op", OPS)
@pytest.mark.parametrize("dtype", DTYPES)
def test_reductions_are_exact_in_any_order(dtype, op):
    tiles = [pattern.tile(rank, 4, dtype, op) for rank in range(4)]
    wide = np.array([tile.astype(np.float64) for tile in tiles])
    exact = {"sum": wide.sum, "prod": wide.prod, "min": wide.min, "max": wide.max}[op](axis=0)
    np.testing.assert_array_equal(pattern.reduced(4, dtype, op).astype(np.float64), exact)
    assert all((tile != 0).all() for tile in tiles)


def test_a_missing_and_a_doubled_contribution_show():
    tiles = [pattern.tile(rank, 4, "float32", "sum") for rank in range(4)]
    total = pattern.reduced(4, "float32", "sum")
    doubled = tiles[0] + tiles[0] + tiles[2] + tiles[3]
    assert (total - tiles[1] != total).all()
    assert np.count_nonzero(doubled == total) < pattern.TILE // 1000
