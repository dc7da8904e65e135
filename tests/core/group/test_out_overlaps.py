"""`out` and the input in one memory: always the right result, and copies only where they count."""

import numpy as np
import pytest

from ferro.simulated import simulate

RANKS = 3
ROWS = 4  # of each rank's block, of 2 numbers

# Each call, with the blocks that its input and its result have.
CALLS = {
    "all_reduce": (lambda g, x, **how: g.all_reduce(x, **how), RANKS, RANKS),
    "broadcast": (lambda g, x, **how: g.broadcast(x, 1, **how), RANKS, RANKS),
    "all_gather": (lambda g, x, **how: g.all_gather(x, **how), 1, RANKS),
    "gather": (lambda g, x, **how: g.gather(x, 1, **how), 1, RANKS),
    "scatter": (lambda g, x, **how: g.scatter(x, 1, **how), RANKS, 1),
    "reduce_scatter": (lambda g, x, **how: g.reduce_scatter(x, **how), RANKS, 1),
    "all_to_all": (lambda g, x, **how: g.all_to_all(x, **how), RANKS, RANKS),
    "uneven all_to_all": (lambda g, x, **how: g.all_to_all(x, send_sizes=[ROWS] * RANKS, **how), RANKS, RANKS),
}


def on_ranks(work, world_size=RANKS):
    """Return what every rank's `work(group)` returns."""
    return simulate(work, world_size, timeout_s=5, run_timeout_s=20)


def memory(rank):
    """Return a rank's memory: room for the input, and for a result that overlaps it."""
    return np.arange(rank * 1000.0, rank * 1000.0 + 4 * RANKS * ROWS).reshape(-1, 2)


@pytest.mark.parametrize("async_op", [False, True], ids=["now", "async"])
@pytest.mark.parametrize("offset", [-ROWS, -1, 0, 1, ROWS])
@pytest.mark.parametrize("name", CALLS)
def test_out_may_overlap_the_input_anywhere(name, offset, async_op):
    call, blocks_in, blocks_out = CALLS[name]

    def work(group):
        start_in, start_out = max(0, -offset), max(0, offset)
        rows = memory(group.rank)
        x = rows[start_in : start_in + blocks_in * ROWS]
        out = rows[start_out : start_out + blocks_out * ROWS]
        expected = call(group, x.copy())
        result = call(group, x, out=out, async_op=async_op)
        if async_op:
            result = result.wait()
        if expected is None:
            return result is None
        return result is out and np.array_equal(out, expected)

    assert on_ranks(work) == [True] * RANKS


@pytest.mark.parametrize("name", ["all_gather", "gather", "scatter", "reduce_scatter"])
def test_a_block_may_lie_in_its_own_place_of_the_whole(name):
    call, blocks_in, blocks_out = CALLS[name]

    def work(group):
        whole = memory(group.rank)[: RANKS * ROWS]
        own = whole[group.rank * ROWS :][:ROWS]
        x, out = (own, whole) if blocks_in < blocks_out else (whole, own)
        expected = call(group, x.copy())
        call(group, x, out=out)
        return expected is None or np.array_equal(out, expected)

    assert on_ranks(work) == [True] * RANKS


def handed_over(group, op, call):
    """Return what a call hands to the backend."""
    seen = []
    backend, original = group._backend, getattr(group._backend, op)

    def spy(buffer, *arguments, **named):
        seen.extend((buffer, *arguments))
        original(buffer, *arguments, **named)

    setattr(backend, op, spy)
    call()
    return seen


@pytest.mark.parametrize("name", ["scatter", "reduce_scatter", "all_to_all", "gather"])
@pytest.mark.parametrize("given", [False, True], ids=["new", "out"])
def test_the_input_itself_is_read_where_the_result_is_apart(name, given):
    call, blocks_in, blocks_out = CALLS[name]

    def work(group):
        x = memory(group.rank)[: blocks_in * ROWS]
        out = np.empty((blocks_out * ROWS, 2)) if given else None
        seen = handed_over(group, name, lambda: call(group, x, out=out))
        if name == "scatter" and group.rank != 1:
            return True  # only the root has an input
        return any(np.shares_memory(x, item) for item in seen if isinstance(item, np.ndarray))

    assert on_ranks(work) == [True] * RANKS


@pytest.mark.parametrize("name", ["gather", "scatter"])
def test_the_root_copies_nothing_in_place(name):
    call, blocks_in, _ = CALLS[name]

    def work(group):
        whole = memory(group.rank)[: RANKS * ROWS]
        own = whole[group.rank * ROWS :][:ROWS]
        x, out = (own, whole) if blocks_in == 1 else (whole, own)
        seen = handed_over(group, name, lambda: call(group, x, out=out))
        arrays = [item for item in seen if isinstance(item, np.ndarray)]
        return all(np.shares_memory(whole, item) for item in arrays)

    assert on_ranks(work)[1]


@pytest.mark.parametrize("name", ["gather", "scatter", "reduce_scatter", "all_to_all"])
def test_a_backend_is_given_buffers_that_are_apart(name):
    call, blocks_in, blocks_out = CALLS[name]

    def work(group):
        rows = memory(group.rank)
        x, out = rows[: blocks_in * ROWS], rows[1 : 1 + blocks_out * ROWS]
        seen = handed_over(group, name, lambda: call(group, x, out=out))
        arrays = [item for item in seen if isinstance(item, np.ndarray)]
        return len(arrays) == 2 and not np.shares_memory(*arrays)

    assert on_ranks(work)[1]


@pytest.mark.parametrize("name", CALLS)
def test_a_strided_input_is_taken(name):
    call, blocks_in, _ = CALLS[name]

    def work(group):
        x = memory(group.rank)[: 2 * blocks_in * ROWS : 2]
        return np.array_equal(call(group, x), call(group, x.copy()))

    assert on_ranks(work) == [True] * RANKS
