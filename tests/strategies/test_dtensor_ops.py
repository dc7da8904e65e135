"""Operations on DTensors: equal to numpy's on the whole array, and placed as the tables say."""

from __future__ import annotations

import itertools

import ml_dtypes
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from ferro import UnsupportedError, UsageError
from ferro_strategies.dtensor import DTensor, Partial, Replicate, Shard, distribute

from .dtensor_ranks import MESHES, Watch, on_mesh, placement_tuples, spread

R, S0, S1, S2, P = Replicate(), Shard(0), Shard(1), Shard(2), Partial()
MAX, MIN, PROD = Partial("max"), Partial("min"), Partial("prod")

UNARY = [np.negative, np.positive, np.exp, np.abs, np.isfinite, np.square, np.conjugate, np.sign]
BINARY = [np.add, np.subtract, np.multiply, np.maximum, np.less, np.equal, np.hypot, np.true_divide]


def equal(x, expected):
    """Compare with the whole array: shape, dtype and values, on every rank."""
    expected = np.asarray(expected)
    assert (x.shape, x.dtype) == (expected.shape, expected.dtype)
    near = 1e-6 if expected.dtype == np.float32 else 1e-12
    np.testing.assert_allclose(x.full_tensor(), expected, rtol=near, atol=near)


def fits(call):
    """Return what a call gives, or None where placements do not fit: on all ranks alike."""
    try:
        return call()
    except UsageError as error:
        if "edistribute" not in str(error):
            raise
        return None


@st.composite
def operands(draw, shapes):
    """Draw a mesh, and for each shape of `shapes` placements."""
    mesh_shape = draw(st.sampled_from(MESHES))
    shapes = draw(shapes)
    return mesh_shape, [(shape, draw(placement_tuples(mesh_shape, len(shape)))) for shape in shapes]


any_shape = st.lists(st.integers(0, 6), max_size=3).map(tuple)


@st.composite
def broadcasting(draw):
    """Draw two shapes that broadcast together."""
    shape = draw(any_shape)
    stretched = tuple(draw(st.sampled_from([size, size, 1])) for size in shape)
    pair = [shape, stretched[draw(st.integers(0, len(shape))) :]]
    return pair if draw(st.booleans()) else pair[::-1]


# -- elementwise ---------------------------------------------------------------------------------


@settings(max_examples=60, deadline=None)
@given(operands(st.tuples(any_shape)), st.sampled_from(UNARY))
def test_unary(case, ufunc):
    mesh_shape, [(shape, placements)] = case

    def check(mesh):
        x, whole = spread(mesh, placements, shape)
        equal(ufunc(x), ufunc(whole))

    on_mesh(mesh_shape, check)


@settings(max_examples=150, deadline=None)
@given(operands(broadcasting()), st.sampled_from(BINARY))
@pytest.mark.filterwarnings("ignore:.*encountered in.*:RuntimeWarning")
def test_binary_with_broadcasting(case, ufunc):
    mesh_shape, [(one_shape, one), (other_shape, other)] = case

    def check(mesh):
        x, x_whole = spread(mesh, one, one_shape, seed=1)
        y, y_whole = spread(mesh, other, other_shape, seed=2, low=1)
        result = fits(lambda: ufunc(x, y))
        if result is not None:
            equal(result, ufunc(x_whole, y_whole))

    on_mesh(mesh_shape, check)


@settings(max_examples=60, deadline=None)
@given(operands(st.tuples(any_shape)), st.sampled_from([2, 0.5, np.float32(3), np.array(2.0)]))
def test_numbers(case, number):
    mesh_shape, [(shape, placements)] = case

    def check(mesh):
        x, whole = spread(mesh, placements, shape, dtype=np.float32)
        equal(x + number, whole + number)
        equal(number - x, number - whole)
        equal(x * number, whole * number)
        equal(x / number, whole / number)
        equal(number / (x * x + 1), number / (whole * whole + 1))
        equal(x**2 > number, whole**2 > number)

    on_mesh(mesh_shape, check)


@settings(max_examples=60, deadline=None)
@given(operands(st.tuples(any_shape)))
def test_arrays_that_all_ranks_have(case):
    mesh_shape, [(shape, placements)] = case
    array = np.random.default_rng(3).integers(1, 5, shape).astype(np.float64)

    def check(mesh):
        x, whole = spread(mesh, placements, shape)
        for call in (
            lambda a: a + array,
            lambda a: array * a,
            lambda a: a / array,
            lambda a: np.maximum(array, a),
            lambda a: np.where(a > array, a, 0.0),
        ):
            equal(call(x), call(whole))

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
def test_where_results_lie(one, other, add, multiply, maximum):
    expected = {np.add: add, np.multiply: multiply, np.maximum: maximum}

    def check(mesh):
        x, x_whole = spread(mesh, [one], (5, 4), seed=1)
        y, y_whole = spread(mesh, [other], (5, 4), seed=2)
        for ufunc, placement in expected.items():
            if placement is None:
                with pytest.raises(UsageError, match=r"Shard\(0\).*Shard\(1\).*Redistribute"):
                    ufunc(x, y)
            else:
                assert ufunc(x, y).placements == (placement,)
                equal(ufunc(x, y), ufunc(x_whole, y_whole))
        assert (x / 2).placements == (-x).placements == ((P,) if one == P else (x * 1).placements)

    on_mesh((3,), check)


def test_division_by_a_partial_reduces_it():
    def check(mesh):
        x, x_whole = spread(mesh, [R], (4,), seed=1)
        y, y_whole = spread(mesh, [P], (4,), seed=2, low=1)
        assert (x / y).placements == (R,)
        assert (y / x.__abs__().__add__(1)).placements == (P,)
        equal(x / y, x_whole / y_whole)

    on_mesh((2,), check)


def test_only_partials_make_an_elementwise_operation_communicate():
    watch = Watch()
    kinds = [R, S0, S1, P]

    def check(mesh):
        for one, other in itertools.product(itertools.product(kinds, repeat=2), repeat=2):
            x, _ = spread(mesh, one, (4, 6))
            y, _ = spread(mesh, other, (4, 6))
            watch.seen.clear()
            mesh.parent.barrier()
            watch.looking.add(mesh.parent.rank)
            for ufunc in (np.add, np.multiply, np.maximum):
                fits(lambda ufunc=ufunc, x=x, y=y: ufunc(x, y))
            watch.looking.discard(mesh.parent.rank)
            mesh.parent.barrier()
            ops = {op for op, _ in watch.seen[mesh.parent.rank]}
            assert not ops or P in one + other, (one, other, ops)
            assert not ops or ops & {"all_reduce", "reduce_scatter"}
            mesh.parent.barrier()

    on_mesh((2, 2), check, observers=[watch])


def test_cutting_what_another_axis_has_cut_is_refused_with_what_it_would_move():
    def check(mesh):
        x, _ = spread(mesh, (S0, S0), (8, 2))
        y, _ = spread(mesh, (R, S0), (8, 2))
        with pytest.raises(UsageError, match=r"operand 1 .* moves 48 bytes per rank"):
            x + y
        equal(x + y.redistribute((S0, S0)), x.full_tensor() + y.full_tensor())

    on_mesh((2, 2), check)


def test_a_stretched_dim_must_not_be_cut():
    def check(mesh):
        x, _ = spread(mesh, [S0], (4, 2))
        y, _ = spread(mesh, [S0], (1, 2))
        with pytest.raises(UsageError, match="stretched"):
            x + y

    on_mesh((2,), check)


def test_shapes_that_do_not_broadcast_are_refused():
    def check(mesh):
        x, _ = spread(mesh, [S0], (4, 2))
        with pytest.raises(UsageError, match=r"\(4, 2\), \(3,\) do not broadcast"):
            x + np.ones(3)

    on_mesh((2,), check)


def test_a_sum_of_booleans_is_reduced_before_it_counts():
    def check(mesh):
        local = np.array([True, mesh.parent.rank == 0])
        x = DTensor.from_local(local, mesh, [P])
        equal(x * 2, np.array([2, 2]))
        equal(x.sum(), np.array(2))
        equal(x.astype(np.int64), np.array([1, 1]))

    on_mesh((3,), check)


def test_unsigned_parts_of_a_sum_are_reduced_before_they_wrap_around():
    def check(mesh):
        local = np.array([3 if mesh.parent.rank else 1], np.uint8)
        z = DTensor.from_local(local, mesh, [P])  # 4
        two = DTensor.from_local(np.array([2], np.uint8), mesh, [P])  # 4
        equal((z - two).astype(np.int64), np.array([0]))
        equal((z - two).sum(), np.array([0], np.uint8).sum())

    on_mesh((2,), check)


def test_several_results():
    def check(mesh):
        x, whole = spread(mesh, [S0], (7,), low=-9, high=9)
        for found, expected in zip(np.divmod(x, 4), np.divmod(whole, 4), strict=True):
            assert found.placements == (S0,)
            equal(found, expected)

    on_mesh((3,), check)


# -- in place ------------------------------------------------------------------------------------


def test_in_place_where_placements_agree():
    def check(mesh):
        for x_at, y_at in [(S0, S0), (S0, R), (R, R), (P, P), (S0, P), (R, P)]:
            x, x_whole = spread(mesh, [x_at], (5, 2), seed=1)
            y, y_whole = spread(mesh, [y_at], (5, 2), seed=2)
            same, memory = x, x.local
            x += y
            x *= 2
            assert x is same
            assert x.local is memory
            equal(x, (x_whole + y_whole) * 2)

    on_mesh((3,), check)


@pytest.mark.parametrize(("x_at", "y_at"), [(R, S0), (P, R), (P, S0), (S1, S0)])
def test_in_place_where_they_do_not_is_refused_and_nothing_is_written(x_at, y_at):
    watch = Watch()

    def check(mesh):
        x, _ = spread(mesh, [x_at], (4, 2), seed=1)
        y, _ = spread(mesh, [y_at], (4, 2), seed=2)
        before = x.local.copy()
        watch.looking.add(mesh.parent.rank)
        with pytest.raises(UsageError, match="edistribute"):
            x += y
        watch.looking.discard(mesh.parent.rank)
        np.testing.assert_array_equal(x.local, before)

    on_mesh((2,), check, observers=[watch])
    assert not any(watch.seen.values())


def test_out_takes_the_result():
    def check(mesh):
        x, whole = spread(mesh, [S0], (5, 2))
        out = np.zeros_like(x)
        assert np.exp(x, out=out) is out
        equal(out, np.exp(whole))
        quotient, rest = np.zeros_like(x), None
        found = np.divmod(x, 2.0, out=(quotient, rest))
        assert found[0] is quotient
        equal(found[1], whole % 2)
        with pytest.raises(UnsupportedError, match="array as out="):
            np.exp(x, out=np.zeros((5, 2)))

    on_mesh((2,), check)


# -- reductions ----------------------------------------------------------------------------------

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


@settings(max_examples=200, deadline=None)
@given(reductions(), st.sampled_from(REDUCTIONS), st.sampled_from([np.float64, np.int32, bool]))
@pytest.mark.filterwarnings("ignore:.*encountered in.*:RuntimeWarning")
@pytest.mark.filterwarnings("ignore:Mean of empty slice:RuntimeWarning")
def test_reductions(case, name, dtype):
    mesh_shape, shape, placements, axis, keepdims = case
    if dtype is bool and any(isinstance(one, Partial) for one in placements):
        dtype = np.float64  # for booleans multiplied or added, see the test of booleans
    function = getattr(np, name)

    def check(mesh):
        x, whole = spread(mesh, placements, shape, dtype=dtype)
        try:
            with np.errstate(all="ignore"):
                expected = function(whole, axis=axis, keepdims=keepdims)
        except ValueError:
            with pytest.raises(UsageError, match="no elements"):
                function(x, axis=axis, keepdims=keepdims)
            return
        equal(function(x, axis=axis, keepdims=keepdims), expected)
        equal(getattr(x, name)(axis, keepdims=keepdims), expected)

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
def test_where_reductions_lie(name, before, over_cut, over_other):
    def check(mesh):
        x, _ = spread(mesh, [before], (5, 4))
        reduce = getattr(x, name)
        assert reduce(0).placements == (over_cut,)
        assert reduce(1).placements == (over_other,)

    on_mesh((3,), check)


def test_dims_behind_a_reduced_one_move_up():
    def check(mesh):
        x, _ = spread(mesh, [S2], (2, 3, 4))
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
            equal(x.max(0), whole.max(0))
            equal(x.min(0), whole.min(0))

    on_mesh((3,), check)


def test_nan_is_the_largest_on_every_rank():
    def check(mesh):
        x = distribute(np.array([1.0, np.nan, 3]), mesh, [S0])
        assert np.isnan(float(x.max()))

    on_mesh((3,), check)


def test_reductions_through_ufuncs_and_with_a_dtype():
    def check(mesh):
        x, whole = spread(mesh, [S0], (5, 2), dtype=np.int32)
        equal(np.add.reduce(x), whole.sum(0))
        equal(np.maximum.reduce(x, axis=1), whole.max(1))
        equal(np.amax(x, axis=1), whole.max(1))
        equal(np.amin(x), whole.min())
        equal(np.add.reduce(x, axis=None, dtype=None, keepdims=True), whole.sum(keepdims=True))
        equal(np.sum(x, dtype=np.float32), whole.sum(dtype=np.float32))
        equal(np.mean(x, dtype=np.float32), whole.mean(dtype=np.float32))

    on_mesh((2,), check)


def test_the_result_of_a_reduction_can_be_worked_with():
    def check(mesh):
        for placement in (R, S0):
            x, whole = spread(mesh, [placement], (5, 2))
            for name in REDUCTIONS:
                result = getattr(x, name)()
                assert isinstance(result.local, np.ndarray)
                assert result.local.shape == ()
            equal(np.exp(x.mean()), np.exp(whole.mean()))

    on_mesh((2,), check)


def test_a_sum_is_reduced_before_its_parts_lose_their_fractions():
    def check(mesh):
        x = DTensor.from_local(np.full(4, 0.5), mesh, [P])  # of ones
        equal(np.sum(x, dtype=np.int64), 4)
        assert np.sum(x, dtype=np.float64).placements == (P,)
        with pytest.raises(UsageError, match="int64 has no fractions"):
            np.mean(x, dtype=np.int64)

    on_mesh((2,), check)


def test_wrong_reductions_are_refused():
    def check(mesh):
        x, _ = spread(mesh, [S0], (5, 2))
        with pytest.raises(UsageError, match="axis 2 of an array of 2 dims"):
            x.sum(2)
        with pytest.raises(UsageError, match="twice"):
            x.sum((0, -2))
        with pytest.raises(UnsupportedError, match="complex"):
            (x * 1j).max()
        assert (x * 1j).max(1).placements == (S0,)

    on_mesh((2,), check)


# -- products ------------------------------------------------------------------------------------


@st.composite
def factors(draw):
    """Draw two shapes that can be multiplied: vectors, matrices, batches."""
    rows, summed, columns = (draw(st.integers(0, 5)) for _ in range(3))
    batch = draw(st.integers(1, 3))
    left = draw(
        st.sampled_from([(summed,), (rows, summed), (batch, rows, summed), (1, rows, summed)])
    )
    right = draw(st.sampled_from([(summed,), (summed, columns), (batch, summed, columns)]))
    return left, right


@settings(max_examples=200, deadline=None)
@given(operands(factors()))
def test_matrix_products(case):
    mesh_shape, [(left_shape, left), (right_shape, right)] = case

    def check(mesh):
        x, x_whole = spread(mesh, left, left_shape, seed=1)
        y, y_whole = spread(mesh, right, right_shape, seed=2)
        result = fits(lambda: x @ y)
        if result is not None:
            equal(result, x_whole @ y_whole)

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
def test_where_products_lie(left, right, result):
    def check(mesh):
        x, x_whole = spread(mesh, [left], (5, 4), seed=1)
        y, y_whole = spread(mesh, [right], (4, 7), seed=2)
        if result is None:
            with pytest.raises(UsageError, match="cut different dims"):
                x @ y
            return
        product = x @ y
        assert product.placements == (result,)
        equal(product, x_whole @ y_whole)

    on_mesh((3,), check)


def test_a_two_dimensional_product_as_of_tensor_parallel_layers():
    def check(mesh):
        x, x_whole = spread(mesh, (S0, R), (6, 4), seed=1)
        up, up_whole = spread(mesh, (R, S1), (4, 8), seed=2)
        down, down_whole = spread(mesh, (R, S0), (8, 4), seed=3)
        hidden = np.maximum(x @ up, 0.0)
        assert hidden.placements == (S0, S1)
        out = hidden @ down
        assert out.placements == (S0, P)
        equal(out, np.maximum(x_whole @ up_whole, 0.0) @ down_whole)

    on_mesh((2, 3), check)


def test_products_with_arrays_and_of_wrong_shapes():
    def check(mesh):
        x, whole = spread(mesh, [S0], (5, 2))
        equal(x @ np.ones((2, 3)), whole @ np.ones((2, 3)))
        equal(np.ones((3, 5)) @ x, np.ones((3, 5)) @ whole)
        with pytest.raises(UsageError, match="do not fit together"):
            x @ np.ones((3, 3))
        with pytest.raises(UsageError, match="has no rows"):
            x @ 3

    on_mesh((2,), check)


# -- shapes --------------------------------------------------------------------------------------


@settings(max_examples=60, deadline=None)
@given(operands(st.tuples(any_shape)), st.randoms(use_true_random=False))
def test_dims_in_another_order(case, random):
    mesh_shape, [(shape, placements)] = case
    order = random.sample(range(len(shape)), len(shape))

    def check(mesh):
        x, whole = spread(mesh, placements, shape)
        equal(x.T, whole.T)
        equal(np.transpose(x, order), np.transpose(whole, order))
        equal(np.expand_dims(x, -1), np.expand_dims(whole, -1))
        equal(np.expand_dims(x, (0, 1)), np.expand_dims(whole, (0, 1)))
        equal(np.squeeze(np.expand_dims(x, 0), 0), whole)
        if len(shape) > 1:
            equal(np.swapaxes(x, 0, -1), np.swapaxes(whole, 0, -1))

    on_mesh(mesh_shape, check)


def test_shapes_and_orders_as_several_arguments():
    def check(mesh):
        x, whole = spread(mesh, [S0], (4, 3, 2))
        equal(x.reshape(4, -1), whole.reshape(4, -1))
        equal(x.reshape([24]), whole.reshape(24))
        equal(x.transpose(1, 0, 2), whole.transpose(1, 0, 2))
        equal(x.transpose([2, 0, 1]), whole.transpose(2, 0, 1))
        equal(x.sum().reshape(), whole.sum())

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
                x, whole = spread(mesh, placements, old)
                y = fits(lambda x=x, new=new: x.reshape(new))
                if y is not None:
                    done += 1
                    equal(y, whole.reshape(new))
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
def test_where_reshaped_arrays_lie(old, placement, new, result):
    def check(mesh):
        x, _ = spread(mesh, [placement], old)
        if result is None:
            with pytest.raises(UsageError, match="other ranks"):
                x.reshape(new)
        else:
            assert x.reshape(new).placements == (result,)

    on_mesh((2,), check)


def test_wrong_shapes_are_refused():
    def check(mesh):
        x, _ = spread(mesh, [S0], (5, 2))
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


@settings(max_examples=80, deadline=None)
@given(
    operands(st.tuples(st.integers(0, 4), st.integers(0, 4)).map(lambda shape: [shape, shape])),
    st.integers(-2, 1),
)
def test_joining(case, axis):
    mesh_shape, [(shape, one), (_, other)] = case

    def check(mesh):
        x, x_whole = spread(mesh, one, shape, seed=1)
        y, y_whole = spread(mesh, other, shape, seed=2)
        for join in (np.concatenate, np.stack):
            result = fits(lambda join=join: join([x, y, np.ones(shape)], axis=axis))
            if result is not None:
                equal(result, join([x_whole, y_whole, np.ones(shape)], axis=axis))

    on_mesh(mesh_shape, check)


def test_joined_sums_stay_sums():
    def check(mesh):
        x, whole = spread(mesh, [P], (2, 3))
        joined = np.concatenate([x, x * 2], axis=1)
        assert joined.placements == (P,)
        equal(joined, np.concatenate([whole, whole * 2], axis=1))

    on_mesh((2,), check)


# -- the rest ------------------------------------------------------------------------------------


@settings(max_examples=40, deadline=None)
@given(operands(st.tuples(any_shape)))
def test_choosing_clipping_converting_and_making_alike(case):
    mesh_shape, [(shape, placements)] = case

    def check(mesh):
        x, whole = spread(mesh, placements, shape)
        equal(np.where(x > 0, x, -x * 2), np.where(whole > 0, whole, -whole * 2))
        equal(np.clip(x, -1, 2.5), np.clip(whole, -1, 2.5))
        equal(np.clip(x, None, 1), np.clip(whole, None, 1))
        equal(x.astype(np.float32), whole.astype(np.float32))
        equal((x / 2).astype(np.int64), (whole / 2).astype(np.int64))
        equal(x.copy(), whole)
        equal(np.zeros_like(x), np.zeros_like(whole))
        equal(np.ones_like(x, dtype=np.int8), np.ones_like(whole, dtype=np.int8))
        equal(np.full_like(x, 7), np.full_like(whole, 7))
        assert (np.shape(x), np.ndim(x)) == (whole.shape, whole.ndim)

    on_mesh(mesh_shape, check)


def test_widening_keeps_a_sum_and_truncating_reduces_it():
    def check(mesh):
        x, _ = spread(mesh, [P], (2, 3), dtype=np.float32)
        assert x.astype(np.float64).placements == (P,)
        assert x.astype(np.int64).placements == (R,)

    on_mesh((2,), check)


@pytest.mark.parametrize(
    "call",
    [
        lambda x: np.cumsum(x),
        lambda x: np.linalg.norm(x),
        lambda x: np.sum(x, out=np.zeros(2)),
        lambda x: np.add(x, x, where=np.ones((4, 2), bool)),
        lambda x: np.add.accumulate(x),
        lambda x: np.add.reduce(x, dtype=np.float32),
        lambda x: np.subtract.reduce(x),
        lambda x: np.add.outer(x, x),
        lambda x: np.matmul(x, x.T, out=x),
        lambda x: np.sum(x, initial=3),
    ],
)
def test_what_is_not_there_says_what_to_do(call):
    def check(mesh):
        x, _ = spread(mesh, [S0], (4, 2))
        with pytest.raises(UnsupportedError, match=r"full_tensor\(\)"):
            call(x)

    on_mesh((2,), check)


def test_operands_on_different_meshes_are_refused():
    def check(mesh):
        x, whole = spread(mesh, (S0, R), (4, 2))
        sliced, _ = spread(mesh["dp", "tp"], (S0, R), (4, 2))
        equal(x + sliced, whole + whole)  # a slice with all axes has the same groups
        y, _ = spread(mesh["tp", "dp"], (R, S0), (4, 2))
        with pytest.raises(UsageError, match="different meshes"):
            x + y

    on_mesh((2, 2), check)
