"""Layers in half precision: results have its dtype, and are close to those in float64."""

import ml_dtypes
import numpy as np
import pytest

from ferro_strategies.nn import (
    GELU,
    AdaptiveAvgPool2d,
    AdaptiveMaxPool2d,
    Attention,
    AvgPool2d,
    BatchNorm,
    Conv1d,
    Conv2d,
    ConvTranspose2d,
    Dropout,
    Embedding,
    Flatten,
    GroupNorm,
    LayerNorm,
    Linear,
    MaxPool2d,
    ReLU,
    Residual,
    RMSNorm,
    Sequential,
    Sigmoid,
    SiLU,
    Softmax,
    SwiGLU,
    Tanh,
    Unembedding,
    cross_entropy,
    mse_loss,
)
from ferro_strategies.nn.attention import attend
from ferro_strategies.optim import SGD, LossScaler

LAYERS = {
    "linear": (lambda t: Linear(6, 4, dtype=t, rng=1), (5, 6)),
    "conv": (lambda t: Conv2d(2, 3, 3, padding=1, dtype=t, rng=1), (2, 2, 5, 4)),
    "batchnorm": (lambda t: BatchNorm(3, dtype=t), (8, 3, 4)),
    "layernorm": (lambda t: LayerNorm(6, dtype=t), (4, 6)),
    "rmsnorm": (lambda t: RMSNorm(6, dtype=t), (4, 6)),
    "groupnorm": (lambda t: GroupNorm(2, 4, dtype=t), (4, 4, 5)),
    "grouped conv": (lambda t: Conv1d(2, 4, 3, padding=1, groups=2, dtype=t, rng=1), (2, 2, 5)),
    "transposed conv": (lambda t: ConvTranspose2d(2, 3, 3, 2, dtype=t, rng=1), (2, 2, 3, 4)),
    "rotary attention": (lambda t: Attention(8, 2, num_kv_heads=1, rotary_base=50.0, dtype=t, rng=1), (2, 5, 8)),
    "more activations": (lambda t: Sequential(SiLU(), Sigmoid(), Tanh(), SwiGLU(), Softmax()), (4, 6)),
    "more pooling": (
        lambda t: Sequential(AvgPool2d(2, 1, 1), AdaptiveAvgPool2d(3), AdaptiveMaxPool2d(2)),
        (2, 3, 4, 4),
    ),
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


# Sums of so many ones stop at 2048 in float16, and at 256 in bfloat16, when each addition is rounded.
ROWS = 5000


def summed(layer, x, dtype):
    """Return the layer's parameters' gradients, and the input's, for a gradient of ones."""
    y, pullback = layer.vjp(x)
    grad_x = pullback(np.ones(y.shape, dtype))
    return [*(parameter.grad for parameter in layer.parameters()), grad_x]


@pytest.mark.parametrize("dtype", [np.float16, ml_dtypes.bfloat16])
def test_long_sums_do_not_saturate(dtype):
    whole = dtype(ROWS)
    rows, images = np.ones((ROWS, 2), dtype), np.ones((ROWS // 50, 1, 5, 10), dtype)
    assert (summed(Linear(2, 2, dtype=dtype), rows, dtype)[1] == whole).all()
    assert (summed(Conv2d(1, 2, 1, dtype=dtype), images, dtype)[1] == whole).all()
    assert (summed(ConvTranspose2d(1, 2, 1, dtype=dtype), images, dtype)[1] == whole).all()
    assert (summed(Embedding(2, 2, dtype=dtype), np.zeros(ROWS, int), dtype)[0][0] == whole).all()
    assert (summed(LayerNorm(2, dtype=dtype), rows, dtype)[1] == whole).all()
    assert (summed(BatchNorm(2, dtype=dtype), rows, dtype)[1] == whole).all()
    assert (summed(GroupNorm(1, 1, dtype=dtype), images, dtype)[1] == whole).all()
    assert (summed(MaxPool2d(2, 1), np.zeros((1, 1, 70, 70), dtype), dtype)[-1].sum(dtype=float)) == 69 * 69
    assert (AvgPool2d((50, 100))(np.ones((1, 1, 50, 100), dtype)) == 1).all()
    assert (AdaptiveAvgPool2d(1)(np.ones((1, 1, 50, 100), dtype)) == 1).all()
    assert summed(Unembedding(Embedding(2, 1, dtype=dtype)), rows[:, :1], dtype)[0][0, 0] == whole


def test_long_sums_of_float32_keep_their_digits():
    tenth = np.float32(0.1)
    rows = np.full((400_000, 1), tenth)
    exact = 400_000 * float(tenth)
    for layer in (Linear(1, 1), BatchNorm(1), Embedding(1, 1)):
        x = np.zeros(len(rows), int) if isinstance(layer, Embedding) else rows
        layer.vjp(x)[1](rows)
        sums = layer.weight.grad if isinstance(layer, Embedding) else layer.bias.grad
        assert float(sums.ravel()[0]) == pytest.approx(exact, rel=1e-6)
    assert mse_loss(rows, np.zeros_like(rows))[0] == pytest.approx(float(tenth) ** 2, rel=1e-7)
    loss, _ = cross_entropy(np.zeros((400_000, 2), np.float32), np.zeros(400_000, int))
    assert loss == pytest.approx(np.log(2), rel=1e-7)


@pytest.mark.parametrize("dtype", [np.float16, ml_dtypes.bfloat16])
def test_dropout_does_not_round_its_scale(dtype):
    x = np.random.default_rng(0).standard_normal(1000).astype(dtype)
    y = Dropout(0.1, rng=1)(x)
    np.testing.assert_array_equal(y[y != 0], (x.astype(np.float32) / np.float32(0.9)).astype(dtype)[y != 0])
    assert y.dtype == dtype


@pytest.mark.parametrize("dtype", [np.float16, ml_dtypes.bfloat16])
def test_running_statistics_of_half_precision_are_float32(dtype):
    norm = BatchNorm(1, momentum=1.0, dtype=dtype)
    norm(np.array([[-30000.0], [30000.0]], dtype))
    assert norm.running_mean.data.dtype == norm.running_var.data.dtype == np.float32
    assert norm.running_var.data[0] == pytest.approx(1.8e9, rel=0.01)
    assert np.abs(norm.eval()(np.array([[30000.0]], dtype)).astype(float) - 2**-0.5) < 0.01
    wide = BatchNorm(2)  # of float32, as under FSDP that keeps it so
    y, pullback = wide.vjp(np.array([[1, 2], [3, 4]], dtype))
    assert y.dtype == pullback(y).dtype == dtype
    assert wide.weight.grad.dtype == np.float32


@pytest.mark.parametrize("spread", [1, 100])
def test_attention_of_float16_computes_its_softmax_from_float32(spread):
    rng = np.random.default_rng(0)
    q, k, v = (rng.standard_normal((2, 16, 32)) * s for s in (spread**0.5, spread**0.5, 1))
    q, k, v = (a.astype(np.float16) for a in (q, k, v))
    y, _ = attend(q, k, v, 4, causal=True)
    exact, _ = attend(*(a.astype(np.float64) for a in (q, k, v)), 4, causal=True)
    assert np.abs(y - exact).max() <= 2**-10 * np.abs(exact).max()
    big = np.full((1, 2, 64), 100, np.float16)
    assert (attend(big, big, np.ones_like(big), 1, causal=False)[0] == 1).all()


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
