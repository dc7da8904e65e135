"""The fast path of large collectives gives the ordinary one's bits, and ranks on both meet."""

from __future__ import annotations

import os
import threading
import time

import numpy as np
import pytest

import ferro
from ferro_gloo.shm.chunked import IN_PLACE_BYTES
from ferro_gloo.shm.large_path import LargePath
from ferro_gloo.shm.native import ABSENT, NATIVE
from ferro_testing import run_ranks, run_ranks_outcomes

from .short_paths import CUT, OPS, REDUCING, ROOTED, Short, assert_same, dtype_of, expected, numbers

pytestmark = pytest.mark.skipif(NATIVE is None, reason=ABSENT)

SLOT = 512 << 10
# Bytes of the input: one more than a slot in elements, some chunks and a piece, and many chunks.
SIZES = (SLOT + 8, 9 * (64 << 10) + 24, 3_000_008)
STEPS = 4  # the first two, apart and in place, make the plans that the others use
LATE_S = 0.6


def run(function, ranks, *args):
    return run_ranks(function, ranks, backend="gloo", timeout_s=60, args=args)


def outcomes_of(function, ranks, *args):
    return run_ranks_outcomes(function, ranks, backend="gloo", timeout_s=40, args=args)


def large(group, op, dtype, nbytes, reduction=None, root=-1):
    """Make a call whose messages do not fit a slot."""
    n = group.world_size
    size = nbytes // dtype.itemsize
    if op in CUT:
        size = size // n * n + n
    return Short(group, op, dtype, size, reduction, root)


def memory(group, like, shared):
    """Return a copy of an array, in ordinary memory or where others can use it in place."""
    array = group.empty(like.size, like.dtype) if shared else np.empty_like(like)
    array[...] = like
    return array


def check(call, seed, took_ordinary=(), shared=()):
    """Run one call on both paths, as `took_ordinary` says by step, and compare the results."""
    n, rank = call.group.world_size, call.group.rank
    inputs = [numbers(call.dtype, call.size, [seed, r]) for r in range(n)]
    wanted = expected(call.op, inputs, rank, call.reduction, call.root)
    what = f"{call.op} of {call.size} {call.dtype}, {call.reduction}, root {call.root}, on rank {rank} of {n}"
    assert isinstance(call.path, LargePath), what
    got = call.run_ordinary(inputs[rank].copy())
    assert_same(got, wanted, f"{what}, ordinary path")
    for step in range(STEPS):
        x = memory(call.group, inputs[rank], step in shared)
        again = call.run_ordinary(x) if step in took_ordinary else call.run(x, in_place=step % 2 == 1)
        if call.has_result:
            assert again.tobytes() == got.tobytes(), f"{what}, step {step}"
        if again is not x:
            assert x.tobytes() == inputs[rank].tobytes(), f"{what} changed its input"


def every_call(group, sizes):
    n = group.world_size
    for op in OPS:
        kinds = [(None, "float32"), (None, "bfloat16"), (None, "complex64")]
        if op in REDUCING:
            kinds = [
                ("sum", "float32"),
                ("sum", "bfloat16"),
                ("mean", "complex64"),
                ("max", "float64"),
                ("prod", "float16"),
            ]
        for number, (reduction, name) in enumerate(kinds):
            for nbytes in sizes if number == 0 else sizes[:2]:
                root = (number + nbytes) % n if op in ROOTED else -1
                check(large(group, op, dtype_of(name), nbytes, reduction, root), number)


@pytest.mark.parametrize(("ranks", "sizes"), [(2, SIZES), (3, SIZES[:2]), (5, SIZES[:1])])
def test_the_bits_are_those_of_the_ordinary_path(ranks, sizes):
    run(every_call, ranks, sizes)


def on_both_paths(group, shared_ranks):
    """In every step some ranks take the ordinary path, and some have arrays that others could use in place."""
    n, rank = group.world_size, group.rank
    ordinary = [step for step in range(STEPS) if (step + 1) >> (rank % 3) & 1]
    shared = range(STEPS) if rank in shared_ranks else ()
    for number, op in enumerate(OPS):
        for nbytes in (SLOT + 8, IN_PLACE_BYTES + 64):
            root = number % n if op in ROOTED else -1
            reduction = "sum" if op in REDUCING else None
            check(large(group, op, np.dtype(np.float32), nbytes, reduction, root), number, ordinary, shared)


@pytest.mark.parametrize("shared_ranks", [(), (0,), (0, 1, 2, 3)], ids=["private", "one shares", "all share"])
@pytest.mark.parametrize("ranks", [2, 4])
def test_ranks_on_both_paths_meet(ranks, shared_ranks):
    run(on_both_paths, ranks, shared_ranks)


def own_block_in_place(group):
    """An all_gather whose input is this rank's block of the result, as sharded parameters are."""
    n, rank, size = group.world_size, group.rank, 400_000
    path = Short(group, "all_gather", np.dtype(np.float32), size).path
    for step in range(5):
        out = np.full(n * size, -1, np.float32)
        block = out[rank * size : (rank + 1) * size]
        block[...] = rank + step
        assert path(block, out)
        assert (out.reshape(n, size) == np.arange(n)[:, None] + step).all()
        apart = np.full(n * size, -1, np.float32)
        assert path(block.copy(), apart)
        assert apart.tobytes() == out.tobytes()


def test_a_gathering_in_place():
    run(own_block_in_place, 3)


def unfit_arrays(group):
    """The path declines what it cannot use, and the other ranks do not notice."""
    size = 400_000
    path = Short(group, "all_reduce", np.dtype(np.float32), size, "sum").path
    x, out = np.ones(size, np.float32), np.empty(size, np.float32)
    frozen = out.copy()
    frozen.flags.writeable = False
    memory = np.ones(size + 1, np.float32)
    unaligned = np.ones(4 * size + 1, np.uint8)[1:].view(np.float32)
    for _ in range(2):
        for source, target in [
            (x[:-1], out[:-1]),
            (x, frozen),
            (np.ones(2 * size, np.float32)[::2], out),
            (memory[1:], memory[:-1]),
            (unaligned, out),
            (None, out),
            (x, None),
        ]:
            assert not path(source, target)
            assert path.bind(source, target) is None
        assert path(x, out)
        assert (out == group.world_size).all()
    bound = path.bind(x, out)
    assert not bound.start()
    assert bound()
    bound.close()


def test_arrays_that_it_cannot_use():
    run(unfit_arrays, 2)


# -- failures -------------------------------------------------------------------------------------

CALLS = {
    "usual": lambda group: group.all_reduce(np.ones(400_000, np.float32)),
    "size": lambda group: group.all_reduce(np.ones(400_001, np.float32)),
    "dtype": lambda group: group.all_reduce(np.ones(400_000, np.int32)),
    "reduction": lambda group: group.all_reduce(np.ones(400_000, np.float32), "max"),
    "other": lambda group: group.all_gather(np.ones(400_000, np.float32)),
    "small": lambda group: group.all_reduce(np.ones(4, np.float32)),
    "ordinary": lambda group: group.all_reduce(np.ones(400_001, np.float32), timeout_s=30),
}


def caught(call):
    try:
        call()
    except ferro.FerroError as error:
        return [type(error).__name__, str(error), error.peer]
    return ["nothing", "", None]


def differ(group, other, odd):
    for call in ("usual", other):
        for _ in range(4):
            CALLS[call](group)
    return caught(lambda: CALLS[other if group.rank == odd else "usual"](group))


@pytest.mark.parametrize("other", [name for name in CALLS if name != "usual"])
@pytest.mark.parametrize(("ranks", "odd"), [(2, 1), (3, 0)])
def test_a_mismatch_is_told_to_every_rank(other, ranks, odd):
    outcomes = outcomes_of(differ, ranks, other, odd)
    results = [outcome.result for outcome in outcomes]
    assert [result[0] for result in results] == ["CollectiveMismatch"] * ranks, results
    assert len({result[1] for result in results}) == 1, results


def late_rank(group, late):
    x = np.full(1_000_000, group.rank + 1, np.float32)
    for step in range(3):
        if group.rank == late and step:
            time.sleep(LATE_S)
        total = group.all_reduce(x)
        assert (total == sum(range(1, group.world_size + 1))).all()


@pytest.mark.parametrize(("ranks", "late"), [(2, 0), (4, 3)])
def test_the_others_wait_for_a_late_rank(ranks, late):
    run(late_rank, ranks, late)


def dead_rank(group):
    x = np.ones(1_000_000, np.float32)
    for _ in range(3):
        group.all_reduce(x)
    if group.rank == 1:
        os._exit(3)
    return caught(lambda: group.all_reduce(x))


def test_a_dead_rank_is_found():
    outcomes = outcomes_of(dead_rank, 3)
    assert [outcomes[rank].result[0] for rank in (0, 2)] == ["PeerLost"] * 2
    assert [outcomes[rank].result[2] for rank in (0, 2)] == [1, 1]


def missing_rank(group):
    x = np.ones(1_000_000, np.float32)
    for _ in range(3):
        group.all_reduce(x)
    if group.rank:
        return caught(lambda: group.all_reduce(x))
    time.sleep(3 * LATE_S)
    return caught(lambda: group.all_reduce(x))


def test_a_missing_rank_ends_the_wait_at_the_deadline():
    outcomes = run_ranks_outcomes(missing_rank, 2, backend="gloo", timeout_s=40, init_options={"timeout_s": LATE_S})
    assert outcomes[1].result[0] == "CollectiveTimeout", outcomes[1].describe()


def late_waits(group):
    path, deadlines, seen = large(group, "all_reduce", np.dtype(np.float32), 2_000_000, "sum").path, [], []
    for _ in range(2):
        path._late(deadlines, lambda *, deadline: seen.append(deadline))
        time.sleep(0.001)
    return seen


def test_all_waits_of_one_call_have_its_deadline():
    for first, second in run(late_waits, 2):
        assert first == second


def threads_at_once(group):
    """Two threads of each rank, which issue the same calls in one order, by a lock of their own."""
    x = np.full(300_000, group.rank + 1, np.float32)
    total = sum(range(1, group.world_size + 1))
    failed = []

    def computing():
        for _ in range(20):
            if not (np.sqrt(np.square(x)) == x).all():
                failed.append("computed wrong numbers")

    thread = threading.Thread(target=computing)
    thread.start()
    for step in range(20):
        work = group.all_reduce(x, async_op=True) if step % 2 else None
        if not (group.all_reduce(x) == total).all():
            failed.append("reduced wrong numbers")
        if work is not None and not (work.wait() == total).all():
            failed.append("reduced wrong numbers asynchronously")
    thread.join()
    assert not failed


def test_beside_other_threads_and_asynchronous_calls():
    run(threads_at_once, 2)
