"""Which reductions UCC itself may do: those whose results are NumPy's, and that it has on hosts.

    dtype               sum, mean   prod     min, max   band, bor, bxor
    int8 … uint64       exact       exact    exact      exact
    float32, float64    rounded     rounded  no         -

"exact" ones give the same bits in any order. "rounded" ones depend on the order, which is UCC's
own, so only one rank may compute each element. All others are "no": UCC fails silently in
float16, rounds bfloat16 at every step, orders NaN otherwise than NumPy, and knows no functions.
"""

from __future__ import annotations

from dataclasses import dataclass

from ferro.collectives.reduction import Reduction
from ferro.types import ReduceOp
from ferro_ucc.abi import Datatype, Op


@dataclass(frozen=True, slots=True)
class Native:
    """A reduction of UCC.

    Attributes:
        datatype: its code for the element type.
        op: its code for the operation; a mean is a sum.
        exact: whether the order does not matter.
    """

    datatype: Datatype
    op: Op
    exact: bool


_OPS = {
    ReduceOp.SUM: Op.SUM,
    ReduceOp.MEAN: Op.SUM,
    ReduceOp.PROD: Op.PROD,
    ReduceOp.MIN: Op.MIN,
    ReduceOp.MAX: Op.MAX,
    ReduceOp.BAND: Op.BAND,
    ReduceOp.BOR: Op.BOR,
    ReduceOp.BXOR: Op.BXOR,
}
_WHOLE = {
    name: Datatype[name.upper()] for name in ("int8", "int16", "int32", "int64", "uint8", "uint16", "uint32", "uint64")
}
_FLOATING = {"float32": Datatype.FLOAT32, "float64": Datatype.FLOAT64}
_ROUNDED = (ReduceOp.SUM, ReduceOp.MEAN, ReduceOp.PROD)


def native_reduction(reduction: Reduction) -> Native | None:
    """Return how UCC does a reduction; None when its ranks must do it themselves."""
    op, dtype = reduction.op, reduction.dtype
    if op is None or not dtype.isnative:
        return None
    if dtype.name in _WHOLE:
        return Native(_WHOLE[dtype.name], _OPS[op], exact=True)
    if dtype.name in _FLOATING and op in _ROUNDED:
        return Native(_FLOATING[dtype.name], _OPS[op], exact=False)
    return None
