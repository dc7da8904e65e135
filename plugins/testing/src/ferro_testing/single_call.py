"""One call of any operation with any dtype, and its expected result."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, TypeAlias

import numpy as np

from ferro import ProcessGroup
from ferro.types import Array
from ferro_testing.samples import reduced, sample

# Moves an array of any kind to a device such as a GPU, or back.
Placement: TypeAlias = Callable[[Any], Any]


def unchanged(array: Any) -> Any:
    """Return the array itself, for samples that stay in host memory."""
    return array


def call_once(
    group: ProcessGroup, op: str, dtype: str, reduction: str = "sum", *, count: int = 7, timeout_s: float | None = None
) -> object:
    """Do `op` with this rank's sample, as `prepare_call` does; return the result."""
    return prepare_call(group, op, dtype, reduction, count=count, timeout_s=timeout_s)()


def prepare_call(
    group: ProcessGroup,
    op: str,
    dtype: str,
    reduction: str = "sum",
    *,
    count: int = 7,
    place: Placement = unchanged,
    timeout_s: float | None = None,
) -> Callable[[], object]:
    """Return a function that does `op` with this rank's sample, as often as it is called.

    Args:
        group: the ranks, all of which make this call.
        op: its name; "send" and "recv" do only their half of a transfer.
        dtype: name of the elements' type.
        reduction: of the operations that reduce.
        count: elements of a block; an array that is cut has one block for each rank.
        place: moves the arrays to their device.
        timeout_s: deadline of the operation in seconds; the group's when None.
    """
    n, me = group.world_size, group.rank
    given = place(np.array(sample(me, (count * (n if op in _CUT else 1),), dtype)))
    after, before, late = (me + 1) % n, (me - 1) % n, timeout_s
    calls: dict[str, Callable[[], object]] = {
        "all_reduce": lambda: group.all_reduce(given, reduction, timeout_s=late),
        "reduce": lambda: group.reduce(given, n - 1, reduction, timeout_s=late),
        "reduce_scatter": lambda: group.reduce_scatter(given, reduction, timeout_s=late),
        "broadcast": lambda: group.broadcast(given, n - 1, timeout_s=late),
        "all_gather": lambda: group.all_gather(given, timeout_s=late),
        "gather": lambda: group.gather(given, n - 1, timeout_s=late),
        "scatter": lambda: group.scatter(given, n - 1, timeout_s=late),
        "all_to_all": lambda: group.all_to_all(given, timeout_s=late),
        "sendrecv": lambda: group.sendrecv(given, given.copy(), after, before, timeout_s=late),
        "send": lambda: group.send(given, after, timeout_s=late),
        "recv": lambda: group.recv(given, before, timeout_s=late),
        "barrier": lambda: group.barrier(timeout_s=late),
    }
    return calls[op]


def expected_result(
    group: ProcessGroup, op: str, dtype: str, reduction: str = "sum", *, count: int = 7
) -> Array | None:
    """Compute the result that `call_once` must have on this rank; None for no result."""
    n, me = group.world_size, group.rank
    if op in ("reduce", "gather") and me != n - 1:
        return None
    everyones = [sample(rank, (count * (n if op in _CUT else 1),), dtype) for rank in range(n)]
    if op in ("all_reduce", "reduce"):
        return reduced(everyones, reduction)
    if op == "reduce_scatter":
        return np.split(reduced(everyones, reduction), n)[me]
    if op == "broadcast":
        return everyones[n - 1]
    if op in ("all_gather", "gather"):
        return np.concatenate(everyones)
    if op == "scatter":
        mine: Array = np.split(everyones[n - 1], n)[me]
        return mine
    if op == "all_to_all":
        return np.concatenate([np.split(one, n)[me] for one in everyones])
    return everyones[(me - 1) % n]


_CUT = ("reduce_scatter", "scatter", "all_to_all")
