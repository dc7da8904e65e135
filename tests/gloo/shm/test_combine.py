"""Sums of half precision: the native helper's bits are NumPy's, and any array will do."""

from __future__ import annotations

import ml_dtypes
import numpy as np
import pytest

from ferro.collectives.reduction import reduction_for
from ferro_gloo.shm.combine import reduce_into

DTYPES = [np.dtype(np.float16), np.dtype(ml_dtypes.bfloat16), np.dtype(np.float32)]


def numbers(dtype, rank, count=1000):
    return np.random.default_rng(rank).standard_normal(count).astype(dtype)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("op", ["sum", "mean", "prod", "max"])
def test_the_bits_are_those_of_core(dtype, op):
    operands = [numbers(dtype, rank) for rank in range(3)]
    reduction = reduction_for(op, dtype, 3)
    expected, found = np.empty_like(operands[0]), np.empty_like(operands[0])
    reduction.into(expected, operands, at_once=True)
    reduce_into(reduction, found, operands)
    assert found.tobytes() == expected.tobytes()


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_arrays_at_odd_addresses(dtype):
    raw = np.zeros(10 * dtype.itemsize + 1, np.uint8)
    odd = raw[1:].view(dtype)
    odd[...] = 1
    reduce_into(reduction_for("sum", dtype, 2), odd, [odd, np.ones(10, dtype)])
    assert (odd == 2).all()
