"""Conformance of all_reduce, reduce and reduce_scatter."""

from __future__ import annotations

import zlib
from collections.abc import Callable, Sequence
from itertools import cycle

import numpy as np

from ferro import ProcessGroup
from ferro.types import Array
from ferro_testing.case import Case
from ferro_testing.differences import REDUCING, without
from ferro_testing.samples import (
    LARGE,
    SHAPES,
    Findings,
    Shape,
    in_blocks,
    noise,
    preferred,
    reduced_noise,
    reduced_samples,
    reductions,
    sample,
)


def check_reductions(case: Case) -> None:
    """Every dtype with every reduction, every dtype with every shape, every root, large arrays."""
    ops = [op for op in REDUCING if case.supports(op)]
    if ops:
        case.verify_all(_reduce_everything, case.dtypes, ops, case.exceptions)


def check_reduction_functions(case: Case) -> None:
    """A user's function (a, b, out) serves as reduction, and sees the ranks in order."""
    if case.supports("all_reduce", "functions"):
        case.verify_all(_reduce_by_function)


def check_equal_bits(case: Case) -> None:
    """A floating-point sum has the same bits on every rank, whatever the size."""
    if case.supports("all_reduce", "all_gather", "equal_bits"):
        case.verify_all(_compare_bits, _inexact(case, "all_reduce"))


def check_deterministic(case: Case) -> None:
    """With deterministic=True a result is that of NumPy in order of rank, bit for bit."""
    ops = [op for op in REDUCING if case.supports(op)]
    if ops and case.supports("deterministic"):
        inexact = _inexact(case)
        case.verify_all(_reduce_in_order, inexact, ops, case.exceptions, deterministic=True)


def _inexact(case: Case, *ops: str) -> list[str]:
    names = ("float16", "bfloat16", "float32", "float64")
    return [name for name in names if name in case.carried(*ops)]


def _reduce_everything(
    group: ProcessGroup, dtypes: Sequence[str], ops: Sequence[str], exceptions: Sequence[str]
) -> list[str]:
    found = Findings(group.rank)
    roots = cycle(range(group.world_size))

    def reduce(shape: Shape, dtype: str, name: str, root: int) -> None:
        some = without(ops, exceptions, dtype, name)
        _reduce_once(group, some, shape, dtype, name, root, found)

    filled = [shape for shape in SHAPES if shape and 0 not in shape]
    others = [shape for shape in SHAPES if shape not in filled]  # these show no reduction, or not all collectives
    for index, dtype in enumerate(dtypes):
        names = reductions(dtype)
        for number in range(max(len(names), len(filled))):
            shape = filled[(index + number) % len(filled)]
            reduce(shape, dtype, names[number % len(names)], next(roots))
        for number, shape in enumerate(others):
            reduce(shape, dtype, names[number % len(names)], next(roots))
    for root in range(group.world_size):
        reduce((3, 5), preferred("float32", dtypes), "sum", root)
    for dtype in [name for name in ("float32", "float16", "int8") if name in dtypes]:
        reduce((LARGE,), dtype, reductions(dtype)[1], next(roots))
    return found.report()


def _reduce_once(
    group: ProcessGroup, ops: Sequence[str], shape: Shape, dtype: str, name: str, root: int, found: Findings
) -> None:
    """Check all three collectives on one kind of call."""
    n, me = group.world_size, group.rank
    what = f"{dtype}{list(shape)} op={name}"
    if "all_reduce" in ops or "reduce" in ops:
        wanted = reduced_samples(n, shape, dtype, name)
    if "all_reduce" in ops:
        result = group.all_reduce(sample(me, shape, dtype), name)
        found.same(result, wanted, f"all_reduce {what}")
    if "reduce" in ops:
        result = group.reduce(sample(me, shape, dtype), root, name)
        if me == root:
            found.same(result, wanted, f"reduce {what} root={root}")
        else:
            found.true(result is None, f"reduce {what} root={root}: not None away from the root")
    if "reduce_scatter" in ops and shape:
        tall = in_blocks(shape, n)
        whole = reduced_samples(n, tall, dtype, name, 1)
        result = group.reduce_scatter(sample(me, tall, dtype, 1), name)
        found.same(result, np.split(whole, n)[me], f"reduce_scatter {what}")


def _reduce_by_function(group: ProcessGroup) -> list[str]:
    found = Findings(group.rank)
    for count in (1, 5, 70_000):
        ranks = np.full(count, 2.0**group.rank)
        found.same(
            group.all_reduce(ranks, _larger_by_magnitude),
            np.full(count, 2.0 ** (group.world_size - 1)),
            f"all_reduce of {count} elements by a function",
        )
    return found.report()


def _larger_by_magnitude(a: Array, b: Array, out: Array) -> None:
    np.copyto(out, np.where(np.abs(a) >= np.abs(b), a, b))


def _compare_bits(group: ProcessGroup, dtypes: Sequence[str]) -> list[str]:
    found = Findings(group.rank)
    for dtype in dtypes:
        for count in (1, 5, 1000, 70_001):
            total = group.all_reduce(noise(group.rank, count, dtype))
            sums = group.all_gather(np.array(zlib.crc32(total.tobytes())))
            found.true(len(set(sums.tolist())) == 1, f"all_reduce of {count} {dtype}: ranks have different bits")
    return found.report()


def _reduce_in_order(
    group: ProcessGroup, dtypes: Sequence[str], ops: Sequence[str], exceptions: Sequence[str]
) -> list[str]:
    found = Findings(group.rank)
    n, me = group.world_size, group.rank
    calls: dict[str, Callable[[Array, str], object]] = {
        "all_reduce": lambda x, name: group.all_reduce(x, name),
        "reduce": lambda x, name: group.reduce(x, n - 1, name),
        "reduce_scatter": lambda x, name: group.reduce_scatter(x, name),
    }
    for dtype in dtypes:
        for count in (n, 300 * n, 20_000 * n):
            mine = noise(me, count, dtype)
            for name in ("sum", "mean"):
                wanted = reduced_noise(n, count, dtype, name)
                for op in without(ops, exceptions, dtype, name):
                    result = calls[op](mine, name)
                    if op == "reduce" and me != n - 1:
                        continue
                    part = np.split(wanted, n)[me] if op == "reduce_scatter" else wanted
                    found.same(result, part, f"{op} of {count} {dtype} op={name} in order of rank")
    return found.report()
