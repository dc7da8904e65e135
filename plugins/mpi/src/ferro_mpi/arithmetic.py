"""Which reductions MPI does as ferro does them, and by which of its operations and types.

What is not here is done by NumPy, once all contributions have met (`meeting`):

- half precision: MPI has no bfloat16, and rounds float16 at every step, where ferro accumulates in
  float32 and rounds once. An MPI operation of our own would round at every step as well, for it is
  given and returns partial results of the array's type.
- functions of the user's: MPI may combine partial results in any grouping, and gives an operation
  no way to fail.
- min and max of floats: whether a NaN wins depends on its place in MPI, and can differ by rank.
- prod of complex numbers: C has rules for infinities that NumPy has not.
- deterministic sums of floats: MPI promises no order.
"""

from __future__ import annotations

import numpy as np

from ferro import ReduceOp
from ferro.collectives.reduction import Reduction
from ferro.types import Array
from ferro_mpi.mpi import MPI

_INTEGER = {
    ReduceOp.SUM: MPI.SUM,
    ReduceOp.PROD: MPI.PROD,
    ReduceOp.MIN: MPI.MIN,
    ReduceOp.MAX: MPI.MAX,
    ReduceOp.BAND: MPI.BAND,
    ReduceOp.BOR: MPI.BOR,
    ReduceOp.BXOR: MPI.BXOR,
}
_BOOL = {
    ReduceOp.SUM: MPI.LOR,
    ReduceOp.PROD: MPI.LAND,
    ReduceOp.MIN: MPI.LAND,
    ReduceOp.MAX: MPI.LOR,
    ReduceOp.BAND: MPI.LAND,
    ReduceOp.BOR: MPI.LOR,
    ReduceOp.BXOR: MPI.LXOR,
}
_FLOAT = {ReduceOp.SUM: MPI.SUM, ReduceOp.MEAN: MPI.SUM, ReduceOp.PROD: MPI.PROD}
_COMPLEX = {ReduceOp.SUM: MPI.SUM, ReduceOp.MEAN: MPI.SUM}
_BY_KIND = {"i": _INTEGER, "u": _INTEGER, "b": _BOOL, "f": _FLOAT, "c": _COMPLEX}
_EXACT_KINDS = "iub"  # for which every order gives the same

# By the letters that NumPy gives them: the types that mpi4py finds by itself in an array.
_KNOWN = frozenset("?bhilqBHILQfdgFDG")


def native(reduction: Reduction, *, deterministic: bool) -> MPI.Op | None:
    """Return MPI's operation for a reduction, None where it has none that does the same."""
    dtype, op = reduction.dtype, reduction.op
    if reduction.needs_all or op is None or dtype.char not in _KNOWN:
        return None
    if deterministic and dtype.kind not in _EXACT_KINDS:
        return None
    return _BY_KIND[dtype.kind].get(op)


def movable(array: Array) -> Array:
    """Return an array as one of a type that mpi4py knows: half precision as its bits."""
    return array if array.dtype.char in _KNOWN else array.view(np.uint16)
