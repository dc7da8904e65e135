"""The short path gives the ordinary one's bits, and ranks on both meet: every collective, dtype and reduction."""

from __future__ import annotations

import threading

import numpy as np
import pytest

from ferro_gloo.shm.large_path import LargePath
from ferro_gloo.shm.native import ABSENT, NATIVE
from ferro_testing import run_ranks

from . import short_paths
from .short_paths import OPS, REDUCED, REDUCING, ROOTED, Short, assert_same, dtype_of, expected, numbers

pytestmark = pytest.mark.skipif(NATIVE is None, reason=ABSENT)

# Blocks of these sizes: in a line (48 bytes), at its end, beyond it, and in several blocks of a reduction.
SIZES = (1, 6, 7, 48, 49, 5003)


def run(function, ranks, *args):
    return run_ranks(function, ranks, backend="gloo", timeout_s=60, args=args)


def check(short, seed, took_ordinary=(), steps=3):
    """Run one call on both paths, as `took_ordinary` says by rank and step, and compare the results."""
    n, rank = short.group.world_size, short.group.rank
    inputs = [numbers(short.dtype, short.size, [seed, r]) for r in range(n)]
    wanted = expected(short.op, inputs, rank, short.reduction, short.root)
    what = f"{short.op} of {short.size} {short.dtype}, {short.reduction}, root {short.root}, on rank {rank} of {n}"
    got = short.run_ordinary(inputs[rank].copy())
    assert_same(got, wanted, f"{what}, ordinary path")
    for step in range(steps):
        x = inputs[rank].copy()
        again = short.run_ordinary(x) if step in took_ordinary else short.run(x, in_place=step % 2 == 1)
        if short.has_result:
            assert again.tobytes() == got.tobytes(), f"{what}, step {step}"
        if again is not x:
            assert x.tobytes() == inputs[rank].tobytes(), f"{what} changed its input"


def every_reduction(group):
    n = group.world_size
    for op in REDUCING:
        for number, (name, reduction) in enumerate(REDUCED):
            for size in SIZES if number % 5 == 0 else (1, 49):
                root = number % n if op == "reduce" else -1
                size = size * n if op == "reduce_scatter" else size
                check(Short(group, op, dtype_of(name), size, reduction, root), number)


@pytest.mark.parametrize("ranks", [2, 3, 5])
def test_reductions_have_the_bits_of_the_ordinary_path(ranks):
    run(every_reduction, ranks)


def every_movement(group):
    n = group.world_size
    for number, op in enumerate(op for op in OPS if op not in REDUCING):
        for name in ("uint8", "float32", "complex128", "float16"):
            for size in SIZES:
                root = number % n if op in ROOTED else -1
                size = size * n if op in short_paths.CUT else size
                check(Short(group, op, dtype_of(name), size, None, root), number)


@pytest.mark.parametrize("ranks", [2, 3, 5])
def test_movements_have_the_bits_of_the_ordinary_path(ranks):
    run(every_movement, ranks)


def on_both_paths(group):
    """In every step some ranks take the ordinary path, and each combination comes."""
    n, rank = group.world_size, group.rank
    steps = [step for step in range(5) if (step + 1) >> (rank % 3) & 1]
    for number, op in enumerate(OPS):
        for size in (1, 12, 13, 5000):
            size = size * n if op in short_paths.CUT else size
            root = number % n if op in ROOTED else -1
            reduction = "sum" if op in REDUCING else None
            for name in ("float32", "bfloat16"):
                check(Short(group, op, dtype_of(name), size, reduction, root), number, steps, 5)


@pytest.mark.parametrize("ranks", [2, 3, 4, 5, 8])
def test_ranks_on_both_paths_meet(ranks):
    run(on_both_paths, ranks)


def calls_of_a_program(group):
    """Calls as users make them, the third of a kind on the short path; asynchronous ones are between them."""
    x = np.full(3, float(group.rank))
    n = group.world_size
    for step in range(40):
        work = group.all_reduce(x + step, async_op=True) if step % 3 == 0 else None
        total = group.all_reduce(x)
        if step % 4 == 0:
            group.barrier()
        biggest = group.all_reduce(x, "max")
        large = group.all_reduce(np.full(200_000, x[0])) if step % 10 == 0 else total
        assert total[0] == sum(range(n)) == large[-1]
        assert biggest[2] == n - 1
        if work is not None:
            assert work.wait()[1] == sum(range(n)) + n * step
    return int(group._dispatcher._collectives.state[1])


@pytest.mark.parametrize("ranks", [2, 3, 5])
def test_a_program_of_calls_takes_the_short_path(ranks):
    assert min(run(calls_of_a_program, ranks)) > 70


def whole_slots(group):
    """Messages that just fit a slot, and those that do not: these have another path."""
    slot, n = 512 << 10, group.world_size
    for op, size in [("reduce", slot), ("broadcast", slot), ("all_gather", slot // n), ("all_to_all", slot // n * n)]:
        root = 0 if op in ROOTED else -1
        check(Short(group, op, np.dtype(np.uint8), size, "max" if op == "reduce" else None, root), 1)
        larger = Short(group, op, np.dtype(np.uint8), size + n, "max" if op == "reduce" else None, root)
        assert isinstance(larger.path, LargePath)


@pytest.mark.parametrize("ranks", [2, 3])
def test_whole_slots(ranks):
    run(whole_slots, ranks)


def hundreds_of_kinds(group):
    shorts = [Short(group, "all_reduce", np.dtype(np.float32), size, "sum") for size in range(1, 400)]
    for _ in range(4):
        for short in shorts:
            got = short.run(np.full(short.size, group.rank, np.float32))
            assert got.tolist() == [sum(range(group.world_size))] * short.size
    del short, shorts[::2]  # others get their memory
    for size in range(1, 400):
        short = Short(group, "all_gather", np.dtype(np.int16), size)
        assert short.run(np.full(size, group.rank, np.int16)).tolist() == sorted(list(range(group.world_size)) * size)


def test_hundreds_of_kinds_of_calls():
    run(hundreds_of_kinds, 3)


def overlapping_groups(group):
    """Every thread has a group of its own, of other ranks, and all threads call at once."""
    members = [[0, 1, 2], [0, 1], [1, 2], [0, 2]]
    groups = [group.subgroup(ranks) if group.rank in ranks else None for ranks in members]
    errors = []

    def call(subgroup, ranks):
        try:
            x = np.array([group.rank], np.int64)
            for _ in range(300):
                assert subgroup.all_reduce(x)[0] == sum(ranks)
                assert subgroup.all_gather(x).tolist() == ranks
        except BaseException as error:  # noqa: BLE001 - raised below
            errors.append(error)

    threads = [
        threading.Thread(target=call, args=(subgroup, ranks))
        for subgroup, ranks in zip(groups, members, strict=True)
        if subgroup is not None
    ]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    if errors:
        raise errors[0]


def test_threads_use_groups_that_overlap():
    run(overlapping_groups, 3)


def threads_in_one_group(group):
    """All threads make the same call, so that any order of theirs is that of the other ranks."""
    errors = []

    def call():
        try:
            for _ in range(200):
                assert group.all_reduce(np.ones(2))[1] == group.world_size
        except BaseException as error:  # noqa: BLE001 - raised below
            errors.append(error)

    threads = [threading.Thread(target=call) for _ in range(3)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    if errors:
        raise errors[0]


@pytest.mark.parametrize("ranks", [2, 3])
def test_threads_use_one_group(ranks):
    run(threads_in_one_group, ranks)
