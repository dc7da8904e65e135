"""Layers of random sizes and options beside torch's. FERRO_FUZZ_RUNS sets the number of layers of each kind."""

import os

import ml_dtypes
import numpy as np
import pytest

from ferro_strategies import nn

torch = pytest.importorskip("torch")
F = torch.nn.functional

RUNS = int(os.environ.get("FERRO_FUZZ_RUNS", "15"))
DTYPES = (np.float64, np.float32, np.float16, ml_dtypes.bfloat16)


def integer(rng, low, high):
    return int(rng.integers(low, high + 1))


def pair(rng, low, high):
    return integer(rng, low, high), integer(rng, low, high)


def conv2d(rng, dtype):
    groups, kernel = integer(rng, 1, 3), pair(rng, 1, 3)
    channels, out = groups * integer(rng, 1, 3), groups * integer(rng, 1, 3)
    options = {"stride": pair(rng, 1, 3), "padding": pair(rng, 0, 2), "dilation": pair(rng, 1, 2), "groups": groups}
    layer = nn.Conv2d(channels, out, kernel, bias=bool(rng.random() < 0.5), dtype=dtype, **options)
    shape = (integer(rng, 0, 3), channels, integer(rng, 5, 9), integer(rng, 5, 9))
    return layer, shape, lambda p, x: F.conv2d(x, p["weight"], p.get("bias"), **options)


def conv1d(rng, dtype):
    groups = integer(rng, 1, 3)
    channels, out = groups * integer(rng, 1, 3), groups * integer(rng, 1, 3)
    options = {
        "stride": integer(rng, 1, 3),
        "padding": integer(rng, 0, 2),
        "dilation": integer(rng, 1, 3),
        "groups": groups,
    }
    layer = nn.Conv1d(channels, out, integer(rng, 1, 3), bias=bool(rng.random() < 0.5), dtype=dtype, **options)
    shape = (integer(rng, 0, 3), channels, integer(rng, 7, 12))
    return layer, shape, lambda p, x: F.conv1d(x, p["weight"], p.get("bias"), **options)


def transposed(rng, dtype):
    groups, stride = integer(rng, 1, 3), pair(rng, 1, 3)
    channels, out = groups * integer(rng, 1, 3), groups * integer(rng, 1, 3)
    options = {
        "stride": stride,
        "padding": pair(rng, 0, 1),
        "output_padding": tuple(integer(rng, 0, step - 1) for step in stride),
        "groups": groups,
        "dilation": pair(rng, 1, 2),
    }
    layer = nn.ConvTranspose2d(channels, out, pair(rng, 2, 3), bias=bool(rng.random() < 0.5), dtype=dtype, **options)
    shape = (integer(rng, 0, 3), channels, integer(rng, 2, 4), integer(rng, 2, 4))
    return layer, shape, lambda p, x: F.conv_transpose2d(x, p["weight"], p.get("bias"), **options)


def pooling(rng, dtype):
    kernel, stride, dilation = pair(rng, 1, 3), pair(rng, 1, 3), pair(rng, 1, 2)
    padding = tuple(integer(rng, 0, size // 2) for size in kernel)
    shape = (integer(rng, 0, 2), integer(rng, 1, 2), integer(rng, 5, 8), integer(rng, 5, 8))
    if rng.random() < 0.5:
        layer = nn.MaxPool2d(kernel, stride, padding, dilation)
        return layer, shape, lambda p, x: F.max_pool2d(x, kernel, stride, padding, dilation)
    counted = bool(rng.random() < 0.5)
    layer = nn.AvgPool2d(kernel, stride, padding, count_include_pad=counted)
    return layer, shape, lambda p, x: F.avg_pool2d(x, kernel, stride, padding, count_include_pad=counted)


def adaptive(rng, dtype):
    size = pair(rng, 1, 5)
    shape = (integer(rng, 1, 2), integer(rng, 1, 2), integer(rng, 1, 8), integer(rng, 1, 8))
    if rng.random() < 0.5:
        return nn.AdaptiveMaxPool2d(size), shape, lambda p, x: F.adaptive_max_pool2d(x, size)
    return nn.AdaptiveAvgPool2d(size), shape, lambda p, x: F.adaptive_avg_pool2d(x, size)


def norm(rng, dtype):
    trailing = tuple(integer(rng, 2, 4) for _ in range(integer(rng, 1, 2)))
    shape, affine = (integer(rng, 1, 4), *trailing), bool(rng.random() < 0.7)
    eps = float(rng.choice([1e-5, 1e-2]))
    kind = integer(rng, 0, 2)
    if kind == 0:
        layer = nn.LayerNorm(trailing, eps, affine, bool(rng.random() < 0.5), dtype=dtype)
        return layer, shape, lambda p, x: F.layer_norm(x, trailing, p.get("weight"), p.get("bias"), eps)
    if kind == 1:
        layer = nn.RMSNorm(trailing, eps, affine, dtype=dtype)
        return layer, shape, lambda p, x: F.rms_norm(x, trailing, p.get("weight"), eps)
    groups = integer(rng, 1, 3)
    channels = groups * integer(rng, 2, 3)
    layer = nn.GroupNorm(groups, channels, eps, affine, dtype=dtype)
    shape = (integer(rng, 1, 4), channels, *trailing)
    return layer, shape, lambda p, x: F.group_norm(x, groups, p.get("weight"), p.get("bias"), eps)


@pytest.mark.parametrize("kind", [conv2d, conv1d, transposed, pooling, adaptive, norm])
def test_random_layers(kind):
    for seed in range(RUNS):
        rng = np.random.default_rng(seed)
        dtype = DTYPES[seed % len(DTYPES)]
        layer, shape, forward = kind(rng, dtype)
        for parameter in layer.parameters():
            parameter.data[...] = rng.standard_normal(parameter.data.shape)
        x = rng.standard_normal(shape).astype(dtype)
        if seed % 3 == 0:
            x = x.T.copy().T  # another memory layout
        y, pullback = layer.vjp(x)
        grad_y = rng.standard_normal(y.shape).astype(dtype)
        grad_x = pullback(grad_y)
        p = {
            name: torch.tensor(parameter.data.astype(np.float64), requires_grad=True)
            for name, parameter in layer.named_parameters()
        }
        tx = torch.tensor(x.astype(np.float64), requires_grad=True)
        expected = forward(p, tx)
        expected.backward(torch.tensor(grad_y.astype(np.float64)))
        pairs = [(y, expected.detach()), (grad_x, tx.grad)]
        pairs += [(parameter.grad, p[name].grad) for name, parameter in layer.named_parameters()]
        eps = float(ml_dtypes.finfo(dtype).eps)
        # Where a norm's variance is near eps, its gradient is a small difference of large numbers.
        units = {np.float64: 1000, np.float32: 100}.get(dtype, 2 if kind is norm else 0.75)
        for number, (ours, theirs) in enumerate(pairs):
            # The gradients of parameters in half precision are float32.
            assert ours.dtype == (dtype if number < 2 else np.promote_types(dtype, np.float32)), (seed, layer)
            assert ours.shape == tuple(theirs.shape), (seed, layer)
            if ours.size:
                largest = max(float(theirs.abs().max()), 1e-2)
                error = np.abs(ours.astype(np.float64) - theirs.numpy()).max() / largest / eps
                assert error <= units, f"seed {seed}, {layer}, array {number}: {error} units"
