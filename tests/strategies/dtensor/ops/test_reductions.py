"""Reductions of DTensors: results equal to NumPy's, and their placements."""

from __future__ import annotations

import ml_dtypes
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from ferro import UnsupportedError, UsageError
from ferro_strategies.dtensor import DTensor, Partial, Replicate, Shard, distribute

from ..arrays_on_mesh import MESHES, assert_equal, on_mesh, placement_tuples, random_dtensor

R, S0, S2, P = Replicate(), Shard(0), Shard(2), Partial()
MAX, MIN, PROD = Partial("max"), Partial("min"), Partial("prod")


REDUCTIONS = ["sum", "mean", "prod", "max", "min", "any", "all"]


@st.composite
def reductions(draw):
    mesh_shape = draw(st.sampled_from(MESHES))
    shape = tuple(draw(st.lists(st.integers(0, 5), max_size=3)))
    op = draw(st.sampled_from(["sum", "prod", "max", "min"]))
    placements = draw(placement_tuples(mesh_shape, len(shape), op=op))
    dims = draw(st.none() | st.lists(st.integers(0, 2), unique=True).map(tuple))
    if dims is not None:
        dims = tuple(dim for dim in dims if dim < len(shape))
    return mesh_shape, shape, placements, dims, draw(st.booleans())


@settings(max_examples=60, deadline=None)
@given(reductions(), st.sampled_from(REDUCTIONS), st.sampled_from([np.float64, np.int32, bool]))
@pytest.mark.filterwarnings("ignore:.*encountered in.*:RuntimeWarning")
@pytest.mark.filterwarnings("ignore:Mean of empty slice:RuntimeWarning")
def test_reductions(case, name, dtype):
    mesh_shape, shape, placements, axis, keepdims = case
    if dtype is bool and any(isinstance(one, Partial) for one in placements):
        dtype = np.float64  # for booleans multiplied or added, see the test of booleans
    function = getattr(np, name)

    def check(mesh):
        x, whole = random_dtensor(mesh, placements, shape, dtype=dtype)
        try:
            with np.errstate(all="ignore"):
                expected = function(whole, axis=axis, keepdims=keepdims)
        except ValueError:
            with pytest.raises(UsageError, match="no elements"):
                function(x, axis=axis, keepdims=keepdims)
            return
        assert_equal(function(x, axis=axis, keepdims=keepdims), expected)
        assert_equal(getattr(x, name)(axis, keepdims=keepdims), expected)

    on_mesh(mesh_shape, check)


@pytest.mark.parametrize(
    ("name", "before", "over_cut", "over_other"),
    [
        ("sum", S0, P, S0),
        ("mean", S0, P, S0),
        ("prod", S0, PROD, S0),
        ("max", S0, MAX, S0),
        ("any", S0, MAX, S0),
        ("min", S0, MIN, S0),
        ("all", S0, MIN, S0),
        ("sum", P, P, P),
        ("mean", P, P, P),
        ("max", MAX, MAX, MAX),
        ("sum", MAX, R, R),
        ("max", P, R, R),
        ("sum", R, R, R),
    ],
)
def test_placements_of_reductions(name, before, over_cut, over_other):
    def check(mesh):
        x, _ = random_dtensor(mesh, [before], (5, 4))
        reduce = getattr(x, name)
        assert reduce(0).placements == (over_cut,)
        assert reduce(1).placements == (over_other,)

    on_mesh((3,), check)


def test_dims_after_a_reduced_one_are_renumbered():
    def check(mesh):
        x, _ = random_dtensor(mesh, [S2], (2, 3, 4))
        assert x.sum((0, 1)).placements == (S0,)
        assert x.sum(0, keepdims=True).placements == (S2,)

    on_mesh((2,), check)


def test_a_mean_of_uneven_parts_weighs_by_elements():
    def check(mesh):
        x = distribute(np.array([1.0, 1, 1, 1, 6]), mesh, [S0])
        assert float(x.mean()) == 2.0

    on_mesh((4,), check)


@pytest.mark.parametrize("dtype", [np.float16, ml_dtypes.bfloat16])
def test_half_precision(dtype):
    def check(mesh):
        whole = np.full(3000, 30, dtype)  # whose sum no half holds
        x = distribute(whole, mesh, [S0])
        assert x.mean().dtype == dtype
        assert float(x.mean()) == 30
        assert float((x / 300).max()) == float(dtype(30) / dtype(300))
        assert x.redistribute([R]).dtype == dtype

    on_mesh((3,), check)


def test_largest_and_smallest_of_ranks_without_elements():
    def check(mesh):
        for dtype in (np.int8, np.uint16, np.float32, ml_dtypes.bfloat16, bool):
            whole = np.array([[0, 1]]).astype(dtype)
            x = distribute(whole, mesh, [S0])
            assert_equal(x.max(0), whole.max(0))
            assert_equal(x.min(0), whole.min(0))

    on_mesh((3,), check)


def test_nan_is_the_largest_on_every_rank():
    def check(mesh):
        x = distribute(np.array([1.0, np.nan, 3]), mesh, [S0])
        assert np.isnan(float(x.max()))

    on_mesh((3,), check)


def test_reductions_through_ufuncs_and_with_a_dtype():
    def check(mesh):
        x, whole = random_dtensor(mesh, [S0], (5, 2), dtype=np.int32)
        assert_equal(np.add.reduce(x), whole.sum(0))
        assert_equal(np.maximum.reduce(x, axis=1), whole.max(1))
        assert_equal(np.amax(x, axis=1), whole.max(1))
        assert_equal(np.amin(x), whole.min())
        assert_equal(np.add.reduce(x, axis=None, dtype=None, keepdims=True), whole.sum(keepdims=True))
        assert_equal(np.sum(x, dtype=np.float32), whole.sum(dtype=np.float32))
        assert_equal(np.mean(x, dtype=np.float32), whole.mean(dtype=np.float32))

    on_mesh((2,), check)


def test_the_result_of_a_reduction_is_an_array():
    def check(mesh):
        for placement in (R, S0):
            x, whole = random_dtensor(mesh, [placement], (5, 2))
            for name in REDUCTIONS:
                result = getattr(x, name)()
                assert isinstance(result.local, np.ndarray)
                assert result.local.shape == ()
            assert_equal(np.exp(x.mean()), np.exp(whole.mean()))

    on_mesh((2,), check)


def test_a_sum_is_reduced_before_its_parts_lose_their_fractions():
    def check(mesh):
        x = DTensor.from_local(np.full(4, 0.5), mesh, [P])  # of ones
        assert_equal(np.sum(x, dtype=np.int64), 4)
        assert np.sum(x, dtype=np.float64).placements == (P,)
        with pytest.raises(UsageError, match="int64 has no fractions"):
            np.mean(x, dtype=np.int64)

    on_mesh((2,), check)


def test_wrong_reductions_are_refused():
    def check(mesh):
        x, _ = random_dtensor(mesh, [S0], (5, 2))
        with pytest.raises(UsageError, match="axis 2 of an array of 2 dims"):
            x.sum(2)
        with pytest.raises(UsageError, match="twice"):
            x.sum((0, -2))
        with pytest.raises(UnsupportedError, match="complex"):
            (x * 1j).max()
        assert (x * 1j).max(1).placements == (S0,)

    on_mesh((2,), check)
