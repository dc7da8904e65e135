"""Losses: values compared with plain formulas, gradients with central differences."""

import numpy as np
import pytest

from ferro.errors import UsageError
from ferro_strategies.nn import (
    binary_cross_entropy_with_logits,
    cross_entropy,
    l1_loss,
    mse_loss,
    nll_loss,
    smooth_l1_loss,
)


def differences(loss, array, step=1e-6):
    result = np.zeros(array.shape)
    for index in np.ndindex(array.shape):
        value = array[index]
        array[index] = value + step
        above = loss(array)
        array[index] = value - step
        result[index] = (above - loss(array)) / (2 * step)
        array[index] = value
    return result


@pytest.mark.parametrize("shape", [(1, 2), (5, 3), (2, 4, 3)])
def test_cross_entropy(shape):
    rng = np.random.default_rng(0)
    logits, labels = rng.standard_normal(shape), rng.integers(0, shape[-1], shape[:-1])
    before = logits.copy()
    loss, grad = cross_entropy(logits, labels)
    np.testing.assert_array_equal(logits, before)
    rows, flat = logits.reshape(-1, shape[-1]), labels.reshape(-1)
    probability = np.exp(rows) / np.exp(rows).sum(1, keepdims=True)
    assert loss == pytest.approx(-np.log(probability[np.arange(flat.size), flat]).mean())
    numeric = differences(lambda array: cross_entropy(array, labels)[0], logits)
    np.testing.assert_allclose(grad, numeric, atol=1e-8)


def test_cross_entropy_is_stable():
    logits = np.array([[1e4, -1e4, 0.0], [-1e4, 1e4, 0.0]], np.float32)
    loss, grad = cross_entropy(logits, np.array([0, 0]))
    assert loss == pytest.approx(1e4)
    np.testing.assert_allclose(grad, [[0, 0, 0], [-0.5, 0.5, 0]])


@pytest.mark.parametrize("shape", [(4,), (3, 2), ()])
def test_mse(shape):
    rng = np.random.default_rng(0)
    prediction, target = rng.standard_normal(shape), rng.standard_normal(shape)
    prediction, target = np.asarray(prediction), np.asarray(target)
    loss, grad = mse_loss(prediction, target)
    assert loss == pytest.approx(((prediction - target) ** 2).mean())
    numeric = differences(lambda array: mse_loss(array, target)[0], prediction)
    np.testing.assert_allclose(grad, numeric, atol=1e-8)


def test_gradients_keep_the_dtype():
    logits = np.ones((2, 3), np.float32)
    assert cross_entropy(logits, np.array([0, 1], np.uint8))[1].dtype == np.float32
    assert mse_loss(logits, np.zeros((2, 3), np.float64))[1].dtype == np.float32
    assert mse_loss(logits, np.zeros((2, 3), np.int64))[1].dtype == np.float32


def test_empty_batches_cost_nothing():
    loss, grad = cross_entropy(np.zeros((0, 3), np.float32), np.zeros(0, np.int64))
    assert (loss, grad.shape, grad.dtype) == (0.0, (0, 3), np.float32)
    loss, grad = mse_loss(np.zeros((0, 2)), np.zeros((0, 2)))
    assert (loss, grad.shape) == (0.0, (0, 2))


@pytest.mark.parametrize(
    ("labels", "message"),
    [
        (np.zeros(3, int), r"need labels of shape \(2,\), got \(3,\)"),
        (np.zeros((2, 1), int), r"got \(2, 1\)"),
        (np.zeros(2), "must be integers, got float64"),
        (np.array([0, 3]), "from 0 to 2, got 0 to 3"),
        (np.array([-1, 0]), "from 0 to 2, got -1 to 0"),
    ],
)
def test_wrong_labels_are_refused(labels, message):
    with pytest.raises(UsageError, match=message):
        cross_entropy(np.zeros((2, 3)), labels)


def test_mse_does_not_broadcast():
    with pytest.raises(UsageError, match=r"\(4, 1\), target \(4,\)"):
        mse_loss(np.zeros((4, 1)), np.zeros(4))


OPTIONS = {
    "plain": {},
    "ignored": {"ignore_index": 1},
    "smoothed": {"label_smoothing": 0.3},
    "weighted": {"weight": [1.0, 0.0, 3.0]},
    "all": {"ignore_index": 1, "label_smoothing": 0.3, "weight": np.array([1, 2, 3])},
}


@pytest.mark.parametrize("options", OPTIONS.values(), ids=OPTIONS)
@pytest.mark.parametrize("reduction", ["mean", "sum", "none"])
def test_gradients_of_options(options, reduction):
    rng = np.random.default_rng(0)
    logits, labels = rng.standard_normal((2, 3, 3)), [[0, 1, 2], [2, 1, 0]]
    losses = [cross_entropy] if "label_smoothing" in options else [cross_entropy, nll_loss]
    for function in losses:

        def total(array, function=function):
            return np.sum(function(array, labels, reduction=reduction, **options)[0])

        loss, grad = function(logits, labels, reduction=reduction, **options)
        np.testing.assert_allclose(grad, differences(total, logits), atol=1e-8)
        assert np.shape(loss) == ((2, 3) if reduction == "none" else ())
        if "ignore_index" in options:
            assert not grad[:, 1].any()


def test_batches_weigh_by_the_rows_that_count():
    rng = np.random.default_rng(0)
    logits, labels = rng.standard_normal((6, 3)), np.array([0, -100, -100, 2, 1, -100])
    for options in ({}, {"weight": [1.0, 2.0, 0.5]}, {"label_smoothing": 0.1, "weight": [1.0, 2.0, 0.5]}):
        whole, whole_grad = cross_entropy(logits, labels, ignore_index=-100, **options)
        parts = [
            cross_entropy(logits[rows], labels[rows], ignore_index=-100, with_weight=True, **options)
            for rows in (slice(0, 3), slice(3, 6))
        ]
        total = sum(weight for _, _, weight in parts)
        assert sum(loss * weight for loss, _, weight in parts) / total == pytest.approx(whole)
        grads = np.concatenate([grad * weight for _, grad, weight in parts]) / total
        np.testing.assert_allclose(grads, whole_grad)
    assert [weight for _, _, weight in parts] == [1.0, 2.5]


def test_ignored_rows_count_for_nothing_even_where_they_are_not_finite():
    logits = np.array([[1.0, 2.0], [np.nan, np.nan], [np.inf, 0.0]], np.float32)
    with np.errstate(invalid="ignore"):
        loss, grad, weight = cross_entropy(logits, [0, 255, 255], ignore_index=255, with_weight=True)
    alone, alone_grad = cross_entropy(logits[:1], np.array([0], np.uint8))
    assert (loss, weight) == (alone, 1)
    np.testing.assert_array_equal(grad, [alone_grad[0], [0, 0], [0, 0]])
    loss, grad, weight = cross_entropy(logits[:1], [9], ignore_index=9, with_weight=True)
    assert (loss, weight, grad.tolist()) == (0.0, 0, [[0.0, 0.0]])
    loss, grad, weight = nll_loss(logits[:1], np.array([9]), ignore_index=9, with_weight=True)
    assert (loss, weight, grad.tolist()) == (0.0, 0, [[0.0, 0.0]])


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"label_smoothing": 1.5}, "label_smoothing must be from 0 to 1, got 1.5"),
        ({"weight": [1.0, 2.0]}, r"weight must be 3 real numbers, one for each class, got float64 \(2,\)"),
        ({"reduction": "max"}, 'reduction must be "mean", "sum" or "none", got \'max\''),
        ({"reduction": "sum", "with_weight": True}, 'it needs reduction="mean"'),
        ({"ignore_index": 1}, "from 0 to 2, got 0 to 7"),
    ],
)
def test_wrong_options_are_refused(options, message):
    with pytest.raises(UsageError, match=message):
        cross_entropy(np.zeros((3, 3)), [0, 1, 7 if "ignore_index" in options else 2], **options)


@pytest.mark.parametrize("reduction", ["mean", "sum", "none"])
@pytest.mark.parametrize("function", [mse_loss, l1_loss, smooth_l1_loss, binary_cross_entropy_with_logits])
def test_losses_by_element(function, reduction):
    rng = np.random.default_rng(0)
    prediction, target = 2 * rng.standard_normal((3, 2)), rng.random((3, 2)).tolist()
    options = {"pos_weight": [2.0, 0.5]} if function is binary_cross_entropy_with_logits else {}
    loss, grad = function(prediction, target, reduction=reduction, **options)
    assert np.shape(loss) == ((3, 2) if reduction == "none" else ())
    numeric = differences(lambda array: np.sum(function(array, target, reduction=reduction, **options)[0]), prediction)
    np.testing.assert_allclose(grad, numeric, atol=1e-8)
    loss, grad = function(np.zeros((0, 2)), np.zeros((0, 2)), reduction=reduction, **options)
    assert grad.shape == (0, 2)
    assert np.sum(loss) == 0


def test_values_of_losses_by_element():
    assert l1_loss(np.array([1.0, -3.0]), [0, 0])[0] == 2
    assert smooth_l1_loss(np.array([1.0, -3.0]), [0, 0], beta=2.0)[0] == pytest.approx((0.25 + 2) / 2)
    logits = np.array([-800.0, 800.0, 0.0, -50.0], np.float32)
    loss, grad = binary_cross_entropy_with_logits(logits, [True, True, False, False], reduction="none")
    np.testing.assert_allclose(loss, [800, 0, np.log(2), np.exp(-50)], rtol=1e-6)
    np.testing.assert_allclose(grad, [-1, 0, 0.5, np.exp(-50)], rtol=1e-6)


def test_mse_of_complex_numbers():
    prediction = np.array([1 + 1j, 2 - 1j], np.complex64)
    loss, grad = mse_loss(prediction, [0, 1])
    assert loss == 2
    np.testing.assert_array_equal(grad, np.array([1 + 1j, 1 - 1j], np.complex64))
    with pytest.raises(UsageError, match="a complex target needs a complex prediction, got float32"):
        mse_loss(np.zeros(2, np.float32), prediction)


def test_wrong_targets_are_refused():
    logits = np.zeros((2, 2), np.float32)
    with pytest.raises(UsageError, match=r"targets must be from 0 to 1, got -1.0 to 1.0"):
        binary_cross_entropy_with_logits(logits, [[1, -1], [0, 1]])
    with pytest.raises(UsageError, match="pos_weight must be real numbers that broadcast"):
        binary_cross_entropy_with_logits(logits, logits, pos_weight=[1, 2, 3])
    with pytest.raises(UsageError, match="target must be of numbers, got <U1"):
        mse_loss(logits, [["a", "b"], ["c", "d"]])
    with pytest.raises(UsageError, match="beta must be greater than 0, got 0"):
        smooth_l1_loss(logits, logits, beta=0)
