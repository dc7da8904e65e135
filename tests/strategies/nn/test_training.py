"""Training end to end in one process: layers, losses and optimizers together."""

import numpy as np
import pytest

from ferro_strategies.nn import (
    GELU,
    BatchNorm,
    Conv2d,
    Embedding,
    Flatten,
    LayerNorm,
    Linear,
    MaxPool2d,
    ReLU,
    Residual,
    Sequential,
    cross_entropy,
    mse_loss,
)
from ferro_strategies.optim import SGD, AdamW


def train(model, optimizer, loss, x, target, steps):
    for _ in range(steps):
        y, pullback = model.vjp(x)
        value, grad = loss(y, target)
        pullback(grad)
        optimizer.step()
        optimizer.zero_grad()
    return value


def test_a_small_network_learns_xor():
    x = np.array([[0, 0], [0, 1], [1, 0], [1, 1]], np.float32)
    labels = np.array([0, 1, 1, 0])
    model = Sequential(Linear(2, 16, rng=0), ReLU(), Linear(16, 2, rng=1))
    optimizer = SGD(model.parameters(), lr=0.3, momentum=0.9)
    assert train(model, optimizer, cross_entropy, x, labels, 200) < 0.01
    np.testing.assert_array_equal(model(x).argmax(axis=1), labels)


def test_a_convolutional_network_tells_bars_apart():
    rng = np.random.default_rng(0)
    labels = rng.integers(0, 2, 32)
    images = rng.normal(0, 0.1, (32, 1, 8, 8)).astype(np.float32)
    for image, label, place in zip(images[:, 0], labels, rng.integers(0, 8, 32), strict=True):
        image[place if label else slice(None), slice(None) if label else place] += 1
    model = Sequential(
        Conv2d(1, 4, 3, padding=1, bias=False, rng=1),
        BatchNorm(4),
        ReLU(),
        MaxPool2d(2),
        Flatten(),
        Linear(64, 2, rng=2),
    )
    optimizer = AdamW(model.parameters(), lr=0.01)
    assert train(model, optimizer, cross_entropy, images, labels, 60) < 0.05
    model.eval()
    np.testing.assert_array_equal(model(images).argmax(axis=1), labels)


def test_an_embedding_network_learns_a_table():
    indices, target = np.arange(5), np.array([[3.0], [-1.0], [2.0], [0.0], [1.0]], np.float32)
    model = Sequential(
        Embedding(5, 8, rng=0), Residual(Sequential(LayerNorm(8), Linear(8, 8, rng=1), GELU())), Linear(8, 1, rng=2)
    )
    optimizer = AdamW(model.parameters(), lr=0.02, weight_decay=0.0)
    assert train(model, optimizer, mse_loss, indices, target, 200) < 1e-3


@pytest.mark.parametrize("parts", [1, 2, 4])
def test_microbatches_give_the_gradient_of_the_batch(parts):
    rng = np.random.default_rng(0)
    x, target = rng.standard_normal((8, 3)), rng.standard_normal((8, 2))
    model = Sequential(Linear(3, 4, dtype=x.dtype, rng=1), ReLU(), Linear(4, 2, dtype=x.dtype))
    _, grad = mse_loss(model(x), target)
    model.vjp(x)[1](grad)
    whole = [parameter.grad.copy() for parameter in model.parameters()]
    model.zero_grad()
    pullbacks = [model.vjp(part)[1] for part in np.split(x, parts)]
    for pullback, part in zip(pullbacks, np.split(grad, parts), strict=True):
        pullback(part)
    for parameter, expected in zip(model.parameters(), whole, strict=True):
        np.testing.assert_allclose(parameter.grad, expected, atol=1e-12)
