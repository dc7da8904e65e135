"""How NumPy's dtypes and ferro's reductions are called in NCCL: a table, and nothing else.

The numbers are those of nccl.h, which never change. int16, uint16 and the products of complex
numbers have none; nor have bitwise reductions, but for booleans, which travel as bytes 0 and 1.
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


BYTE = int(DataType.UINT8)  # what is only moved is moved as bytes

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
_PAIRS = {"complex64": DataType.FLOAT32, "complex128": DataType.FLOAT64}

_ARITHMETIC = {
    ReduceOp.SUM: RedOp.SUM,
    ReduceOp.PROD: RedOp.PROD,
    ReduceOp.MIN: RedOp.MIN,
    ReduceOp.MAX: RedOp.MAX,
}
_AVERAGING = {**_ARITHMETIC, ReduceOp.MEAN: RedOp.AVG}
_ADDING = {ReduceOp.SUM: RedOp.SUM, ReduceOp.MEAN: RedOp.AVG}
_LOGIC = {
    ReduceOp.SUM: RedOp.MAX,
    ReduceOp.MAX: RedOp.MAX,
    ReduceOp.BOR: RedOp.MAX,
    ReduceOp.PROD: RedOp.MIN,
    ReduceOp.MIN: RedOp.MIN,
    ReduceOp.BAND: RedOp.MIN,
}
_ROUNDING = (ReduceOp.SUM, ReduceOp.MEAN, ReduceOp.PROD)


@dataclass(frozen=True, slots=True)
class Native:
    """A reduction as NCCL does it.

    Attributes:
        dtype: NCCL's data type.
        op: NCCL's reduction.
        width: how many of NCCL's numbers make one element: 2 for complex ones.
    """

    dtype: int
    op: int
    width: int = 1


@lru_cache(maxsize=256)
def native(dtype: str, op: ReduceOp | None, *, deterministic: bool = False) -> Native | None:
    """Return how NCCL does a reduction, None where it cannot.

    Args:
        dtype: NumPy's name of the element type.
        op: the reduction, None for a user's function.
        deterministic: the result must be that of reducing in order of rank, which NCCL's is only
            where the order makes no difference.
    """
    if op is None or (deterministic and op in _ROUNDING and dtype not in {*_INTEGERS, "bool"}):
        return None
    kinds = ((_FLOATS, _AVERAGING), (_INTEGERS, _ARITHMETIC), (_PAIRS, _ADDING))
    for types, ops in kinds:
        if dtype in types and op in ops:
            return Native(int(types[dtype]), int(ops[op]), 2 if types is _PAIRS else 1)
    if dtype == "bool" and op in _LOGIC:
        return Native(BYTE, int(_LOGIC[op]))
    return None
