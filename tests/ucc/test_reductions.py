"""Which reductions are left to UCC: those whose results are NumPy's, and no others."""

from __future__ import annotations

import numpy as np
import pytest

from ferro.collectives.reduction import reduction_for
from ferro_testing.samples import DTYPES, dtype_of, reductions
from ferro_ucc.abi import UccOp
from ferro_ucc.reductions import native_reduction

WHOLE = {"int8", "int16", "int32", "int64", "uint8", "uint16", "uint32", "uint64"}


def native(dtype: str, op: object):
    return native_reduction(reduction_for(op, dtype_of(dtype), 3))


def test_integers_are_exact_in_all_their_reductions():
    for dtype in WHOLE:
        assert all(native(dtype, op).exact for op in reductions(dtype))


@pytest.mark.parametrize("dtype", ["float32", "float64"])
def test_floats_are_rounded_in_sums_and_products_only(dtype):
    done = {op: native(dtype, op) for op in reductions(dtype)}
    assert {op for op, how in done.items() if how is not None} == {"sum", "mean", "prod"}
    assert not any(how.exact for how in done.values() if how is not None)


@pytest.mark.parametrize("dtype", sorted(set(DTYPES) - WHOLE - {"float32", "float64"}))
def test_everything_else_is_left_to_numpy(dtype):
    assert [native(dtype, op) for op in reductions(dtype)] == [None] * len(reductions(dtype))


def test_functions_and_foreign_byte_orders_are_left_to_numpy():
    assert native("float64", lambda a, b, out: np.add(a, b, out)) is None
    assert native_reduction(reduction_for("sum", np.dtype(">i4"), 3)) is None


def test_codes_are_those_of_the_header():
    made = {op: native("uint32", op) for op in reductions("uint32")}
    assert {op: int(how.op) for op, how in made.items()} == {
        "sum": 0, "prod": 1, "max": 2, "min": 3, "band": 7, "bor": 8, "bxor": 9,
    }  # fmt: skip
    codes = [int(native(name, "sum").datatype) >> 3 for name in sorted(WHOLE)]
    assert codes == [1, 2, 3, 0, 6, 7, 8, 5]  # int16, int32, int64, int8, uint16, …
    assert [int(native(name, "sum").datatype) for name in ("float32", "float64")] == [88, 96]
    assert native("float32", "mean").op is UccOp.SUM
