"""Layers in half precision: results have its dtype, and are close to those in float64."""

import ml_dtypes
import numpy as np
import pytest

from ferro_strategies.nn import (
    GELU,
    Attention,
    BatchNorm,
    Conv2d,
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
from ferro_strategies.optim import SGD, LossScaler

LAYERS = {
    "linear": (lambda t: Linear(6, 4, dtype=t, rng=1), (5, 6)),
    "conv": (lambda t: Conv2d(2, 3, 3, padding=1, dtype=t, rng=1), (2, 2, 5, 4)),
    "batchnorm": (lambda t: BatchNorm(3, dtype=t), (8, 3, 4)),
    "layernorm": (lambda t: LayerNorm(6, dtype=t), (4, 6)),
    "attention": (lambda t: Attention(8, 2, dtype=t, rng=1), (2, 5, 8)),
    "activations": (lambda t: Sequential(ReLU(), GELU()), (4, 6)),
    "pooling": (lambda t: Sequential(MaxPool2d(2), Flatten()), (2, 3, 4, 4)),
    "residual": (lambda t: Residual(Linear(6, 6, dtype=t, rng=1)), (5, 6)),
}


def passes(make, shape, dtype):
    """Compute the output and the gradients of input and parameters."""
    layer = make(dtype)
    rng = np.random.default_rng(0)
    y, pullback = layer.vjp(rng.standard_normal(shape).astype(dtype))
    grad_x = pullback(rng.standard_normal(y.shape).astype(dtype))
    return [y, grad_x, *(parameter.grad for parameter in layer.parameters())]


@pytest.mark.parametrize("dtype", [np.float16, ml_dtypes.bfloat16])
@pytest.mark.parametrize("case", LAYERS)
def test_layers_work_in_half_precision(case, dtype):
    make, shape = LAYERS[case]
    halves, exacts = passes(make, shape, dtype), passes(make, shape, np.float64)
    # Against the largest of all, for some gradients are zero but for rounding.
    error = 16 * float(ml_dtypes.finfo(dtype).eps) * max(np.abs(exact).max() for exact in exacts)
    for index, (half, exact) in enumerate(zip(halves, exacts, strict=True)):
        assert half.dtype == (dtype if index < 2 else np.float32)  # parameters' gradients add up in float32
        assert np.abs(half.astype(np.float64) - exact).max() <= error


@pytest.mark.parametrize("dtype", [np.float16, ml_dtypes.bfloat16])
def test_losses_work_in_half_precision(dtype):
    logits = np.random.default_rng(0).standard_normal((6, 4))
    labels = np.array([0, 3, 2, 1, 1, 0])
    for loss_of, target in ((cross_entropy, labels), (mse_loss, logits[::-1])):
        loss, grad = loss_of(logits.astype(dtype), target)
        exact, exact_grad = loss_of(logits, target)
        error = 8 * float(ml_dtypes.finfo(dtype).eps)
        assert grad.dtype == dtype
        assert loss == pytest.approx(exact, rel=error)
        assert np.abs(grad.astype(np.float64) - exact_grad).max() <= error


def test_products_that_overflow_are_infinite_without_a_warning():
    layer = Linear(2, 1, bias=False, dtype=np.float16, rng=0)
    layer.weight.data[...] = 60000
    y, pullback = layer.vjp(np.full((1, 2), 2, np.float16))
    assert np.isinf(y).all()
    assert np.isinf(pullback(np.full((1, 1), 2, np.float16))).all()


def test_gradients_may_overflow_without_a_warning():
    """A step that a LossScaler skips gives no warning; warnings are errors here."""
    half = {"dtype": np.float16}
    block = Residual(Sequential(LayerNorm(8, **half), Attention(8, 2, rng=1, **half), GELU()))
    model = Sequential(block, Linear(8, 4, rng=2, **half), ReLU())
    optimizer, scaler = SGD(model.parameters(), lr=0.1), LossScaler(initial_scale=2.0**100)
    x = np.random.default_rng(0).standard_normal((2, 5, 8)).astype(np.float16)
    y, pullback = model.vjp(x)
    pullback(scaler.scale(mse_loss(y, np.zeros_like(y))[1]))
    assert not scaler.step(optimizer)


def test_overflow_in_wider_types_is_told():
    model = Sequential(Linear(4, 4, bias=True, rng=0))
    y, pullback = model.vjp(np.ones((2, 4), np.float32))
    with pytest.warns(RuntimeWarning, match="overflow"):
        pullback(np.full_like(y, 3e38))
