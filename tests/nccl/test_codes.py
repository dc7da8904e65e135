"""The table of reductions that NCCL has, and its codes."""

from __future__ import annotations

import pytest

import ferro
from ferro_nccl.codes import DataType, NativeReduction, RedOp, native_reduction


@pytest.mark.parametrize(
    ("dtype", "op", "wanted"),
    [
        ("float32", "sum", NativeReduction(7, 0)),
        ("float16", "mean", NativeReduction(6, 4)),
        ("bfloat16", "max", NativeReduction(9, 2)),
        ("float64", "min", NativeReduction(8, 3)),
        ("int8", "prod", NativeReduction(0, 1)),
        ("uint64", "sum", NativeReduction(5, 0)),
        ("complex64", "sum", NativeReduction(7, 0, 2)),
        ("complex128", "mean", NativeReduction(8, 4, 2)),
        ("complex64", "prod", None),
        ("int16", "sum", None),
        ("int32", "bxor", None),
        ("bool", "sum", NativeReduction(1, 2)),
        ("bool", "band", NativeReduction(1, 3)),
        ("bool", "bxor", None),
    ],
)
def test_table_of_reductions(dtype, op, wanted):
    assert native_reduction(dtype, ferro.ReduceOp(op)) == wanted


def test_what_depends_on_the_order_is_not_nccls_where_the_order_counts():
    assert native_reduction("float32", ferro.ReduceOp.SUM, deterministic=True) is None
    assert native_reduction("complex64", ferro.ReduceOp.MEAN, deterministic=True) is None
    assert native_reduction("bfloat16", ferro.ReduceOp.MAX, deterministic=True) == NativeReduction(9, 2)
    assert native_reduction("int64", ferro.ReduceOp.SUM, deterministic=True) == NativeReduction(4, 0)
    assert native_reduction("bool", ferro.ReduceOp.SUM, deterministic=True) == NativeReduction(1, 2)
    assert native_reduction("float32", None) is None


def test_numbers_are_cupys():
    nccl = pytest.importorskip("cupy.cuda.nccl", reason="CuPy is not installed")
    for kind in DataType:
        assert getattr(nccl, f"NCCL_{kind.name}") == kind
    for op in RedOp:
        assert getattr(nccl, f"NCCL_{op.name}") == op
