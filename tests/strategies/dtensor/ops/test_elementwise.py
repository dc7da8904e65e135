"""Elementwise operations on DTensors: results equal to NumPy's, and their placements."""

from __future__ import annotations

import itertools

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from ferro import UnsupportedError, UsageError
from ferro_strategies.dtensor import DTensor, Partial, Replicate, Shard

from ..arrays_on_mesh import CollectiveLog, any_shape, assert_equal, on_mesh, operands, random_dtensor, unless_misplaced

R, S0, S1, P = Replicate(), Shard(0), Shard(1), Partial()
MAX, PROD = Partial("max"), Partial("prod")


UNARY = [np.negative, np.positive, np.exp, np.abs, np.isfinite, np.square, np.conjugate, np.sign]
BINARY = [np.add, np.subtract, np.multiply, np.maximum, np.less, np.equal, np.hypot, np.true_divide]


@st.composite
def broadcasting(draw):
    """Draw two shapes that broadcast together."""
    shape = draw(any_shape)
    stretched = tuple(draw(st.sampled_from([size, size, 1])) for size in shape)
    pair = [shape, stretched[draw(st.integers(0, len(shape))) :]]
    return pair if draw(st.booleans()) else pair[::-1]


@settings(max_examples=25, deadline=None)
@given(operands(st.tuples(any_shape)), st.sampled_from(UNARY))
def test_unary_ufuncs(case, ufunc):
    mesh_shape, [(shape, placements)] = case

    def check(mesh):
        x, whole = random_dtensor(mesh, placements, shape)
        assert_equal(ufunc(x), ufunc(whole))

    on_mesh(mesh_shape, check)


@settings(max_examples=50, deadline=None)
@given(operands(broadcasting()), st.sampled_from(BINARY))
@pytest.mark.filterwarnings("ignore:.*encountered in.*:RuntimeWarning")
def test_binary_with_broadcasting(case, ufunc):
    mesh_shape, [(one_shape, one), (other_shape, other)] = case

    def check(mesh):
        x, x_whole = random_dtensor(mesh, one, one_shape, seed=1)
        y, y_whole = random_dtensor(mesh, other, other_shape, seed=2, low=1)
        result = unless_misplaced(lambda: ufunc(x, y))
        if result is not None:
            assert_equal(result, ufunc(x_whole, y_whole))

    on_mesh(mesh_shape, check)


@settings(max_examples=25, deadline=None)
@given(operands(st.tuples(any_shape)), st.sampled_from([2, 0.5, np.float32(3), np.array(2.0)]))
def test_numbers_as_operands(case, number):
    mesh_shape, [(shape, placements)] = case

    def check(mesh):
        x, whole = random_dtensor(mesh, placements, shape, dtype=np.float32)
        assert_equal(x + number, whole + number)
        assert_equal(number - x, number - whole)
        assert_equal(x * number, whole * number)
        assert_equal(x / number, whole / number)
        assert_equal(number / (x * x + 1), number / (whole * whole + 1))
        assert_equal(x**2 > number, whole**2 > number)

    on_mesh(mesh_shape, check)


@settings(max_examples=25, deadline=None)
@given(operands(st.tuples(any_shape)))
def test_arrays_that_all_ranks_have(case):
    mesh_shape, [(shape, placements)] = case
    array = np.random.default_rng(3).integers(1, 5, shape).astype(np.float64)

    def check(mesh):
        x, whole = random_dtensor(mesh, placements, shape)
        for call in (
            lambda a: a + array,
            lambda a: array * a,
            lambda a: a / array,
            lambda a: np.maximum(array, a),
            lambda a: np.where(a > array, a, 0.0),
        ):
            assert_equal(call(x), call(whole))

    on_mesh(mesh_shape, check)


@pytest.mark.parametrize(
    ("one", "other", "add", "multiply", "maximum"),
    [
        (R, R, R, R, R),
        (S0, S0, S0, S0, S0),
        (S0, R, S0, S0, S0),
        (R, S1, S1, S1, S1),
        (S0, S1, None, None, None),
        (P, P, P, R, R),
        (P, R, R, P, R),
        (R, P, R, P, R),
        (P, S1, S1, S1, S1),
        (MAX, MAX, R, R, R),
        (PROD, S0, S0, S0, S0),
    ],
)
def test_placements_of_results(one, other, add, multiply, maximum):
    expected = {np.add: add, np.multiply: multiply, np.maximum: maximum}

    def check(mesh):
        x, x_whole = random_dtensor(mesh, [one], (5, 4), seed=1)
        y, y_whole = random_dtensor(mesh, [other], (5, 4), seed=2)
        for ufunc, placement in expected.items():
            if placement is None:
                with pytest.raises(UsageError, match=r"Shard\(0\).*Shard\(1\).*Redistribute"):
                    ufunc(x, y)
            else:
                assert ufunc(x, y).placements == (placement,)
                assert_equal(ufunc(x, y), ufunc(x_whole, y_whole))
        assert (x / 2).placements == (-x).placements == ((P,) if one == P else (x * 1).placements)

    on_mesh((3,), check)


def test_division_by_a_partial_reduces_it():
    def check(mesh):
        x, x_whole = random_dtensor(mesh, [R], (4,), seed=1)
        y, y_whole = random_dtensor(mesh, [P], (4,), seed=2, low=1)
        assert (x / y).placements == (R,)
        assert (y / x.__abs__().__add__(1)).placements == (P,)
        assert_equal(x / y, x_whole / y_whole)

    on_mesh((2,), check)


def test_only_partials_make_an_elementwise_operation_communicate():
    log = CollectiveLog()
    kinds = [R, S0, S1, P]

    def check(mesh):
        for one, other in itertools.product(itertools.product(kinds, repeat=2), repeat=2):
            x, _ = random_dtensor(mesh, one, (4, 6))
            y, _ = random_dtensor(mesh, other, (4, 6))
            log.calls.clear()
            mesh.parent.barrier()
            with log.recording(mesh):
                for ufunc in (np.add, np.multiply, np.maximum):
                    unless_misplaced(lambda ufunc=ufunc, x=x, y=y: ufunc(x, y))
            mesh.parent.barrier()
            ops = {op for op, _ in log.calls[mesh.parent.rank]}
            assert not ops or P in one + other, (one, other, ops)
            assert not ops or ops & {"all_reduce", "reduce_scatter"}
            mesh.parent.barrier()

    on_mesh((2, 2), check, observers=[log])


def test_cutting_what_another_axis_has_cut_is_refused_with_what_it_would_move():
    def check(mesh):
        x, _ = random_dtensor(mesh, (S0, S0), (8, 2))
        y, _ = random_dtensor(mesh, (R, S0), (8, 2))
        with pytest.raises(UsageError, match=r"operand 1 .* moves 48 bytes per rank"):
            x + y
        assert_equal(x + y.redistribute((S0, S0)), x.full_tensor() + y.full_tensor())

    on_mesh((2, 2), check)


def test_a_stretched_dim_must_not_be_cut():
    def check(mesh):
        x, _ = random_dtensor(mesh, [S0], (4, 2))
        y, _ = random_dtensor(mesh, [S0], (1, 2))
        with pytest.raises(UsageError, match="stretched"):
            x + y

    on_mesh((2,), check)


def test_shapes_that_do_not_broadcast_are_refused():
    def check(mesh):
        x, _ = random_dtensor(mesh, [S0], (4, 2))
        with pytest.raises(UsageError, match=r"\(4, 2\), \(3,\) do not broadcast"):
            x + np.ones(3)

    on_mesh((2,), check)


def test_a_sum_of_booleans_is_reduced_before_it_counts():
    def check(mesh):
        local = np.array([True, mesh.parent.rank == 0])
        x = DTensor.from_local(local, mesh, [P])
        assert_equal(x * 2, np.array([2, 2]))
        assert_equal(x.sum(), np.array(2))
        assert_equal(x.astype(np.int64), np.array([1, 1]))

    on_mesh((3,), check)


def test_unsigned_parts_of_a_sum_are_reduced_before_they_wrap_around():
    def check(mesh):
        local = np.array([3 if mesh.parent.rank else 1], np.uint8)
        z = DTensor.from_local(local, mesh, [P])  # 4
        two = DTensor.from_local(np.array([2], np.uint8), mesh, [P])  # 4
        assert_equal((z - two).astype(np.int64), np.array([0]))
        assert_equal((z - two).sum(), np.array([0], np.uint8).sum())

    on_mesh((2,), check)


def test_ufuncs_with_several_results():
    def check(mesh):
        x, whole = random_dtensor(mesh, [S0], (7,), low=-9, high=9)
        for found, expected in zip(np.divmod(x, 4), np.divmod(whole, 4), strict=True):
            assert found.placements == (S0,)
            assert_equal(found, expected)

    on_mesh((3,), check)


def test_operands_on_different_meshes_are_refused():
    def check(mesh):
        x, whole = random_dtensor(mesh, (S0, R), (4, 2))
        sliced, _ = random_dtensor(mesh["dp", "tp"], (S0, R), (4, 2))
        assert_equal(x + sliced, whole + whole)  # a slice with all axes has the same groups
        y, _ = random_dtensor(mesh["tp", "dp"], (R, S0), (4, 2))
        with pytest.raises(UsageError, match="different meshes"):
            x + y

    on_mesh((2, 2), check)


# -- in place --------------------------------------------------------------------------------------


def test_in_place_where_placements_agree():
    def check(mesh):
        for x_at, y_at in [(S0, S0), (S0, R), (R, R), (P, P), (S0, P), (R, P)]:
            x, x_whole = random_dtensor(mesh, [x_at], (5, 2), seed=1)
            y, y_whole = random_dtensor(mesh, [y_at], (5, 2), seed=2)
            same, memory = x, x.local
            x += y
            x *= 2
            assert x is same
            assert x.local is memory
            assert_equal(x, (x_whole + y_whole) * 2)

    on_mesh((3,), check)


@pytest.mark.parametrize(("x_at", "y_at"), [(R, S0), (P, R), (P, S0), (S1, S0)])
def test_in_place_with_other_placements_is_refused_and_nothing_is_written(x_at, y_at):
    log = CollectiveLog()

    def check(mesh):
        x, _ = random_dtensor(mesh, [x_at], (4, 2), seed=1)
        y, _ = random_dtensor(mesh, [y_at], (4, 2), seed=2)
        before = x.local.copy()
        with log.recording(mesh), pytest.raises(UsageError, match="edistribute"):
            x += y
        np.testing.assert_array_equal(x.local, before)

    on_mesh((2,), check, observers=[log])
    assert not any(log.calls.values())


def test_out_takes_the_result():
    def check(mesh):
        x, whole = random_dtensor(mesh, [S0], (5, 2))
        out = np.zeros_like(x)
        assert np.exp(x, out=out) is out
        assert_equal(out, np.exp(whole))
        quotient, rest = np.zeros_like(x), None
        found = np.divmod(x, 2.0, out=(quotient, rest))
        assert found[0] is quotient
        assert_equal(found[1], whole % 2)
        with pytest.raises(UnsupportedError, match="array as out="):
            np.exp(x, out=np.zeros((5, 2)))

    on_mesh((2,), check)
