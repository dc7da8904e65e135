"""Transposing, reshaping and joining DTensors: results equal to NumPy's, and their placements."""

from __future__ import annotations

import itertools

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from ferro import UsageError
from ferro_strategies.dtensor import Partial, Replicate, Shard

from ..arrays_on_mesh import any_shape, assert_equal, on_mesh, operands, random_dtensor, unless_misplaced

R, S0, S1, S2, P = Replicate(), Shard(0), Shard(1), Shard(2), Partial()


@settings(max_examples=25, deadline=None)
@given(operands(st.tuples(any_shape)), st.randoms(use_true_random=False))
def test_transpose_expand_dims_squeeze_and_swapaxes(case, random):
    mesh_shape, [(shape, placements)] = case
    order = random.sample(range(len(shape)), len(shape))

    def check(mesh):
        x, whole = random_dtensor(mesh, placements, shape)
        assert_equal(x.T, whole.T)
        assert_equal(np.transpose(x, order), np.transpose(whole, order))
        assert_equal(np.expand_dims(x, -1), np.expand_dims(whole, -1))
        assert_equal(np.expand_dims(x, (0, 1)), np.expand_dims(whole, (0, 1)))
        assert_equal(np.squeeze(np.expand_dims(x, 0), 0), whole)
        if len(shape) > 1:
            assert_equal(np.swapaxes(x, 0, -1), np.swapaxes(whole, 0, -1))

    on_mesh(mesh_shape, check)


def test_shapes_and_orders_as_several_arguments():
    def check(mesh):
        x, whole = random_dtensor(mesh, [S0], (4, 3, 2))
        assert_equal(x.reshape(4, -1), whole.reshape(4, -1))
        assert_equal(x.reshape([24]), whole.reshape(24))
        assert_equal(x.transpose(1, 0, 2), whole.transpose(1, 0, 2))
        assert_equal(x.transpose([2, 0, 1]), whole.transpose(2, 0, 1))
        assert_equal(x.sum().reshape(), whole.sum())

    on_mesh((2,), check)


RESHAPES = [
    ((8, 6), (48,)),
    ((8, 6), (4, 2, 6)),
    ((8, 6), (8, 2, 3)),
    ((8, 6), (2, 4, 3, 2)),
    ((8, 6), (6, 8)),
    ((4, 2, 6), (8, 6)),
    ((4, 2, 6), (4, 12)),
    ((12,), (3, 4)),
    ((12,), (1, 12, 1)),
    ((1, 12), (12,)),
    ((7, 2), (14,)),
    ((1, 1), ()),
    ((), (1,)),
    ((3, 0), (0,)),
    ((3, 0, 2), (3, 5, 0)),
    ((6, 4), (6, 4)),
    ((6, 4), (-1, 2)),
    ((2, 3, 4), (6, 2, 2)),
]


@pytest.mark.parametrize("mesh_shape", [(2,), (3,), (2, 2)])
def test_reshapes_for_every_placement(mesh_shape):
    def check(mesh):
        done = 0
        for old, new in RESHAPES:
            kinds = [R, P, *(Shard(dim) for dim in range(len(old)))]
            for placements in itertools.product(kinds, repeat=len(mesh_shape)):
                x, whole = random_dtensor(mesh, placements, old)
                y = unless_misplaced(lambda x=x, new=new: x.reshape(new))
                if y is not None:
                    done += 1
                    assert_equal(y, whole.reshape(new))
                    assert y.local.shape == y.redistribute(y.placements).local.shape
                else:
                    assert any(isinstance(one, Shard) for one in placements)
        return done

    assert min(on_mesh(mesh_shape, check)) > 2 * len(RESHAPES)


@pytest.mark.parametrize(
    ("old", "placement", "new", "result"),
    [
        ((8, 6), S0, (48,), S0),
        ((8, 6), S0, (4, 2, 6), S0),
        ((8, 6), S0, (8, 2, 3), S0),
        ((8, 6), S1, (8, 2, 3), S1),
        ((8, 6), S1, (2, 4, 6), S2),
        ((8, 6), S1, (48,), None),
        ((7, 2), S0, (14,), None),  # 4 and 3 rows of 2 are 8 and 6; 14 are cut into 7 and 7
        ((4, 2, 6), S1, (8, 6), None),
        ((1, 12), S1, (12,), S0),
        ((8, 6), P, (48,), P),
        ((2, 0), S0, (0,), None),
    ],
)
def test_placements_of_reshaped_arrays(old, placement, new, result):
    def check(mesh):
        x, _ = random_dtensor(mesh, [placement], old)
        if result is None:
            with pytest.raises(UsageError, match="other ranks"):
                x.reshape(new)
        else:
            assert x.reshape(new).placements == (result,)

    on_mesh((2,), check)


def test_wrong_shapes_are_refused():
    def check(mesh):
        x, _ = random_dtensor(mesh, [S0], (5, 2))
        for call, message in [
            (lambda: x.reshape((3, 3)), "do not fill"),
            (lambda: x.reshape((-1, -1)), "do not fill"),
            (lambda: x.reshape((-1, 3)), "do not fill"),
            (lambda: x.transpose((0,)), "axes"),
            (lambda: np.squeeze(x, 0), "size 1 that no axis cuts"),
            (lambda: np.stack([x, x.T]), "not one shape"),
            (lambda: np.concatenate([x, x.T], 1), "differ in more than axis 1"),
            (lambda: np.concatenate([x, x]), "stretched or joined"),
        ]:
            with pytest.raises(UsageError, match=message):
                call()

    on_mesh((2,), check)


@settings(max_examples=30, deadline=None)
@given(operands(st.tuples(st.integers(0, 4), st.integers(0, 4)).map(lambda shape: [shape, shape])), st.integers(-2, 1))
def test_concatenate_and_stack(case, axis):
    mesh_shape, [(shape, one), (_, other)] = case

    def check(mesh):
        x, x_whole = random_dtensor(mesh, one, shape, seed=1)
        y, y_whole = random_dtensor(mesh, other, shape, seed=2)
        for join in (np.concatenate, np.stack):
            result = unless_misplaced(lambda join=join: join([x, y, np.ones(shape)], axis=axis))
            if result is not None:
                assert_equal(result, join([x_whole, y_whole, np.ones(shape)], axis=axis))

    on_mesh(mesh_shape, check)


def test_joined_sums_stay_sums():
    def check(mesh):
        x, whole = random_dtensor(mesh, [P], (2, 3))
        joined = np.concatenate([x, x * 2], axis=1)
        assert joined.placements == (P,)
        assert_equal(joined, np.concatenate([whole, whole * 2], axis=1))

    on_mesh((2,), check)
