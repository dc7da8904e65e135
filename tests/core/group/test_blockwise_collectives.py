"""scan, exscan, min_loc and max_loc against NumPy."""

import numpy as np
import pytest

from ferro import UnsupportedError, UsageError, simulate

UFUNCS = {
    "sum": np.add,
    "prod": np.multiply,
    "min": np.minimum,
    "max": np.maximum,
    "band": np.bitwise_and,
    "bor": np.bitwise_or,
    "bxor": np.bitwise_xor,
}
HALF = ("float16", "bfloat16")


def samples(dtype, ranks, shape):
    pytest.importorskip("ml_dtypes")
    numbers = np.random.default_rng(ranks).standard_normal((ranks, *shape)) * 3
    return numbers.astype("complex64" if dtype == "complex64" else dtype)


def prefix(op, rows, dtype):
    """Reduce rows one after the other; half precision is rounded once, at the end."""
    wide = np.float32 if dtype in HALF and op in ("sum", "prod") else dtype
    total = rows[0].astype(wide)
    for row in rows[1:]:
        total = UFUNCS[op](total, row.astype(wide)).astype(wide)
    return total.astype(dtype)


@pytest.mark.parametrize("dtype", ["float64", "float32", *HALF, "int32", "uint8", "bool", "complex64"])
@pytest.mark.parametrize("ranks", [1, 3])
def test_prefixes_are_reduced_in_order_of_rank(dtype, ranks):
    ordered, bits = dtype != "complex64", dtype in ("int32", "uint8", "bool")
    ops = ["sum", "prod", *(["min", "max"] if ordered else []), *(["band", "bor", "bxor"] if bits else [])]

    def work(group):
        for shape in [(), (7,), (2, 3), (0, 2), (3000,)]:
            rows = samples(dtype, ranks, shape)
            x, before = rows[group.rank], rows[group.rank].copy()
            for op in ops:
                inclusive, work = group.scan(x, op), group.exscan(x, op, async_op=True)
                np.testing.assert_array_equal(inclusive, prefix(op, rows[: group.rank + 1], dtype), strict=True)
                exclusive = work.wait()
                if group.rank:
                    np.testing.assert_array_equal(exclusive, prefix(op, rows[: group.rank], dtype), strict=True)
                else:  # the value that changes nothing
                    assert (exclusive.shape, exclusive.dtype) == (x.shape, x.dtype)
                    np.testing.assert_array_equal(UFUNCS[op](exclusive, x), x)
                np.testing.assert_array_equal(x, before)

    simulate(work, ranks)


@pytest.mark.parametrize("dtype", ["float64", *HALF, "int32", "bool"])
def test_extrema_come_with_the_lowest_rank_that_has_them(dtype):
    def work(group):
        for shape in [(), (50,), (0,), (2, 3)]:
            rows = samples(dtype, 3, shape)
            for call, search, extremum in ((group.min_loc, np.argmin, np.min), (group.max_loc, np.argmax, np.max)):
                values, ranks = call(rows[group.rank])
                np.testing.assert_array_equal(ranks, search(rows, axis=0))
                np.testing.assert_array_equal(values, extremum(rows, axis=0))
                out = np.empty(shape, rows.dtype), np.empty(shape, np.int64)
                result = call(rows[group.rank], out=out, async_op=True).wait()
                assert result[0] is out[0]
                assert result[1] is out[1]
                np.testing.assert_array_equal(out[1], ranks)

    simulate(work, 3)


def test_nan_is_the_extremum_as_in_numpy():
    def work(group):
        x = np.array([[1.0, np.nan, 5.0], [np.nan, 0.0, 5.0], [np.nan, -1.0, 4.0]])[group.rank]
        least, by = group.min_loc(x)
        np.testing.assert_array_equal(least, [np.nan, np.nan, 4.0])
        return by.tolist(), group.max_loc(x)[1].tolist()

    assert simulate(work, 3)[0] == ([1, 0, 2], [1, 0, 0])


def test_the_result_may_take_the_place_of_the_input():
    def work(group):
        x = np.arange(5.0)
        assert group.scan(x, out=x) is x
        return x.tolist()

    assert simulate(work, 3)[2] == [0.0, 3.0, 6.0, 9.0, 12.0]


def test_a_users_function_is_called_in_order_of_rank():
    def keep_left(a, b, out):  # associative, not commutative
        out[...] = a

    def work(group):
        return group.scan(np.full(4, group.rank), keep_left).tolist()

    assert simulate(work, 3) == [[0] * 4] * 3


def test_wrong_calls_are_refused_before_anything_moves():
    def work(group):
        with pytest.raises(UsageError, match="scan: a mean is not defined: divide the sum"):
            group.scan(np.ones(2), "mean")
        with pytest.raises(UsageError, match="exscan needs a named reduction"):
            group.exscan(np.ones(2), lambda a, b, out: None)
        with pytest.raises(UnsupportedError, match="complex numbers have no order"):
            group.min_loc(np.ones(2, complex))
        with pytest.raises(UsageError, match="out must be two arrays"):
            group.max_loc(np.ones(2), out=np.ones(2))
        return group.scan(1)

    assert simulate(work, 2) == [1, 2]
