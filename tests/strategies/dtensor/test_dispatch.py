"""NumPy functions that DTensors do not support raise an error that names the alternatives."""

from __future__ import annotations

import numpy as np
import pytest

from ferro import UnsupportedError, UsageError
from ferro_strategies.dtensor import DTensor, Partial, Replicate, Shard, distribute

from .arrays_on_mesh import assert_equal, on_mesh, random_dtensor

S0 = Shard(0)


@pytest.mark.parametrize(
    "call",
    [
        lambda x: np.unique(x),
        lambda x: np.linalg.svd(x),
        lambda x: np.linalg.norm(x, 2),
        lambda x: np.where(x > 0),
        lambda x: np.save("x.npy", x),
        lambda x: np.sum(x, out=np.zeros(2)),
        lambda x: np.add(x, x, where=np.ones((4, 2), bool)),
        lambda x: np.add.reduceat(x, [0, 1]),
        lambda x: np.matmul(x, x.T, out=x),
        lambda x: np.logical_or.reduce(x, initial=True),
    ],
)
def test_unsupported_calls_name_the_alternatives(call):
    def check(mesh):
        x, _ = random_dtensor(mesh, [S0], (4, 2))
        with pytest.raises(UnsupportedError, match=r"full_tensor\(\)"):
            call(x)

    on_mesh((2,), check)


class Labelled(np.ndarray):
    """An array that means more than its numbers."""


def test_operands_that_mean_more_than_their_numbers_are_refused():
    def check(mesh):
        x, _ = random_dtensor(mesh, [S0], (4, 2))
        masked = np.ma.array(np.ones(2), mask=[1, 0])
        for call in (
            lambda: x + masked,
            lambda: x @ masked,
            lambda: x + np.ones(2).view(Labelled),
            lambda: np.where(x > 0, masked, x),
            lambda: np.isin(x, masked),
            lambda: x.__setitem__(..., masked),
            lambda: np.concatenate([x, np.ma.array(np.ones((4, 1)))], 1),
            lambda: x + None,
            lambda: x == "text",
        ):
            with pytest.raises(UsageError, match=r"mask|np.asarray|not of numbers"):
                call()

    on_mesh((2,), check)


def test_functions_that_are_not_known_work_on_arrays_that_no_axis_cuts():
    def check(mesh):
        x, whole = random_dtensor(mesh, [S0], (4, 2))
        x = x.redistribute([Replicate()])
        assert_equal(np.unique(x), np.unique(whole))
        assert_equal(np.linalg.svd(x).S, np.linalg.svd(whole).S)
        assert_equal(np.where(x > 0)[1], np.where(whole > 0)[1])
        assert_equal(x[x > 0], whole[whole > 0])
        assert_equal(np.linalg.norm(x, "nuc"), np.linalg.norm(whole, "nuc"))
        with pytest.raises(UnsupportedError, match="on one rank"):
            np.save("x.npy", x)

    on_mesh((2,), check)


def test_arguments_of_reductions_and_ufuncs():
    def check(mesh):
        x, whole = random_dtensor(mesh, [S0], (4, 3))
        total, mask = DTensor.zeros(3, mesh, [Partial()]), whole > 0
        assert np.sum(x, 0, out=total) is total
        assert_equal(total, whole.sum(0))
        assert_equal(x.max(0, initial=1, where=mask), whole.max(0, initial=1, where=mask))
        assert_equal(np.add.reduce(x, dtype=np.float32), np.add.reduce(whole, dtype=np.float32))
        assert_equal(np.bitwise_or.reduce(x > 0, axis=1), np.bitwise_or.reduce(whole > 0, axis=1))
        assert_equal(np.add.outer(x, [1.0, 2.0]), np.add.outer(whole, [1.0, 2.0]))
        assert_equal(DTensor.zeros((0, 2), mesh, [S0]).max(0, initial=3), np.zeros((0, 2)).max(0, initial=3))
        assert_equal(x.sum(np.int64(1)).reshape(np.array([2, 2])), whole.sum(1).reshape(2, 2))
        assert_equal(np.expand_dims(x, np.int64(1)), np.expand_dims(whole, 1))
        with pytest.raises(UsageError, match="what is written to"):
            np.sum(x, 1, out=total)
        with pytest.raises(ZeroDivisionError):
            np.average(x, 0, weights=np.zeros((4, 3)))
        for call in (lambda: np.median(x), lambda: x.argmax(0), lambda: x[mask], lambda: np.take(x, [0], 0)):
            with pytest.raises(UsageError, match="Redistribute"):
                call()
        few = distribute(whole[:1], mesh, [S0])  # of which one rank has nothing
        for call in (lambda: np.take(few, [7], 1), lambda: np.partition(few, 9, 1), lambda: few[:, [7]]):
            with pytest.raises((IndexError, ValueError)):
                call()

    on_mesh((2,), check)
