"""Differences that a backend declares, so that checks leave out the operations that it does not offer.

A key of `Case.unsupported` is one of

    all_to_all               an operation
    all_reduce:float16       an operation with a dtype
    all_reduce:bxor          … with a reduction
    all_reduce:int8:bxor     … with both
    lost_peer                a feature, from the table below

and its value is the reason, for people. A check proves that declared operations, and declared features
that have a call, raise UnsupportedError on every rank.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence

from ferro.errors import UsageError
from ferro.types import ReduceOp
from ferro_testing.samples import DTYPES

REDUCING = ("all_reduce", "reduce", "reduce_scatter")
MOVING = ("broadcast", "all_gather", "gather", "scatter", "all_to_all")
TRANSFERS = ("send", "recv", "sendrecv")
OPERATIONS = (*REDUCING, *MOVING, "barrier", *TRANSFERS, "split", "subgroup")

FEATURES: Mapping[str, str] = {
    "functions": "a user's function as reduction",
    "uneven": "sizes that differ from rank to rank",
    "deterministic": "deterministic=True reduces in order of rank, bit for bit",
    "equal_bits": "a floating-point sum has the same bits on every rank",
    "half_rounded_once": "sums, means and products of half precision are computed in float32 and rounded once",
    "tags": "messages with different tags may be received in another order than sent",
    "overlapping": "groups that share ranks may be used at the same time",
    "mismatch": "ranks that make different calls raise CollectiveMismatch",
    "timeout": "a rank that stays away raises CollectiveTimeout on the others",
    "lost_peer": "a rank that dies raises PeerLost on the others",
    "abort": "abort() on one rank ends what the others wait for",
    "shrink": "the ranks that are left go on after one died",
}


def check_keys(unsupported: Mapping[str, str]) -> None:
    """Refuse a key that names no operation or feature.

    Raises:
        UsageError: a key names no operation or feature, or a reason is empty.
    """
    for key, reason in unsupported.items():
        name, *details = key.split(":")
        there = (*OPERATIONS, *FEATURES) if not details else (*REDUCING, *MOVING, *TRANSFERS)
        if name not in there:
            raise UsageError(f"unsupported names {key!r}; there are: {', '.join(there)}")
        reductions = [op.value for op in ReduceOp] if name in REDUCING else []
        known = (*DTYPES, *reductions)
        for detail in details:
            if detail not in known:
                raise UsageError(f"unsupported names {key!r}; {name} has: {', '.join(known)}")
        if not reason.strip():
            raise UsageError(f"unsupported: give the reason for {key!r}, for people")


def supported(declared: Iterable[str], op: str, *details: str) -> bool:
    """Say whether none of these keys declares `op` with these details (dtype, reduction)."""
    for key in declared:
        name, *wanted = key.split(":")
        if name == op and set(wanted) <= set(details):
            return False
    return True


def without(ops: Sequence[str], declared: Sequence[str], *details: str) -> Sequence[str]:
    """Return the operations that no key declares with these details."""
    if not declared:
        return ops
    return [op for op in ops if supported(declared, op, *details)]
