"""coalesce(): many small calls, sent as few, with the results of many."""

import numpy as np
import pytest

import ferro
from ferro.errors import CollectiveMismatch, UnsupportedError, UsageError
from ferro.simulated import simulate


def test_many_calls_become_one_for_each_kind():
    def work(group, metrics):
        mine = [np.full(shape, group.rank + i, np.float32) for i, shape in enumerate(SHAPES)]
        with group.coalesce() as together:
            sums = [together.all_reduce(array) for array in mine]
            peak = together.all_reduce(mine[2], "max")
            roots = [together.broadcast(array, 1) for array in mine]
            wide = together.all_reduce(np.arange(3.0))
        return [p.result() for p in (*sums, peak, *roots, wide)]

    metrics = ferro.Metrics()
    for found in simulate(lambda group: work(group, metrics), 3, observers=[metrics]):
        for i, shape in enumerate(SHAPES):
            np.testing.assert_array_equal(found[i], np.full(shape, 3 * i + 3, np.float32))
            np.testing.assert_array_equal(found[5 + i], np.full(shape, 1 + i, np.float32))
        np.testing.assert_array_equal(found[4], np.full(SHAPES[2], 4, np.float32))
        np.testing.assert_array_equal(found[9], np.arange(3.0) * 3)
    totals = metrics.totals()
    assert totals["world", "all_reduce"].count == 3 * 3  # float32 sum and max, float64 sum
    assert totals["world", "broadcast"].count == 3


SHAPES = ((), (4,), (2, 3), (0,))


def test_results_land_in_out():
    def work(group):
        arrays = [np.full(n, 1.0 + group.rank) for n in (1, 5)]
        with group.coalesce() as together:
            pending = [together.all_reduce(array, "mean", out=array) for array in arrays]
        assert all(p.result() is array for p, array in zip(pending, arrays, strict=True))
        return [array.tolist() for array in arrays]

    assert simulate(work, 2) == [[[1.5], [1.5] * 5]] * 2


def test_a_result_is_there_only_when_the_block_has_ended():
    def work(group):
        with group.coalesce() as together:
            pending = together.all_reduce(1)
            with pytest.raises(UsageError, match="when the coalesce"):
                pending.result()
        assert pending.result() == 1
        with pytest.raises(UsageError, match="block has ended: open a new one"):
            together.all_reduce(1)

    simulate(work, 1)


def test_nothing_is_sent_when_the_block_raises():
    metrics = ferro.Metrics()

    def fail(together):
        together.all_reduce(1)
        raise ZeroDivisionError

    def work(group):
        with pytest.raises(ZeroDivisionError), group.coalesce() as together:
            fail(together)

    simulate(work, 2, observers=[metrics])
    assert metrics.totals() == {}


def test_a_wrong_call_is_refused_at_once():
    def work(group):
        with group.coalesce() as together:
            good = together.all_reduce(1)
            with pytest.raises(UnsupportedError, match="op='mean' is not defined for int64"):
                together.all_reduce(1, "mean")
            with pytest.raises(UsageError, match="out has shape"):
                together.all_reduce(np.ones(2), out=np.ones(3))
        return int(good.result())

    assert simulate(work, 2) == [2, 2]


def test_parts_that_differ_between_ranks_are_a_mismatch():
    def work(group):
        shapes = [(2, 3), (4,)] if group.rank == 0 else [(4,), (2, 3)]
        try:
            with group.coalesce() as together:
                for shape in shapes:
                    together.all_reduce(np.ones(shape))
        except CollectiveMismatch as error:
            return str(error)
        return ""

    first, second = simulate(work, 2, timeout_s=5)
    assert first == second
    assert "shapes 2x3;4" in first
    assert "shapes 4;2x3" in first


def test_a_wrong_root_is_refused_before_anything_is_sent():
    def work(group):
        with group.coalesce() as together:
            together.all_reduce(np.ones(3))
            with pytest.raises(UsageError, match="root is 9"):
                together.broadcast(np.ones(3), root=9)
        return float(group.all_reduce(1.0))

    assert simulate(work, 2, timeout_s=5) == [2.0, 2.0]
