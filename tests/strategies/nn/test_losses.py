"""Losses: values compared with plain formulas, gradients with central differences."""

import numpy as np
import pytest

from ferro.errors import UsageError
from ferro_strategies.nn import cross_entropy, mse_loss


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
