"""NCCL's codes for dtypes and reductions, and the table of reductions that NCCL has.

The numbers come from nccl.h and never change. NCCL has no int16 and uint16, no products of complex numbers and no
bitwise reductions. Booleans are sent as bytes 0 and 1: the minimum is their logical and, the maximum their logical or.
"""

from __future__ import annotations

import enum
from dataclasses import dataclass
from functools import lru_cache

from ferro.types import ReduceOp


class DataType(enum.IntEnum):
    """`ncclDataType_t`."""

    INT8 = 0
    UINT8 = 1
    INT32 = 2
    UINT32 = 3
    INT64 = 4
    UINT64 = 5
    FLOAT16 = 6
    FLOAT32 = 7
    FLOAT64 = 8
    BFLOAT16 = 9


class RedOp(enum.IntEnum):
    """`ncclRedOp_t`."""

    SUM = 0
    PROD = 1
    MAX = 2
    MIN = 3
    AVG = 4


BYTE = int(DataType.UINT8)  # the type of all transfers that reduce nothing

_FLOATS = {
    "float16": DataType.FLOAT16,
    "bfloat16": DataType.BFLOAT16,
    "float32": DataType.FLOAT32,
    "float64": DataType.FLOAT64,
}
_INTEGERS = {
    "int8": DataType.INT8,
    "uint8": DataType.UINT8,
    "int32": DataType.INT32,
    "uint32": DataType.UINT32,
    "int64": DataType.INT64,
    "uint64": DataType.UINT64,
}
_COMPLEX = {"complex64": DataType.FLOAT32, "complex128": DataType.FLOAT64}

_INTEGER_OPS = {ReduceOp.SUM: RedOp.SUM, ReduceOp.PROD: RedOp.PROD, ReduceOp.MIN: RedOp.MIN, ReduceOp.MAX: RedOp.MAX}
_FLOAT_OPS = {**_INTEGER_OPS, ReduceOp.MEAN: RedOp.AVG}
_COMPLEX_OPS = {ReduceOp.SUM: RedOp.SUM, ReduceOp.MEAN: RedOp.AVG}
_BOOL_OPS = {
    ReduceOp.SUM: RedOp.MAX,
    ReduceOp.MAX: RedOp.MAX,
    ReduceOp.BOR: RedOp.MAX,
    ReduceOp.PROD: RedOp.MIN,
    ReduceOp.MIN: RedOp.MIN,
    ReduceOp.BAND: RedOp.MIN,
}
_ORDER_DEPENDENT = (ReduceOp.SUM, ReduceOp.MEAN, ReduceOp.PROD)


@dataclass(frozen=True, slots=True)
class NativeReduction:
    """A reduction in NCCL's codes.

    Attributes:
        dtype: NCCL's data type.
        op: NCCL's reduction.
        width: number of NCCL elements in one element of the array: 2 for complex numbers, else 1.
    """

    dtype: int
    op: int
    width: int = 1


@lru_cache(maxsize=256)
def native_reduction(dtype: str, op: ReduceOp | None, *, deterministic: bool = False) -> NativeReduction | None:
    """Return NCCL's codes for a reduction, or None if NCCL does not have it.

    Args:
        dtype: NumPy's name of the element type.
        op: the reduction, None for a user's function.
        deterministic: the result must be that of reducing in order of rank. NCCL promises no order, so it is used only
            where the order makes no difference.
    """
    if op is None or (deterministic and op in _ORDER_DEPENDENT and dtype not in {*_INTEGERS, "bool"}):
        return None
    kinds = ((_FLOATS, _FLOAT_OPS), (_INTEGERS, _INTEGER_OPS), (_COMPLEX, _COMPLEX_OPS))
    for types, ops in kinds:
        if dtype in types and op in ops:
            return NativeReduction(int(types[dtype]), int(ops[op]), 2 if types is _COMPLEX else 1)
    if dtype == "bool" and op in _BOOL_OPS:
        return NativeReduction(BYTE, int(_BOOL_OPS[op]))
    return None
