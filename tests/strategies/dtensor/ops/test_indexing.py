"""Indexing DTensors: NumPy's result on the whole array, as a view, with nothing sent."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from ferro import UnsupportedError, UsageError
from ferro_strategies.dtensor import Partial, Replicate, Shard, distribute

from ..arrays_on_mesh import MESHES, CollectiveLog, on_mesh, placement_tuples, random_dtensor

R, S0, S1, P = Replicate(), Shard(0), Shard(1), Partial()


@st.composite
def keys(draw):
    """Draw a mesh, an array's shape and placements, and an index of dims that are not cut."""
    mesh_shape = draw(st.sampled_from(MESHES))
    shape = tuple(draw(st.lists(st.integers(0, 5), max_size=3)))
    placements = draw(placement_tuples(mesh_shape, len(shape)))
    whole = st.sampled_from([slice(None), slice(0, None), slice(None, 99)])
    key = []
    for dim, size in enumerate(shape):
        some = [st.slices(size), whole] if Shard(dim) not in placements else [whole]
        if size and Shard(dim) not in placements:
            some.append(st.integers(-size, size - 1))
        key.append(draw(st.one_of(some)))
    stop = draw(st.integers(0, len(key)))  # dims in place of which there are dots
    start = draw(st.integers(0, stop))
    key[start:stop] = [...] if start < stop or draw(st.booleans()) else []
    for _ in range(draw(st.integers(0, 2))):
        key.insert(draw(st.integers(0, len(key))), None)
    return mesh_shape, shape, placements, tuple(key)


@settings(max_examples=50, deadline=None)
@given(keys())
def test_indexing(case):
    mesh_shape, shape, placements, key = case
    log = CollectiveLog()

    def check(mesh):
        x, whole = random_dtensor(mesh, placements, shape)
        with log.recording(mesh):
            y = x[key]
        assert np.may_share_memory(x.local, y.local) or not y.local.size
        found = y.full_tensor()
        assert (y.shape, found.shape) == (whole[key].shape,) * 2
        np.testing.assert_array_equal(found, whole[key])
        assert y.redistribute([R] * mesh.ndim).redistribute(y.placements).placements == y.placements

    on_mesh(mesh_shape, check, observers=[log])
    assert not log.calls


@pytest.mark.parametrize(
    ("placement", "key", "result"),
    [
        (S1, 0, S0),
        (S1, np.int64(-1), S0),
        (S1, slice(1, 3), S1),
        (S1, None, Shard(2)),
        (S1, (..., slice(0, 3)), S1),
        (S0, (slice(None), 2), S0),
        (P, (1, 2), P),
        (R, (1, slice(None, None, -1)), R),
    ],
)
def test_placements_of_views(placement, key, result):
    def check(mesh):
        x, _ = random_dtensor(mesh, [placement], (4, 3))
        assert x[key].placements == (result,)

    on_mesh((2,), check)


@pytest.mark.parametrize(
    ("key", "error", "message"),
    [
        (0, UsageError, r"index 0 of dim 0 of shape \(4, 3\).*cut.*Redistribute"),
        (slice(1, None), UsageError, "dim 0.*cut"),
        (slice(None, None, -1), UsageError, "dim 0.*cut"),
        ((..., 3), IndexError, "index 3 is outside dim 1"),
        ((slice(None), 0, 0), IndexError, "too many"),
        ((..., ...), IndexError, "more than one ellipsis"),
        ([0, 1], (UnsupportedError, UsageError), "worked along.*Redistribute|array of integers.*in an assignment"),
        ((np.array([0]), 0), UnsupportedError, "not an array.*full_tensor|not .*a mask with.*full_tensor"),
        (True, UnsupportedError, "not bool"),
        ("rows", UnsupportedError, "not str"),
    ],
)
def test_wrong_or_unsupported_indices_are_refused(key, error, message):
    def check(mesh):
        x, _ = random_dtensor(mesh, [S0], (4, 3))
        with pytest.raises(error, match=message):
            x[key]
        with pytest.raises(error, match=message):
            x[key] = 1

    for mesh_shape in [(1,), (2,)]:  # the same program is refused for any number of ranks
        on_mesh(mesh_shape, check)


def test_iteration_over_the_first_dim():
    def check(mesh):
        x, whole = random_dtensor(mesh, [S1], (4, 3))
        for row, expected in zip(x, whole, strict=True):
            np.testing.assert_array_equal(row.full_tensor(), expected)

    on_mesh((2,), check)


def test_assignment():
    def check(mesh):
        x, whole = random_dtensor(mesh, [S1], (4, 3), seed=1)
        y, other = random_dtensor(mesh, [S0], (3,), seed=2)
        memory, whole = x.local, whole.copy()
        x[0], whole[0] = y, other
        x[1] += y
        whole[1] += other
        x[2:, :], whole[2:, :] = 7, 7
        x[3], whole[3] = np.arange(3.0), np.arange(3.0)
        np.testing.assert_array_equal(x.full_tensor(), whole)
        assert x.local is memory

    on_mesh((2,), check)


def test_numbers_that_the_dtype_does_not_hold_are_refused_as_numpy_does():
    def check(mesh):
        for dtype, value, error in [
            (int, np.nan, ValueError),
            (int, np.float64("nan"), ValueError),
            (int, 2**70, OverflowError),
            (np.uint8, 300, OverflowError),
            (np.uint8, -1, OverflowError),
            (float, 1j, TypeError),
        ]:
            for placement in (S0, P):
                whole = np.ones((1, 2), dtype)  # one rank has no row
                x = distribute(whole, mesh, [placement])
                for key in (..., whole > 0):
                    with pytest.raises(error):
                        x[key] = value
                np.testing.assert_array_equal(x.full_tensor(), whole)

    on_mesh((2,), check)


@pytest.mark.parametrize(
    ("placement", "value", "message"),
    [
        (S1, lambda y: y.redistribute([P]), None),
        (R, lambda y: y, "what is written to has .*Replicate"),
        (P, lambda y: y, "what is written to has .*Partial"),
        (P, lambda y: 1.0, None),
        (S1, lambda y: np.ones((2, 3)), r"shape \(2, 3\) does not fit into shape \(3,\)"),
    ],
)
def test_a_written_value_must_have_the_placements_of_its_target(placement, value, message):
    def check(mesh):
        x, whole = random_dtensor(mesh, [placement], (4, 3), seed=1)
        y, other = random_dtensor(mesh, [S0], (3,), seed=2)
        if message is None:  # a Partial is reduced to the part; one rank's part of a Partial takes a number
            x[0] = value(y)
            whole[0] = 1 if placement == P else other
            np.testing.assert_array_equal(x.full_tensor(), whole)
            return
        with pytest.raises(UsageError, match=message):
            x[0] = value(y)
        np.testing.assert_array_equal(x.full_tensor(), whole)

    on_mesh((2,), check)
