"""The reductions that UCC carries out: it has them for host memory, and their results equal NumPy's.

    dtype               sum, mean   prod     min, max   band, bor, bxor
    int8 … uint64       exact       exact    exact      exact
    float32, float64    rounded     rounded  no         -

"exact" reductions give the same bits in any order. "rounded" ones depend on the order, which is UCC's own, so only one
rank may compute each element. NumPy carries out all others: UCC fails silently in float16, rounds bfloat16 at every
step, treats NaN in min and max unlike NumPy, and takes no functions.
"""

from __future__ import annotations

from dataclasses import dataclass

from ferro.collectives.reduction import Reduction
from ferro.types import ReduceOp
from ferro_ucc.abi import UccDatatype, UccOp


@dataclass(frozen=True, slots=True)
class UccReduction:
    """A reduction of UCC.

    Attributes:
        datatype: UCC's code for the element type.
        op: UCC's code for the operation; a mean is a sum.
        exact: True when the order does not matter.
    """

    datatype: UccDatatype
    op: UccOp
    exact: bool


_OPS = {
    ReduceOp.SUM: UccOp.SUM,
    ReduceOp.MEAN: UccOp.SUM,
    ReduceOp.PROD: UccOp.PROD,
    ReduceOp.MIN: UccOp.MIN,
    ReduceOp.MAX: UccOp.MAX,
    ReduceOp.BAND: UccOp.BAND,
    ReduceOp.BOR: UccOp.BOR,
    ReduceOp.BXOR: UccOp.BXOR,
}
_INTEGERS = {name: UccDatatype[name.upper()] for name in ("int8", "int16", "int32", "int64")}
_INTEGERS |= {name: UccDatatype[name.upper()] for name in ("uint8", "uint16", "uint32", "uint64")}
_FLOATING = {"float32": UccDatatype.FLOAT32, "float64": UccDatatype.FLOAT64}
_ROUNDED = (ReduceOp.SUM, ReduceOp.MEAN, ReduceOp.PROD)


def native_reduction(reduction: Reduction) -> UccReduction | None:
    """Return UCC's codes for a reduction; None when the ranks must carry it out with NumPy."""
    op, dtype = reduction.op, reduction.dtype
    if op is None or not dtype.isnative:
        return None
    if dtype.name in _INTEGERS:
        return UccReduction(_INTEGERS[dtype.name], _OPS[op], exact=True)
    if dtype.name in _FLOATING and op in _ROUNDED:
        return UccReduction(_FLOATING[dtype.name], _OPS[op], exact=False)
    return None
