"""NumPy's other functions on DTensors."""

from __future__ import annotations

import numpy as np
from hypothesis import given, settings
from hypothesis import strategies as st

from ferro_strategies.dtensor import Partial, Replicate

from ..arrays_on_mesh import any_shape, assert_equal, on_mesh, operands, random_dtensor

R, P = Replicate(), Partial()


@settings(max_examples=20, deadline=None)
@given(operands(st.tuples(any_shape)))
def test_where_clip_astype_and_like_functions(case):
    mesh_shape, [(shape, placements)] = case

    def check(mesh):
        x, whole = random_dtensor(mesh, placements, shape)
        assert_equal(np.where(x > 0, x, -x * 2), np.where(whole > 0, whole, -whole * 2))
        assert_equal(np.clip(x, -1, 2.5), np.clip(whole, -1, 2.5))
        assert_equal(np.clip(x, None, 1), np.clip(whole, None, 1))
        assert_equal(x.astype(np.float32), whole.astype(np.float32))
        assert_equal((x / 2).astype(np.int64), (whole / 2).astype(np.int64))
        assert_equal(x.copy(), whole)
        assert_equal(np.zeros_like(x), np.zeros_like(whole))
        assert_equal(np.ones_like(x, dtype=np.int8), np.ones_like(whole, dtype=np.int8))
        assert_equal(np.full_like(x, 7), np.full_like(whole, 7))
        assert (np.shape(x), np.ndim(x)) == (whole.shape, whole.ndim)

    on_mesh(mesh_shape, check)


def test_widening_keeps_a_sum_and_truncating_reduces_it():
    def check(mesh):
        x, _ = random_dtensor(mesh, [P], (2, 3), dtype=np.float32)
        assert x.astype(np.float64).placements == (P,)
        assert x.astype(np.int64).placements == (R,)

    on_mesh((2,), check)
