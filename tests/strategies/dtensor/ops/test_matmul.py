"""Matrix products of DTensors: results equal to NumPy's, and their placements."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from ferro import UsageError
from ferro_strategies.dtensor import Partial, Replicate, Shard

from ..arrays_on_mesh import assert_equal, on_mesh, operands, random_dtensor, unless_misplaced

R, S0, S1, P = Replicate(), Shard(0), Shard(1), Partial()


@st.composite
def factors(draw):
    """Draw two shapes that can be multiplied: vectors, matrices, batches."""
    rows, summed, columns = (draw(st.integers(0, 5)) for _ in range(3))
    batch = draw(st.integers(1, 3))
    left = draw(st.sampled_from([(summed,), (rows, summed), (batch, rows, summed), (1, rows, summed)]))
    right = draw(st.sampled_from([(summed,), (summed, columns), (batch, summed, columns)]))
    return left, right


@settings(max_examples=60, deadline=None)
@given(operands(factors()))
def test_matrix_products(case):
    mesh_shape, [(left_shape, left), (right_shape, right)] = case

    def check(mesh):
        x, x_whole = random_dtensor(mesh, left, left_shape, seed=1)
        y, y_whole = random_dtensor(mesh, right, right_shape, seed=2)
        result = unless_misplaced(lambda: x @ y)
        if result is not None:
            assert_equal(result, x_whole @ y_whole)

    on_mesh(mesh_shape, check)


@pytest.mark.parametrize(
    ("left", "right", "result"),
    [
        (S0, R, S0),
        (R, S1, S1),
        (S1, S0, P),
        (S1, R, P),
        (R, S0, P),
        (P, R, P),
        (R, P, P),
        (P, P, R),
        (P, S1, S1),
        (S0, P, S0),
        (S0, S1, None),
        (S0, S0, None),
        (S1, S1, None),
        (R, R, R),
    ],
)
def test_placements_of_products(left, right, result):
    def check(mesh):
        x, x_whole = random_dtensor(mesh, [left], (5, 4), seed=1)
        y, y_whole = random_dtensor(mesh, [right], (4, 7), seed=2)
        if result is None:
            with pytest.raises(UsageError, match="cut different dims"):
                x @ y
            return
        product = x @ y
        assert product.placements == (result,)
        assert_equal(product, x_whole @ y_whole)

    on_mesh((3,), check)


def test_a_two_dimensional_product_as_of_tensor_parallel_layers():
    def check(mesh):
        x, x_whole = random_dtensor(mesh, (S0, R), (6, 4), seed=1)
        up, up_whole = random_dtensor(mesh, (R, S1), (4, 8), seed=2)
        down, down_whole = random_dtensor(mesh, (R, S0), (8, 4), seed=3)
        hidden = np.maximum(x @ up, 0.0)
        assert hidden.placements == (S0, S1)
        out = hidden @ down
        assert out.placements == (S0, P)
        assert_equal(out, np.maximum(x_whole @ up_whole, 0.0) @ down_whole)

    on_mesh((2, 3), check)


def test_products_with_arrays_and_of_wrong_shapes():
    def check(mesh):
        x, whole = random_dtensor(mesh, [S0], (5, 2))
        assert_equal(x @ np.ones((2, 3)), whole @ np.ones((2, 3)))
        assert_equal(np.ones((3, 5)) @ x, np.ones((3, 5)) @ whole)
        with pytest.raises(UsageError, match="do not fit together"):
            x @ np.ones((3, 3))
        with pytest.raises(UsageError, match="has no rows"):
            x @ 3

    on_mesh((2,), check)
