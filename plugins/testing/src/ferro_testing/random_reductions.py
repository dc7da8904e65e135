"""Conformance of reductions of random numbers, compared with NumPy in double precision.

The samples of the other checks are small whole numbers, with which no sum is rounded and none overflows. These numbers
have all magnitudes, so that a wrong accumulation, a partial sum that overflows, or bits that depend on the rank show.
"""

from __future__ import annotations

import zlib
from collections.abc import Sequence

import numpy as np

from ferro import ProcessGroup
from ferro.types import Array
from ferro_testing.case import Case
from ferro_testing.differences import REDUCING, without
from ferro_testing.samples import Findings, dtype_of, reduced, reductions

RUNS = 24
_COUNTS = (1, 1, 2, 3, 7, 33, 257, 1_000, 4_099, 20_001)
_HALF = ("float16", "bfloat16")
_INEXACT = (*_HALF, "float32", "complex64")  # drawn more often than other dtypes


def check_random_reductions(case: Case, *, seed: int = 0, runs: int = RUNS) -> None:
    """Reductions of random numbers are NumPy's, but for rounding; half precision is rounded once."""
    ops = [op for op in REDUCING if case.supports(op)]
    if ops:
        strict = case.supports("half_rounded_once")
        case.verify_all(reduce_randomly, case.dtypes, ops, case.exceptions, strict, seed, runs)


def reduce_randomly(
    group: ProcessGroup,
    dtypes: Sequence[str],
    ops: Sequence[str],
    exceptions: Sequence[str],
    strict: bool,
    seed: int,
    runs: int,
) -> list[str]:
    """Make random calls, one after the other; return the mistakes."""
    found, n, me = Findings(group.rank), group.world_size, group.rank
    for number in range(runs):
        random = np.random.default_rng((seed, number))  # the same choices on all ranks
        dtype = str(random.choice([name for name in dtypes for _ in range(1 + 2 * (name in _INEXACT))]))
        name = str(random.choice(list(reductions(dtype))))
        some = without(ops, exceptions, dtype, name)
        if not some:
            continue
        op, count = str(random.choice(list(some))), int(random.choice(_COUNTS))
        if op == "reduce_scatter":
            count = -(-count // n) * n
        rows = [_draw(random, dtype, count, wide=name in ("sum", "mean")) for _ in range(n)]
        what = f"{op} of {count} {dtype} op={name}, seed {seed}, number {number}"
        result = _call(group, op, name, rows[me], random)
        whole = slice(None) if op != "reduce_scatter" else slice(me * count // n, (me + 1) * count // n)
        if result is not None:
            _compare(found, np.asarray(result), [row[whole] for row in rows], name, strict, what)
        if op == "all_reduce":
            sums = group.all_gather(np.array(zlib.crc32(np.asarray(result).tobytes())))
            found.true(len(set(sums.tolist())) == 1, f"{what}: ranks have different bits")
    return found.report()


def _draw(random: np.random.Generator, dtype: str, count: int, *, wide: bool) -> Array:
    """Draw numbers: for sums up to near the largest of the dtype, so that a sum, but no mean, overflows in it."""
    kind = dtype_of(dtype)
    if kind.kind in "iub":
        return np.frombuffer(random.bytes(count * kind.itemsize), kind if kind.kind != "b" else np.int8).astype(kind)
    magnitudes = random.choice([1e-4, 1.0, 3e4] if wide else [0.5, 1.0, 2.0], count)
    numbers = random.standard_normal(count) * magnitudes
    if wide and random.random() < 0.3:
        numbers = np.full(count, 4e4)
    if dtype.startswith("complex"):
        numbers = numbers + 1j * random.standard_normal(count)
    with np.errstate(over="ignore"):
        array: Array = numbers.astype(kind)
    return array


def _call(group: ProcessGroup, op: str, name: str, mine: Array, random: np.random.Generator) -> object:
    how = str(random.choice(["new", "in place", "coalesced"]))
    if op == "reduce":
        return group.reduce(mine, int(random.integers(group.world_size)), name)
    if op == "reduce_scatter":
        return group.reduce_scatter(mine, name)
    if how == "in place":
        return group.all_reduce(mine.copy(), name) if mine.size % 2 else group.all_reduce(mine, name, out=mine.copy())
    if how == "coalesced":
        with group.coalesce() as calls:
            halves = [calls.all_reduce(half, name) for half in np.array_split(mine, 2)]
        return np.concatenate([np.asarray(half.result()) for half in halves])
    return group.all_reduce(mine, name)


def _compare(found: Findings, result: Array, rows: Sequence[Array], name: str, strict: bool, what: str) -> None:
    kind = rows[0].dtype
    with np.errstate(all="ignore"):
        if kind.kind in "iub" or name in ("min", "max") or (strict and kind.name in _HALF):
            found.same(result, reduced(rows, name), what)
            return
        wide = np.complex128 if kind.kind == "c" else np.float64
        exact = np.stack([row.astype(wide) for row in rows])
        total = exact.prod(axis=0) if name == "prod" else exact.sum(axis=0)
        scale = np.abs(exact).prod(axis=0) if name == "prod" else np.abs(exact).sum(axis=0)
        if name == "mean":
            total, scale = total / len(rows), scale / len(rows)
        bits = {"float16": 10, "bfloat16": 7, "float32": 23, "complex64": 23}.get(kind.name, 52)
        allowed = 4 * len(rows) * scale * 2.0**-bits + 1e-7 * (kind.name == "float16")
        difference = np.abs(result.astype(wide) - total)
        overflows = (np.abs(total) if name == "mean" else scale) > float(np.finfo(np.float16).max)
        wrong = ~(difference <= allowed) & ~(overflows if kind.name == "float16" else np.zeros(total.shape, bool))
    if wrong.any():
        at = int(np.argmax(wrong))
        found.note(f"{what}: element {at} is {result[at]}, not {total[at]}")
