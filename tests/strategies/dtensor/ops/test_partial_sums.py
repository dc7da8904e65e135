"""Operations on the parts of sums: they are done only where the results add up to NumPy's."""

from __future__ import annotations

import ml_dtypes
import numpy as np
import pytest

from ferro import UsageError
from ferro_strategies.dtensor import DTensor, Partial, Replicate, Shard, distribute

from ..arrays_on_mesh import assert_equal, error_on_every_rank, on_mesh

R, S0, S1, P = Replicate(), Shard(0), Shard(1), Partial()


def parts_of_sum(mesh, *parts):
    """Return the sum of one part for each rank of a mesh of one axis."""
    return DTensor.from_local(np.array([parts[mesh.parent.rank]]), mesh, [P], shape=(1,))


def test_parts_of_integers_are_not_converted():
    def check(mesh):
        halves = parts_of_sum(mesh, 0.5, 0.5)
        target = parts_of_sum(mesh, 0, 0)
        target[...] = halves
        assert target.full_tensor() == [1]
        target[...] = 7
        assert target.full_tensor() == [7]
        # Neither part is a float64.
        large = parts_of_sum(mesh, 2**53 + 1, -(2**53))
        for result in (large / 1, large * 1.0, large.mean(), large.astype(float), np.concatenate([large, halves])[:1]):
            assert result.full_tensor() == 1
        small = parts_of_sum(mesh, np.int8(100), np.int8(100))
        assert small.astype(np.int64).full_tensor() == small.full_tensor().astype(np.int64)
        assert (small + small).placements == (P,)  # of one dtype, an overflow in the parts does no harm

    on_mesh((2,), check)


def test_factors_that_are_not_finite_meet_the_sum():
    def check(mesh):
        x = parts_of_sum(mesh, 2.0, -1.0)
        with np.errstate(divide="ignore"):
            infinite = np.array([np.inf])
            for result in (x * np.inf, x * infinite, x / 0, x / np.zeros(1), x @ infinite, np.vdot(x, infinite)):
                assert result.full_tensor() == np.inf
        assert (x * 2).placements == (x / np.ones(1)).placements == (x @ np.ones(1)).placements == (P,)

    on_mesh((2,), check)


@pytest.mark.parametrize("dtype", [np.float16, ml_dtypes.bfloat16])
def test_half_precision_is_added_up_in_float32_and_rounded_once(dtype):
    many = 4096 if dtype == np.float16 else 512  # beyond which adding ones has no effect

    def check(mesh):
        ones = distribute(np.ones((2 * many, 2), dtype), mesh, [S0, R])
        for total in (
            ones.sum(0),
            np.einsum("ij->j", ones),
            np.ones(2 * many, dtype) @ ones,
            np.nansum(ones, 0),
            np.sum(ones, 0, where=ones > 0),
        ):
            assert (total.dtype, total.placements) == (dtype, (P, R))
            assert total.full_tensor().dtype == dtype
            assert total.full_tensor().tolist() == [2 * many] * 2
            assert (total / 2 + total / 2).full_tensor().tolist() == [2 * many] * 2
        assert np.cumsum(ones.redistribute([S1, R]), 0)[-1].full_tensor().tolist() == [2 * many] * 2
        assert float(ones.mean()) == float(np.average(ones, weights=np.ones((2 * many, 2), dtype))) == 1
        assert float(ones.std()) == 0
        assert float(np.linalg.norm(ones)) == np.sqrt(4 * many).astype(dtype)
        if dtype == np.float16:  # a part of the sum is beyond the largest float16
            large = distribute(np.array([6e4, 6e4, 6e4, -6e4, -6e4, -6e4], dtype), mesh, [S0, R])
            assert float(large.sum().astype(dtype)) == float(np.sum(large, initial=1)) - 1 == 0
            assert float(large.sum()) == float(large.mean()) == float((large.sum() * 4).sum()) == 0
            own = DTensor.from_local(np.full(1, 6e4, dtype) * (1 - 2 * mesh.coordinates[0]), mesh, [P, P], shape=(1,))
            assert (own * 1).full_tensor() == own.full_tensor() == 0

    on_mesh((2, 2), check)


def test_a_power_that_one_rank_cannot_compute_is_an_error_on_every_rank():
    def check(mesh):
        x = distribute(np.array([1, 2, 3]), mesh, [S0])
        return x ** distribute(np.array([1, 1, -1]), mesh, [S0])

    messages = error_on_every_rank((2,), check, (ValueError, UsageError))
    assert "rank 1 failed on its part" in messages[0]
    assert "negative integer powers" in messages[1]
    error_on_every_rank((3,), lambda mesh: distribute(np.array([2]), mesh, [S0]) ** -1, (ValueError, UsageError))


@pytest.mark.parametrize(
    "operation", [lambda x: x / x, lambda x: (1e200 * x) @ (1e200 * x), lambda x: np.prod(x * 1e200)]
)
def test_floating_point_errors_that_are_asked_for_are_raised_on_every_rank(operation):
    def check(mesh):
        x = distribute(np.ones(4), mesh, [S0])
        if mesh.parent.rank == 0:
            x.local[...] = 0
        with np.errstate(all="raise"):
            operation(x)

    error_on_every_rank((2,), check, (FloatingPointError, UsageError))


def test_powers_and_clip_have_the_dtypes_of_numpys_operators():
    def check(mesh):
        for dtype in (bool, np.int8, np.float16, np.float32):
            whole = np.arange(4).astype(dtype)
            x = distribute(whole, mesh, [S0])
            assert_equal(x**2, whole**2)
            assert_equal(2.0**x, 2.0**whole)
            assert_equal(np.clip(x, 0, 2.5), np.clip(whole, 0, 2.5))
        assert_equal(
            np.clip(distribute(np.arange(4, dtype=np.uint8), mesh, [S0]), -5, 300), np.arange(4, dtype=np.uint8)
        )

    on_mesh((2,), check)
