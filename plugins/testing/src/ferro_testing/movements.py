"""Conformance of the collectives that move data without changing it."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import cycle

import numpy as np

from ferro import ProcessGroup, UnsupportedError
from ferro.types import Array
from ferro_testing.case import Case
from ferro_testing.differences import MOVING, without
from ferro_testing.samples import (
    LARGE,
    SHAPES,
    Findings,
    Shape,
    dtype_of,
    in_blocks,
    known,
    preferred,
    reduced_samples,
    rows,
    sample,
)


def check_movements(case: Case) -> None:
    """Every shape with every size of element, every dtype, every root, large arrays."""
    ops = [op for op in (*MOVING, "barrier") if case.supports(op)]
    if ops:
        case.verify_all(_move_everything, case.dtypes, ops, case.exceptions)


def check_uneven(case: Case) -> None:
    """Sizes that differ from rank to rank, zero among them."""
    ops = [op for op in (*MOVING, "reduce_scatter") if case.supports(op)]
    if ops and case.supports("uneven"):
        case.verify_all(_move_unevenly, ops)


def check_moved_dtypes(case: Case) -> None:
    """Dates, structured elements and float8 are moved bit for bit, and no reduction takes them."""
    ops = [op for op in (*MOVING, "sendrecv") if case.supports(op)]
    if ops:
        case.verify_all(_move_other_dtypes, ops, case.supports("all_reduce"))


def _move_other_dtypes(group: ProcessGroup, ops: Sequence[str], reduces: bool) -> list[str]:
    found, n, me = Findings(group.rank), group.world_size, group.rank
    dtypes = [np.dtype("M8[D]"), np.dtype([("name", "S3"), ("at", "f4", (2,))])]
    dtypes += [dtype_of(name) for name in ("float8_e4m3fn", "float8_e5m2") if known([name])]
    for dtype in dtypes:
        rows = [(np.arange(3 * dtype.itemsize, dtype=np.uint8) * (7 + rank)).view(dtype) for rank in range(n)]
        mine, together = rows[me], np.concatenate(rows)
        wanted_of = {
            "broadcast": rows[n - 1],
            "all_gather": together,
            "gather": together,
            "scatter": mine,
            "all_to_all": np.concatenate([row[:1] for row in rows]),
            "sendrecv": rows[(me - 1) % n],
        }
        for op in ops:
            wanted, result = wanted_of[op], _move(group, op, mine, together)
            if op == "gather" and me != n - 1:
                found.true(result is None, f"gather of {dtype}: not None away from the root")
                continue
            is_kind = isinstance(result, np.ndarray) and result.dtype == dtype and result.shape == wanted.shape
            same_bits = is_kind and np.asarray(result).tobytes() == wanted.tobytes()
            found.true(same_bits, f"{op} of {dtype}: got {result!r}, not {wanted!r}")
        if reduces:
            try:
                group.all_reduce(mine)
            except UnsupportedError:
                continue
            found.note(f"all_reduce of {dtype} raised nothing")
    return found.report()


def _move(group: ProcessGroup, op: str, mine: Array, together: Array) -> object:
    """Make one call, with the last rank as root; `sendrecv` goes to the next rank."""
    n, me = group.world_size, group.rank
    if op == "scatter":
        return group.scatter(together if me == n - 1 else None, n - 1)
    if op == "all_to_all":
        return group.all_to_all(np.concatenate([mine[:1]] * n))
    if op == "sendrecv":
        return group.sendrecv(mine, np.empty_like(mine), (me + 1) % n, (me - 1) % n)
    return group.all_gather(mine) if op == "all_gather" else getattr(group, op)(mine, n - 1)


def _move_everything(
    group: ProcessGroup, dtypes: Sequence[str], ops: Sequence[str], exceptions: Sequence[str]
) -> list[str]:
    found = Findings(group.rank)
    roots = cycle(range(group.world_size))
    some = {dtype: without(ops, exceptions, dtype) for dtype in dtypes}
    # No movement looks at what an element is: one dtype of each size comes in all shapes.
    of_size = {dtype_of(dtype).itemsize: dtype for dtype in dtypes}
    for dtype in dtypes:
        for shape in SHAPES if dtype in of_size.values() else ((7,), (2, 3, 5)):
            _move_once(group, some[dtype], shape, dtype, next(roots), found)
    whole, real = preferred("int32", dtypes), preferred("float32", dtypes)
    for root in range(group.world_size):
        _move_once(group, some[whole], (2, 3, 5), whole, root, found)
    _move_once(group, some[real], (LARGE,), real, group.world_size - 1, found)
    if "barrier" in ops:
        found.true(group.barrier() is None, "barrier returned something")
    return found.report()


def _move_once(group: ProcessGroup, ops: Sequence[str], shape: Shape, dtype: str, root: int, found: Findings) -> None:
    n, me = group.world_size, group.rank
    what = f"{dtype}{list(shape)}"
    mine = sample(me, shape, dtype)
    if "broadcast" in ops:
        wanted = sample(root, shape, dtype)
        found.same(group.broadcast(mine, root), wanted, f"broadcast {what} root={root}")
    together = np.concatenate([rows(sample(rank, shape, dtype)) for rank in range(n)])
    if "all_gather" in ops:
        found.same(group.all_gather(mine), together, f"all_gather {what}")
    if "gather" in ops:
        result = group.gather(mine, root)
        if me == root:
            found.same(result, together, f"gather {what} root={root}")
        else:
            found.true(result is None, f"gather {what} root={root}: not None away from the root")
    if not shape:
        return
    tall = in_blocks(shape, n)
    if "scatter" in ops:
        result = group.scatter(sample(root, tall, dtype) if me == root else None, root)
        wanted = np.split(sample(root, tall, dtype), n)[me]
        found.same(result, wanted, f"scatter {what} root={root}")
    if "all_to_all" in ops:
        wanted = np.concatenate([np.split(sample(rank, tall, dtype), n)[me] for rank in range(n)])
        found.same(group.all_to_all(sample(me, tall, dtype)), wanted, f"all_to_all {what}")


def _move_unevenly(group: ProcessGroup, ops: Sequence[str]) -> list[str]:
    found = Findings(group.rank)
    n = group.world_size
    patterns = {
        "growing": [rank + 1 for rank in range(n)],
        "zeros": [3 * (rank % 2) for rank in range(n)],
        "nothing": [0] * n,
        "one rank only": [0] * (n - 1) + [5],
        "large": [40_000 * (rank % 3) + 1 for rank in range(n)],
    }
    for name, sizes in patterns.items():
        for row in ((), (3,)):
            _gather_unevenly(group, ops, sizes, row, f"sizes {name} of {list(row)}", found)
            _cut_unevenly(group, ops, sizes, row, f"sizes {name} of {list(row)}", found)
            _swap_unevenly(group, ops, sizes, row, f"sizes {name} of {list(row)}", found)
    return found.report()


def _gather_unevenly(
    group: ProcessGroup, ops: Sequence[str], sizes: Sequence[int], row: Shape, what: str, found: Findings
) -> None:
    n, me = group.world_size, group.rank
    parts = [sample(rank, (sizes[rank], *row), "float32") for rank in range(n)]
    if "all_gather" in ops:
        result = group.all_gather(parts[me], sizes=sizes)
        found.same(result, np.concatenate(parts), f"all_gather {what}")
    if "gather" in ops:
        result = group.gather(parts[me], n - 1, sizes=sizes)
        if me == n - 1:
            found.same(result, np.concatenate(parts), f"gather {what}")


def _cut_unevenly(
    group: ProcessGroup, ops: Sequence[str], sizes: Sequence[int], row: Shape, what: str, found: Findings
) -> None:
    n, me = group.world_size, group.rank
    whole = (sum(sizes), *row)
    start = sum(sizes[:me])
    mine = slice(start, start + sizes[me])
    if "scatter" in ops:
        given = sample(n - 1, whole, "int16") if me == n - 1 else None
        result = group.scatter(given, n - 1, sizes=sizes)
        found.same(result, sample(n - 1, whole, "int16")[mine], f"scatter {what}")
    if "reduce_scatter" in ops:
        result = group.reduce_scatter(sample(me, whole, "int64"), sizes=sizes)
        found.same(result, reduced_samples(n, whole, "int64", "sum")[mine], f"reduce_scatter {what}")


def _swap_unevenly(
    group: ProcessGroup, ops: Sequence[str], sizes: Sequence[int], row: Shape, what: str, found: Findings
) -> None:
    """Rank i sends sizes[(i + j) % n] rows to rank j."""
    if "all_to_all" not in ops:
        return
    n, me = group.world_size, group.rank
    matrix = [[sizes[(i + j) % n] for j in range(n)] for i in range(n)]
    blocks = [sample(i, (matrix[i][me], *row), "float64", salt=me) for i in range(n)]
    mine = np.concatenate([sample(me, (matrix[me][j], *row), "float64", salt=j) for j in range(n)])
    wanted = np.concatenate(blocks)
    told = [matrix[i][me] for i in range(n)]
    result = group.all_to_all(mine, send_sizes=matrix[me], recv_sizes=told)
    found.same(result, wanted, f"all_to_all {what}, both sizes given")
    result = group.all_to_all(mine, send_sizes=matrix[me])
    found.same(result, wanted, f"all_to_all {what}, send_sizes given")
