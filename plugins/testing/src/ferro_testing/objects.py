"""Conformance of the collectives on small Python values."""

from __future__ import annotations

from typing import Literal

import numpy as np

from ferro import ProcessGroup
from ferro_testing.case import Case
from ferro_testing.samples import Findings


def check_objects(case: Case) -> None:
    """Values of every kind and size arrive from every root and, if the backend has send, every rank."""
    if case.supports("broadcast", "all_gather", "gather", "scatter"):
        case.verify_all(_move_values, case.supports("send", "recv"))


def _move_values(group: ProcessGroup, sending: bool) -> list[str]:
    found = Findings(group.rank)
    n, me = group.world_size, group.rank
    values = [_value(rank) for rank in range(n)]
    codecs: tuple[Literal["msgpack", "pickle"], ...] = ("msgpack", "pickle")
    for codec in codecs:
        found.true(group.all_gather_object(values[me], codec=codec) == values, f"all_gather_object with {codec}")
        for root in range(n):
            result = group.broadcast_object(values[me], root, codec=codec)
            found.true(result == values[root], f"broadcast_object root={root} with {codec}")
            gathered = group.gather_object(values[me], root, codec=codec)
            wanted = values if me == root else None
            found.true(gathered == wanted, f"gather_object root={root} with {codec}")
            given = values if me == root else None
            result = group.scatter_object(given, root, codec=codec)
            found.true(result == values[me], f"scatter_object root={root} with {codec}")
    array = group.broadcast_object(np.arange(6.0).reshape(2, 3) if me == 0 else None)
    found.same(array, np.arange(6.0).reshape(2, 3), "broadcast_object of an array")
    if sending and n > 1:
        _send_values(group, found)
    return found.report()


def _value(rank: int) -> object:
    return [rank, None, True, 1.5, "é" * rank * 100, b"\0" * rank, {"key": [rank, {}], "2": []}]


def _send_values(group: ProcessGroup, found: Findings) -> None:
    """Pass values round the ring, rank 0 first."""
    n, me = group.world_size, group.rank
    after, before = (me + 1) % n, (me - 1) % n
    if me == 0:
        group.send_object(_value(me), after)
        received = group.recv_object(before)
    else:
        received = group.recv_object(before)
        group.send_object(_value(me), after)
    found.true(received == _value(before), "recv_object")
