"""Layers: gradients compared with central differences, values with plain formulas."""

import numpy as np
import pytest

from ferro_strategies.nn import (
    GELU,
    AdaptiveAvgPool2d,
    AdaptiveMaxPool2d,
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
    Module,
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
    check_gradients,
)

F64 = np.float64


def scrambled(module, seed=3):
    """Move parameters off their special first values, such as zeros and ones."""
    rng = np.random.default_rng(seed)
    for parameter in module.parameters():
        parameter.data += 0.3 * rng.standard_normal(parameter.data.shape)
    return module


def floats(*shape, dtype=F64):
    return np.random.default_rng(0).standard_normal(shape).astype(dtype)


CASES = {
    "linear": (lambda t: Linear(3, 4, dtype=t, rng=1), (5, 3)),
    "linear batch 1": (lambda t: Linear(3, 1, dtype=t, rng=1), (1, 3)),
    "linear vector": (lambda t: Linear(3, 2, dtype=t, rng=1), (3,)),
    "linear sequence": (lambda t: Linear(3, 2, dtype=t, rng=1), (2, 4, 3)),
    "linear without bias": (lambda t: Linear(3, 2, bias=False, dtype=t, rng=1), (2, 3)),
    "linear empty": (lambda t: Linear(3, 2, dtype=t, rng=1), (0, 3)),
    "unembedding": (lambda t: Unembedding(Embedding(4, 3, dtype=t, rng=1)), (5, 3)),
    "unembedding sequence": (lambda t: Unembedding(Embedding(4, 3, dtype=t, rng=1)), (2, 4, 3)),
    "conv": (lambda t: Conv2d(2, 3, 3, dtype=t, rng=1), (2, 2, 5, 4)),
    "conv batch 1, one window": (lambda t: Conv2d(1, 2, 3, dtype=t, rng=1), (1, 1, 3, 3)),
    "conv stride, padding": (lambda t: Conv2d(2, 2, 3, stride=2, padding=1, dtype=t, rng=1), (2, 2, 6, 5)),
    "conv uneven": (lambda t: Conv2d(1, 2, (2, 3), stride=(3, 1), padding=(0, 2), dtype=t, rng=1), (2, 1, 6, 3)),
    "conv 1x1 without bias": (lambda t: Conv2d(3, 2, 1, bias=False, dtype=t, rng=1), (2, 3, 2, 2)),
    "conv gaps": (lambda t: Conv2d(1, 1, 2, stride=3, dtype=t, rng=1), (1, 1, 7, 7)),
    "conv empty": (lambda t: Conv2d(1, 2, 2, dtype=t, rng=1), (0, 1, 3, 3)),
    "batchnorm rows": (lambda t: BatchNorm(3, dtype=t), (5, 3)),
    "batchnorm images": (lambda t: BatchNorm(2, dtype=t), (3, 2, 2, 3)),
    "batchnorm batch 1": (lambda t: BatchNorm(2, dtype=t), (1, 2, 4)),
    "batchnorm plain": (lambda t: BatchNorm(3, affine=False, dtype=t), (4, 3)),
    "batchnorm eval": (lambda t: BatchNorm(3, dtype=t).eval(), (4, 3, 2)),
    "batchnorm eval empty": (lambda t: BatchNorm(3, dtype=t).eval(), (0, 3, 2)),
    "layernorm": (lambda t: LayerNorm(4, dtype=t), (3, 4)),
    "layernorm sequence": (lambda t: LayerNorm(4, dtype=t), (2, 3, 4)),
    "layernorm two dims": (lambda t: LayerNorm((3, 2), dtype=t), (2, 3, 2)),
    "relu": (lambda t: ReLU(), (3, 4)),
    "gelu": (lambda t: GELU(), (3, 4)),
    "conv groups, dilation": (
        lambda t: Conv2d(2, 4, (2, 3), (2, 1), (1, 2), dilation=(1, 2), groups=2, dtype=t, rng=1),
        (2, 2, 4, 3),
    ),
    "conv1d": (lambda t: Conv1d(2, 4, 3, 2, 1, dilation=2, groups=2, dtype=t, rng=1), (2, 2, 7)),
    "conv1d empty": (lambda t: Conv1d(2, 2, 3, dtype=t, rng=1), (0, 2, 3)),
    "transposed conv": (
        lambda t: ConvTranspose2d(2, 4, (3, 2), 2, (1, 0), (0, 1), 2, dilation=(1, 2), dtype=t, rng=1),
        (2, 2, 2, 3),
    ),
    "transposed conv without bias": (lambda t: ConvTranspose2d(1, 2, 2, bias=False, dtype=t, rng=1), (1, 1, 2, 2)),
    "transposed conv empty": (lambda t: ConvTranspose2d(1, 2, 2, dtype=t, rng=1), (0, 1, 2, 2)),
    "batchnorm eval without statistics": (lambda t: BatchNorm(3, track_running_stats=False, dtype=t).eval(), (4, 3, 2)),
    "layernorm without bias": (lambda t: LayerNorm([3, 2], bias=False, dtype=t), (2, 3, 2)),
    "layernorm plain": (lambda t: LayerNorm(4, elementwise_affine=False), (3, 4)),
    "rmsnorm": (lambda t: RMSNorm((3, 2), dtype=t), (2, 3, 2)),
    "rmsnorm plain": (lambda t: RMSNorm(4, elementwise_affine=False), (3, 4)),
    "groupnorm": (lambda t: GroupNorm(2, 4, dtype=t), (2, 4, 3)),
    "groupnorm rows, plain": (lambda t: GroupNorm(2, 6, affine=False), (3, 6)),
    "groupnorm empty": (lambda t: GroupNorm(2, 4, dtype=t), (0, 4, 3)),
    "silu": (lambda t: SiLU(), (3, 4)),
    "swiglu": (lambda t: SwiGLU(), (3, 4)),
    "sigmoid": (lambda t: Sigmoid(), (3, 4)),
    "tanh": (lambda t: Tanh(), (3, 4)),
    "softmax": (lambda t: Softmax(), (3, 4)),
    "softmax, another dim": (lambda t: Softmax(1), (2, 3, 2)),
    "maxpool padded, dilated": (lambda t: MaxPool2d(3, 2, 1, 2), (1, 2, 5, 6)),
    "avgpool": (lambda t: AvgPool2d(2), (2, 2, 4, 5)),
    "avgpool padded": (lambda t: AvgPool2d(3, (1, 2), (0, 1), count_include_pad=False), (1, 2, 4, 5)),
    "adaptive avgpool": (lambda t: AdaptiveAvgPool2d((2, 3)), (2, 2, 5, 4)),
    "adaptive avgpool to more": (lambda t: AdaptiveAvgPool2d(3), (1, 2, 2, 1)),
    "adaptive maxpool": (lambda t: AdaptiveMaxPool2d((2, 3)), (2, 2, 5, 4)),
    "adaptive maxpool empty": (lambda t: AdaptiveMaxPool2d(2), (0, 2, 5, 4)),
    "maxpool": (lambda t: MaxPool2d(2), (2, 2, 4, 5)),
    "maxpool overlapping": (lambda t: MaxPool2d(3, 1), (2, 1, 5, 4)),
    "maxpool gaps": (lambda t: MaxPool2d((1, 2), (2, 3)), (1, 2, 4, 6)),
    "flatten": (lambda t: Flatten(), (2, 3, 2)),
    "flatten empty": (lambda t: Flatten(), (0, 3, 2)),
    "dropout eval": (lambda t: Dropout(0.5).eval(), (3, 4)),
    "residual": (lambda t: Residual(Linear(3, 3, dtype=t, rng=1)), (2, 3)),
    "residual of identity": (lambda t: Residual(Sequential()), (2, 3)),
    "network": (
        lambda t: Sequential(
            Conv2d(1, 2, 3, padding=1, dtype=t, rng=1),
            BatchNorm(2, dtype=t),
            GELU(),
            MaxPool2d(2),
            Flatten(),
            Residual(Linear(8, 8, dtype=t, rng=2)),
            LayerNorm(8, dtype=t),
            Linear(8, 3, dtype=t, rng=3),
        ),
        (3, 1, 4, 4),
    ),
}
EACH = pytest.mark.parametrize(("build", "shape"), CASES.values(), ids=CASES)


@EACH
def test_gradients_equal_central_differences(build, shape):
    check_gradients(scrambled(build(F64)), floats(*shape))


@EACH
def test_float32_stays_float32_and_inputs_are_not_modified(build, shape):
    module, x = build(np.float32), floats(*shape, dtype=np.float32)
    y, pullback = module.vjp(x)
    grad_y = floats(*y.shape, dtype=np.float32)
    kept = x.copy(), y.copy(), grad_y.copy()
    grad_x = pullback(grad_y)
    assert (y.dtype, grad_x.dtype) == (np.float32, np.float32)
    assert grad_x.shape == x.shape
    assert all(p.grad.dtype == p.data.dtype == np.float32 for p in module.parameters())
    assert all(b.data.dtype in (np.float32, np.int64) for b in module.buffers())
    for before, after in zip(kept, (x, y, grad_y), strict=True):
        np.testing.assert_array_equal(before, after)


@EACH
def test_arrays_need_not_be_contiguous(build, shape):
    module = scrambled(build(F64))
    x = floats(*shape)
    y, pullback = module.vjp(x)
    grad_y = floats(*y.shape)
    grad_x = pullback(grad_y)
    again, pullback = module.vjp(x.T.copy().T)
    np.testing.assert_allclose(again, y, atol=1e-12)
    np.testing.assert_allclose(pullback(grad_y.T.copy().T), grad_x, atol=1e-12)


@pytest.mark.parametrize("indices", [[[0, 2, 2], [4, 0, 2]], [3], []], ids=["many", "one", "none"])
def test_embedding_gradients(indices):
    x = np.array(indices, np.int32)
    module = Embedding(5, 3, dtype=F64, rng=0)
    np.testing.assert_array_equal(module(x), module.weight.data[x])
    check_gradients(module, x)


class Wrong(Module):
    """A layer whose pullback is wrong by a factor."""

    def vjp(self, x):
        return x * x, lambda grad: grad * x


def test_the_check_itself_finds_wrong_gradients():
    with pytest.raises(AssertionError, match=r"gradient of the input at \(\d, \d\)"):
        check_gradients(Wrong(), floats(2, 3))


def test_convolution_equals_its_definition():
    conv = scrambled(Conv2d(2, 3, (3, 2), stride=(2, 1), padding=(1, 0), dtype=F64, rng=1))
    x = floats(2, 2, 5, 4)
    padded = np.pad(x, ((0, 0), (0, 0), (1, 1), (0, 0)))
    y = conv(x)
    assert y.shape == (2, 3, 3, 3)
    assert y.flags.c_contiguous
    for n, f, i, j in np.ndindex(y.shape):
        window = padded[n, :, 2 * i : 2 * i + 3, j : j + 2]
        expected = np.sum(window * conv.weight.data[f]) + conv.bias.data[f]
        np.testing.assert_allclose(y[n, f, i, j], expected)


def test_maxpool_gives_ties_to_the_first_and_lets_nan_through():
    x = np.array([[[[1.0, 1.0, 5.0, np.nan], [1.0, 0.0, 6.0, 7.0]]]])
    y, pullback = MaxPool2d(2).vjp(x)
    np.testing.assert_array_equal(y, [[[[1, np.nan]]]])
    grad_x = pullback(np.array([[[[2.0, 3.0]]]]))
    np.testing.assert_array_equal(grad_x, [[[[2, 0, 0, 0], [0, 0, 0, 0]]]])


def test_gelu_is_near_the_exact_one():
    # x * Phi(x) at these points
    x = np.array([-3.0, -1.0, 0.0, 0.5, 2.0])
    exact = np.array([-0.00404969, -0.15865525, 0.0, 0.34573123, 1.95449974])
    np.testing.assert_allclose(GELU()(x), exact, atol=5e-4)


def test_layernorm_normalises_each_example():
    x = 5 + 3 * floats(4, 6)
    y = LayerNorm(6, eps=0.0, dtype=F64)(x)
    np.testing.assert_allclose(y, (x - x.mean(1, keepdims=True)) / x.std(1, keepdims=True))


def test_layernorm_does_not_overflow_half_precision():
    x = np.tile(np.array([-300, 300], np.float16), (2, 128))
    y, pullback = LayerNorm(256, dtype=np.float16).vjp(x)
    np.testing.assert_array_equal(y, np.sign(x))
    assert y.dtype == pullback(x).dtype == np.float16


def test_dropout_silences_and_scales_by_its_seed():
    x = np.ones((100, 100), np.float32)
    layer = Dropout(0.25, rng=7)
    y, pullback = layer.vjp(x)
    assert set(np.unique(y)) == {np.float32(0), np.float32(4 / 3)}
    assert abs((y == 0).mean() - 0.25) < 0.02
    np.testing.assert_array_equal(pullback(x), y)  # the same elements, the same scale
    np.testing.assert_array_equal(Dropout(0.25, rng=7)(x), y)
    assert (layer(x) != y).any()
    np.testing.assert_array_equal(layer.eval()(x), x)


def test_dropout_of_everything_is_zero():
    y, pullback = Dropout(1.0, rng=0).vjp(np.ones(3))
    np.testing.assert_array_equal(y, np.zeros(3))
    np.testing.assert_array_equal(pullback(np.ones(3)), np.zeros(3))


@pytest.mark.parametrize(
    "build",
    [lambda rng: Linear(4, 5, rng=rng), lambda rng: Conv2d(2, 3, 3, rng=rng), lambda rng: Embedding(4, 5, rng=rng)],
)
def test_first_values_follow_the_seed(build):
    one, same, other = (build(seed).weight.data for seed in (1, 1, 2))
    np.testing.assert_array_equal(one, same)
    assert (one != other).all()
    generator = np.random.default_rng(1)
    np.testing.assert_array_equal(build(generator).weight.data, one)
    assert (build(generator).weight.data != one).all()  # the generator has moved on


def test_first_weights_keep_within_the_bound_of_he():
    for layer, fan_in in ((Linear(50, 40, rng=0), 50), (Conv2d(6, 40, 3, rng=0), 54)):
        bound = np.sqrt(6 / fan_in)
        largest = np.abs(layer.weight.data).max()
        assert 0.95 * bound < largest <= bound
        assert not layer.bias.data.any()


# --- BatchNorm's running statistics ---


@pytest.mark.parametrize("shape", [(6, 3), (4, 3, 2, 2)])
def test_running_statistics_follow_the_batches(shape):
    norm = BatchNorm(3, momentum=0.3, dtype=F64)
    rng = np.random.default_rng(0)
    mean, var = np.zeros(3), np.ones(3)
    for _ in range(3):
        x = 2 + 3 * rng.standard_normal(shape)
        norm(x)
        rows = np.moveaxis(x, 1, -1).reshape(-1, 3)
        mean = 0.7 * mean + 0.3 * rows.mean(0)
        var = 0.7 * var + 0.3 * rows.var(0, ddof=1)
    np.testing.assert_allclose(norm.running_mean.data, mean)
    np.testing.assert_allclose(norm.running_var.data, var)
    assert norm.num_batches_tracked.data == 3
    norm.eval()
    x = rng.standard_normal(shape)
    expected = (np.moveaxis(x, 1, -1) - mean) / np.sqrt(var + 1e-5)
    np.testing.assert_allclose(np.moveaxis(norm(x), 1, -1), expected)
    np.testing.assert_allclose(norm.running_mean.data, mean)  # evaluation moves nothing
    assert norm.num_batches_tracked.data == 3


def test_without_momentum_statistics_are_averages_of_all_batches():
    norm = BatchNorm(2, momentum=None, dtype=F64)
    batches = np.random.default_rng(0).standard_normal((4, 5, 2))
    for batch in batches:
        norm(batch)
    np.testing.assert_allclose(norm.running_mean.data, batches.mean(1).mean(0))
    np.testing.assert_allclose(norm.running_var.data, batches.var(1, ddof=1).mean(0))


def test_a_training_batch_is_normalised_even_far_from_zero():
    x = (1000 + floats(64, 3, 8, 8)).astype(np.float32)
    y = BatchNorm(3, eps=0.0)(x)
    np.testing.assert_allclose(y.mean((0, 2, 3)), 0, atol=1e-3)
    np.testing.assert_allclose(y.std((0, 2, 3)), 1, atol=1e-3)


def test_an_unembedding_shares_the_table_and_its_gradient():
    table = Embedding(4, 3, dtype=F64, rng=0)
    model = Sequential(table, Unembedding(table))
    assert list(model.state_dict()) == ["layers.0.weight"]
    check_gradients(model, np.array([[0, 2], [2, 3]]))
