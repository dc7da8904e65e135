"""Conformance of calls that come again and again: ordinary ones, which may take a fast path, and persistent ones."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, TypeAlias

import numpy as np

from ferro import ProcessGroup
from ferro.types import Array
from ferro_testing.case import Case
from ferro_testing.differences import MOVING, REDUCING, supported
from ferro_testing.samples import Findings, Shape, in_blocks, preferred, reduced_samples, reductions, rows, sample

_STEPS = 5
_SHAPES: tuple[Shape, ...] = (
    (1,),
    (3, 5),
    (1500,),
    (40_003,),
)  # from a few bytes to more than most backends do at once
_OVERLAPPING = 12

# Given the sample's salt: this rank's input, and the result that it must have, None where it gets none.
_Round: TypeAlias = "Callable[[int], tuple[Array | None, Array | None]]"


def check_repeated_calls(case: Case) -> None:
    """The same call, made again and again with other elements, has the result of its own elements each time.

    Some of the calls have `out`, the input itself as `out`, or a deadline, and sometimes only on one rank.
    """
    ops = [op for op in (*REDUCING, *MOVING) if case.supports(op)]
    if ops:
        case.verify(_repeat_calls, case.largest, case.dtypes, ops, case.exceptions)


def check_persistent(case: Case) -> None:
    """Persistent operations have the results of ordinary calls, one by one, many under way, and with others between."""
    ops = [op for op in (*REDUCING, *MOVING) if case.supports(op)]
    if ops and case.supports("barrier"):
        case.verify(_repeat_persistently, case.largest, case.dtypes, ops, case.exceptions)
        if case.supports("all_reduce", "all_gather"):
            case.verify(_overlap_persistent, case.largest)


def check_exchange(case: Case) -> None:
    """`exchange` moves many messages at once, ordinary and persistent, also several between two ranks."""
    if case.supports("sendrecv", "all_gather"):
        case.verify_all(_exchange_with_neighbours)


def _plan(group: ProcessGroup, op: str, shape: Shape, dtype: str, reduction: str, root: int) -> _Round:
    """Plan the rounds of a collective: its input and result for each salt."""
    n, me = group.world_size, group.rank
    tall = in_blocks(shape, n)
    given = tall if op in ("reduce_scatter", "scatter", "all_to_all") else shape
    here = me == root

    def round_(salt: int) -> tuple[Array | None, Array | None]:
        mine = sample(me, given, dtype, salt)
        if op in REDUCING:
            total = reduced_samples(n, given, dtype, reduction, salt)
            if op == "reduce_scatter":
                return mine, np.split(total, n)[me]
            return mine, total if op == "all_reduce" or here else None
        everyones = [sample(rank, given, dtype, salt) for rank in range(n)]
        if op == "broadcast":
            return mine, everyones[root]
        if op == "scatter":
            return (mine if here else None), np.split(everyones[root], n)[me]
        if op == "all_to_all":
            return mine, np.concatenate([np.split(array, n)[me] for array in everyones])
        return mine, np.concatenate([rows(array) for array in everyones]) if op == "all_gather" or here else None

    return round_


def _kinds(
    dtypes: Sequence[str], ops: Sequence[str], exceptions: Sequence[str], n: int
) -> list[tuple[str, Shape, str, str, int]]:
    """List kinds of calls: every dtype with every reduction and every movement; collectives, shapes, roots in turn."""
    kinds = []
    count = 0
    for index, dtype in enumerate(dtypes):
        pairs = [(op, "") for op in ops if op in MOVING]
        for number, reduction in enumerate(reductions(dtype)):
            some = [op for op in ops if op in REDUCING]
            pairs += [(some[(index + number) % len(some)], reduction)] if some else []
        for op, reduction in pairs:
            if supported(exceptions, op, *filter(None, (dtype, reduction))):
                kinds.append((op, _SHAPES[count % len(_SHAPES)], dtype, reduction, count % n))
                count += 1
    return kinds


def _call(group: ProcessGroup, op: str, reduction: str, root: int, x: Array | None, **options: object) -> object:
    if op in REDUCING:
        options["op"] = reduction
    if op in ("reduce", "broadcast", "gather", "scatter"):
        options["root"] = root
    return getattr(group, op)(x, **options)


def _repeat_calls(
    group: ProcessGroup, dtypes: Sequence[str], ops: Sequence[str], exceptions: Sequence[str]
) -> list[str]:
    found, n, me = Findings(group.rank), group.world_size, group.rank
    for op, shape, dtype, reduction, root in _kinds(dtypes, ops, exceptions, n):
        plan = _plan(group, op, shape, dtype, reduction, root)
        out: Array | None = None
        for step in range(_STEPS):
            x, wanted = plan(step)
            what = f"{op} {reduction} {dtype}{list(shape)} root={root}, call {step}"
            options: dict[str, object] = {}
            if step == 3 and me == n - 1:  # this rank alone takes the ordinary path
                options["timeout_s"] = group.timeout_s
            if step >= 2 and wanted is not None:
                if out is None:
                    out = np.empty(wanted.shape, wanted.dtype)
                options["out"] = out
            if step == _STEPS - 1 and wanted is not None and x is not None and x.shape == wanted.shape:
                x = options["out"] = x.copy()
            result = _call(group, op, reduction, root, x, **options)
            if wanted is None:
                found.true(result is None, f"{what}: not None away from the root")
            else:
                found.same(result, wanted, what)
                found.true("out" not in options or result is options["out"], f"{what}: the result is not `out`")
            if x is not None and options.get("out") is not x:
                given = plan(step)[0]
                assert given is not None, "this rank has an input"
                found.same(x, given, f"{what}: the input afterwards")
    return found.report()


def _repeat_persistently(
    group: ProcessGroup, dtypes: Sequence[str], ops: Sequence[str], exceptions: Sequence[str]
) -> list[str]:
    found = Findings(group.rank)
    for index, (op, shape, dtype, reduction, root) in enumerate(_kinds(dtypes, ops, exceptions, group.world_size)):
        plan = _plan(group, op, shape, dtype, reduction, root)
        x, wanted = plan(0)
        x = None if x is None else x.copy()
        in_place = x is not None and wanted is not None and x.shape == wanted.shape and index % 2 == 0
        arguments: dict[str, Any] = {"out": x} if in_place else {}
        if op in REDUCING:
            arguments["op"] = reduction
        if op in ("reduce", "broadcast", "gather", "scatter"):
            arguments["root"] = root
        step = group.persistent(op, x, **arguments)
        for salt in range(_STEPS):
            given, wanted = plan(salt)
            if x is not None and given is not None:
                x[...] = given
            what = f"persistent {op} {reduction} {dtype}{list(shape)} root={root}, step {salt}"
            if salt % 2:
                step.start()
                result = step.wait()
            else:
                result = step()
            if wanted is None:
                found.true(result is None, f"{what}: not None away from the root")
            else:
                found.same(result, wanted, what)
        step.close()
    barrier = group.persistent("barrier")
    found.true(barrier() is None, "a persistent barrier returned something")
    return found.report()


def _overlap_persistent(group: ProcessGroup) -> list[str]:
    found, n, me = Findings(group.rank), group.world_size, group.rank
    arrays = [sample(me, (1 + 7 * index,), "float32", index).copy() for index in range(_OVERLAPPING)]
    sums = [group.persistent("all_reduce", array) for array in arrays]
    gathers = [group.persistent("all_gather", array) for array in arrays]
    for salt in range(_STEPS):
        for index, array in enumerate(arrays):
            array[...] = sample(me, array.shape, "float32", salt + index)
        for summing, gathering in zip(sums, gathers, strict=True):
            summing.start()
            gathering.start()
        between = group.all_reduce(np.array(salt))
        found.true(int(between) == n * salt, "an all_reduce between persistent ones has a wrong result")
        for index in reversed(range(_OVERLAPPING)):
            shape = arrays[index].shape
            total = reduced_samples(n, shape, "float32", "sum", salt + index)
            found.same(sums[index].wait(), total, f"persistent all_reduce {index} among others")
            everyones = [sample(rank, shape, "float32", salt + index) for rank in range(n)]
            found.same(gathers[index].wait(), np.concatenate(everyones), f"persistent all_gather {index} among others")
    return found.report()


def _exchange_with_neighbours(group: ProcessGroup) -> list[str]:
    found, n, me = Findings(group.rank), group.world_size, group.rank
    dtype = preferred("float64", ("float64",))
    for size in (0, 1, 1000, 300_000):
        peers = [(me + distance) % n for distance in (1, -1, 2)]  # with few ranks some are the same, or this one
        sources = [(me - distance) % n for distance in (1, -1, 2)]
        sends = [(peer, np.empty(size + index, dtype)) for index, peer in enumerate(peers)]
        recvs = [(peer, np.empty(size + index, dtype)) for index, peer in enumerate(sources)]
        step = group.persistent("exchange", sends, recvs)
        for salt in range(_STEPS):
            for index, (_, array) in enumerate(sends):
                array[...] = sample(me, array.shape, dtype, salt + 3 * index)
            if salt == 0:
                group.exchange(sends, recvs, tag=7)
            elif salt == 1:
                step.start()
                step.wait()
            else:
                step()
            for index, (peer, array) in enumerate(recvs):
                wanted = sample(peer, array.shape, dtype, salt + 3 * index)
                found.same(array, wanted, f"exchange of {size} elements, step {salt}, message {index} from rank {peer}")
        step.close()
    return found.report()
