"""clip_grad_norm: the common norm of all gradients."""

import math

import ml_dtypes
import numpy as np
import pytest

import ferro
from ferro_strategies.nn import Parameter, Split
from ferro_strategies.optim import clip_grad_norm


def parameters(*grads):
    made = [Parameter(np.zeros_like(grad)) for grad in grads]
    for parameter, grad in zip(made, grads, strict=True):
        parameter.grad = grad
    return made


@pytest.mark.parametrize("dtype", [np.float64, np.float32, np.float16, ml_dtypes.bfloat16])
def test_long_gradients_are_scaled_together(dtype):
    made = [*parameters(np.array([3.0, 0.0], dtype), np.array([[4.0]], dtype)), Parameter(np.ones(3))]
    assert clip_grad_norm(made, 2.5) == 5.0
    np.testing.assert_array_equal(made[0].grad, np.array([1.5, 0.0], dtype))
    np.testing.assert_array_equal(made[1].grad, np.array([[2.0]], dtype))
    assert made[0].grad.dtype == np.promote_types(dtype, np.float32)
    assert made[2].grad is None


def test_short_gradients_are_left_as_they_are():
    made = parameters(np.array([0.3, 0.4]))
    assert clip_grad_norm(made, 0.51) == pytest.approx(0.5)
    np.testing.assert_array_equal(made[0].grad, [0.3, 0.4])
    assert clip_grad_norm([], 1.0) == 0.0


def test_the_norm_is_computed_in_double_precision():
    many = np.full(300_001, 1e-3, np.float32)
    expected = float(np.float32(1e-3)) * math.sqrt(many.size)
    assert clip_grad_norm(parameters(many), 10.0) == pytest.approx(expected, rel=1e-12)
    assert clip_grad_norm(parameters(np.array([1e30], np.float32)), 1e31) == pytest.approx(1e30)


@pytest.mark.parametrize("value", [np.inf, np.nan])
def test_a_norm_that_is_not_finite_changes_nothing(value):
    made = parameters(np.array([1.0, value]))
    assert not math.isfinite(clip_grad_norm(made, 0.5))
    np.testing.assert_array_equal(made[0].grad, [1.0, value])


@pytest.mark.parametrize("max_norm", [0.0, -1.0, math.nan])
def test_a_norm_must_be_positive(max_norm):
    with pytest.raises(ferro.UsageError, match="max_norm must be above 0"):
        clip_grad_norm([], max_norm)


def test_pieces_on_other_ranks_count_and_what_all_have_counts_once():
    """The whole: a row of 8 split over pairs, one of 3 over pairs and halves, one nowhere."""
    row, block, shared = np.arange(8.0), np.arange(4.0), np.array([5.0])
    norm = math.sqrt(sum(float(np.vdot(each, each)) for each in (row, block, shared)))

    def run(group):
        pair = group.split(group.rank // 2)
        half = group.split(group.rank % 2)
        made = parameters(row[pair.rank :: 2], block[2 * half.rank + pair.rank :][:1].copy(), shared.copy())
        made[0].splits = (Split(group=pair, dim=0),)
        made[1].splits = (Split(group=pair, dim=0), Split(group=half, dim=0))
        if group.rank == 3:
            made[1].grad = None  # counts as zero, and the others do not wait for it
        assert clip_grad_norm(made, 1.0) == pytest.approx(expected, rel=1e-15)
        np.testing.assert_allclose(made[0].grad, row[pair.rank :: 2] / expected)
        np.testing.assert_allclose(made[2].grad, shared / expected)

    expected = math.sqrt(norm**2 - block[3] ** 2)
    ferro.simulate(run, 4, timeout_s=10, run_timeout_s=30)
