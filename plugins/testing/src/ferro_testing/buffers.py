"""Conformance of `out`, of results in place, and of inputs that are not plain arrays."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np

from ferro import ProcessGroup
from ferro.types import Array
from ferro_testing.case import Case
from ferro_testing.differences import without
from ferro_testing.samples import Findings, sample

_COUNTS = (3, 20_000)
_DTYPE = "float64"


def check_buffers(case: Case) -> None:
    """`out` is filled and returned; any layout of input is taken, and none is modified."""
    ops = [op for op in _COLLECTIVES if case.supports(op)]
    case.verify_all(_use_buffers, without(ops, case.exceptions, _DTYPE, "sum"))


def check_allocate(case: Case) -> None:
    """`empty` gives arrays of any shape and dtype that can be written and sent."""
    if case.supports("broadcast"):
        case.verify_all(_allocate, case.carried("broadcast"))


@dataclass(frozen=True, slots=True)
class _Collective:
    """A function that calls one collective, and the sizes of its input and output, in blocks of rows.

    Attributes:
        call: (group, input, out) -> result; the last rank is the root of rooted ones.
        blocks_in: 1 for one block, None for one block for each rank.
        blocks_out: the same of the result.
        at_root: only the root has a result.
    """

    call: Callable[[ProcessGroup, Array, Array | None], object]
    blocks_in: int | None = 1
    blocks_out: int | None = 1
    at_root: bool = False


def _last(group: ProcessGroup) -> int:
    return group.world_size - 1


_COLLECTIVES = {
    "all_reduce": _Collective(lambda g, x, out: g.all_reduce(x, out=out)),
    "broadcast": _Collective(lambda g, x, out: g.broadcast(x, _last(g), out=out)),
    "reduce": _Collective(lambda g, x, out: g.reduce(x, _last(g), out=out), at_root=True),
    "all_gather": _Collective(lambda g, x, out: g.all_gather(x, out=out), blocks_out=None),
    "gather": _Collective(lambda g, x, out: g.gather(x, _last(g), out=out), blocks_out=None, at_root=True),
    "scatter": _Collective(lambda g, x, out: g.scatter(x, _last(g), out=out), blocks_in=None),
    "reduce_scatter": _Collective(lambda g, x, out: g.reduce_scatter(x, out=out), blocks_in=None),
    "all_to_all": _Collective(lambda g, x, out: g.all_to_all(x, out=out), blocks_in=None, blocks_out=None),
}


def _use_buffers(group: ProcessGroup, ops: Sequence[str]) -> list[str]:
    found = Findings(group.rank)
    for op in ops:
        for rows in _COUNTS:
            _use_out(group, op, rows, found)
            _use_layouts(group, op, rows, found)
    return found.report()


def _use_out(group: ProcessGroup, op: str, rows: int, found: Findings) -> None:
    """Compare calls with `out=`, apart from the input and overlapping it, with a call without `out`."""
    how = _COLLECTIVES[op]
    n, what = group.world_size, f"{op} of {rows} rows"
    given = sample(group.rank, (rows * (how.blocks_in or n),), _DTYPE)
    wanted = how.call(group, given, None)
    counts = rows * (how.blocks_out or n)
    out = np.zeros(counts)
    result = how.call(group, given, out)
    if how.at_root and group.rank != _last(group):
        found.true(result is None, f"{what}: not None away from the root")
        how.call(group, given, None)  # the root calls in place
        return
    assert isinstance(wanted, np.ndarray)
    found.true(result is out, f"{what}: does not return out itself")
    found.same(out, wanted, f"{what} into out")
    memory = np.zeros(max(counts, given.size))
    memory[: given.size] = given
    how.call(group, memory[: given.size], memory[:counts])
    found.same(memory[:counts].copy(), wanted, f"{what} in place")


def _use_layouts(group: ProcessGroup, op: str, rows: int, found: Findings) -> None:
    """Give the same values as a strided, reversed, transposed and read-only array, and a list."""
    how = _COLLECTIVES[op]
    count = rows * (how.blocks_in or group.world_size)
    plain = np.array(sample(group.rank, (count, 2), _DTYPE))
    wanted = how.call(group, plain, None)
    strided = np.zeros((2 * count, 4))[::2, ::2]
    strided[...] = plain
    layouts: dict[str, object] = {
        "strided": strided,
        "reversed": np.array(plain[::-1])[::-1],
        "transposed": np.asfortranarray(plain),
        "read-only": sample(group.rank, (count, 2), _DTYPE),
    }
    if rows < 10:
        layouts["list"] = plain.tolist()
    for name, given in layouts.items():
        before = np.array(given)
        result = how.call(group, given, None)  # type: ignore[arg-type]
        what = f"{op} of {rows} rows, {name} input"
        if wanted is None:
            found.true(result is None, f"{what}: not None away from the root")
        else:
            assert isinstance(wanted, np.ndarray)
            found.same(result, wanted, what)
        found.same(np.array(given), before, f"{what}, afterwards")


def _allocate(group: ProcessGroup, dtypes: Sequence[str]) -> list[str]:
    found = Findings(group.rank)
    for dtype in dtypes:
        for shape in ((), (0,), (5,), (3, 4), (70_000,)):
            given = sample(group.rank, shape, dtype)
            array = group.empty(shape, given.dtype)
            array[...] = given
            found.same(array, given, f"empty({shape}, {dtype}) that was filled")
            group.broadcast(array, 0, out=array)
            found.same(array, sample(0, shape, dtype), f"broadcast in empty({shape}, {dtype})")
    return found.report()
