"""Layers beside torch's: outputs and gradients, in four dtypes, against torch's in float64 on the same numbers.

Errors are in units of the dtype's epsilon times the largest element. Rounding the exact result costs half a unit.
"""

import ml_dtypes
import numpy as np
import pytest

from ferro_strategies import nn

torch = pytest.importorskip("torch")
F = torch.nn.functional

# The allowed error of layers that round once; others state theirs.
UNITS = {np.float64: 64, np.float32: 16, np.float16: 0.75, ml_dtypes.bfloat16: 0.75}


def heads(x, count):
    return x.unflatten(-1, (count, -1)).transpose(1, 2)


def rotated(x, base):
    """Turn (B, heads, T, size) as Hugging Face's LLaMA does."""
    half = x.shape[-1] // 2
    rates = base ** (-torch.arange(half, dtype=x.dtype) / half)
    angles = torch.arange(x.shape[2], dtype=x.dtype)[:, None] * torch.cat((rates, rates))
    other = torch.cat((-x[..., half:], x[..., :half]), -1)
    return x * angles.cos() + other * angles.sin()


def attention(layer, p, x, memory, mask, *, causal=False, base=None):
    def map_(name, array):
        return array @ p[f"{name}.weight"] + p[f"{name}.bias"]

    q = heads(map_("query", x), layer.num_heads)
    k, v = (heads(map_(name, memory), layer.num_kv_heads) for name in ("key", "value"))
    if base is not None:
        q, k = rotated(q, base), rotated(k, base)
    allowed = None if mask is None else mask[:, None, None] if mask.ndim == 2 else mask[:, None]
    if causal:
        seen = torch.ones(q.shape[2], k.shape[2], dtype=bool).tril()
        allowed = seen if allowed is None else seen & allowed
    mixed = F.scaled_dot_product_attention(q, k, v, attn_mask=allowed, enable_gqa=True)
    return map_("output", mixed.transpose(1, 2).flatten(2))


def conv(function, *names, **options):
    return lambda layer, p, x: function(x, p["weight"], p.get("bias"), **options)


def batchnorm(layer, p, x):
    return F.batch_norm(x, None, None, p.get("weight"), p.get("bias"), training=True)


def swiglu(layer, p, x):
    gate, up = x.chunk(2, -1)
    return F.silu(gate) * up


MASK = np.array([[True, True, False, True, False], [True, False, True, True, True]])
MASK3 = np.random.default_rng(5).random((2, 5, 5)) < 0.6
MASK3[:, :, 0] = True

LAYERS = {
    "Linear": (lambda t: nn.Linear(7, 5, dtype=t), (6, 7), lambda layer, p, x: x @ p["weight"] + p["bias"]),
    "Unembedding": (
        lambda t: nn.Unembedding(nn.Embedding(5, 7, dtype=t)),
        (6, 7),
        lambda layer, p, x: x @ p["weight"].T,
    ),
    "Conv1d": (
        lambda t: nn.Conv1d(4, 6, 3, 2, 1, dilation=2, groups=2, dtype=t),
        (3, 4, 12),
        conv(F.conv1d, stride=2, padding=1, dilation=2, groups=2),
    ),
    "Conv2d": (
        lambda t: nn.Conv2d(4, 6, (3, 2), (2, 1), (1, 2), dtype=t),
        (2, 4, 6, 5),
        conv(F.conv2d, stride=(2, 1), padding=(1, 2)),
    ),
    "Conv2d, dilated groups": (
        lambda t: nn.Conv2d(4, 8, (2, 3), (1, 2), (2, 0), bias=False, dilation=(3, 2), groups=4, dtype=t),
        (2, 4, 6, 9),
        conv(F.conv2d, stride=(1, 2), padding=(2, 0), dilation=(3, 2), groups=4),
    ),
    "ConvTranspose2d": (
        lambda t: nn.ConvTranspose2d(4, 6, (3, 2), (2, 3), (1, 0), (1, 2), dtype=t),
        (2, 4, 3, 4),
        conv(F.conv_transpose2d, stride=(2, 3), padding=(1, 0), output_padding=(1, 2)),
    ),
    "ConvTranspose2d, dilated groups": (
        lambda t: nn.ConvTranspose2d(4, 6, 3, 2, 1, 0, 2, False, (1, 2), dtype=t),
        (2, 4, 3, 4),
        conv(F.conv_transpose2d, stride=2, padding=1, groups=2, dilation=(1, 2)),
    ),
    "MaxPool2d": (lambda t: nn.MaxPool2d(3, 2, 1), (2, 3, 6, 7), lambda layer, p, x: F.max_pool2d(x, 3, 2, 1)),
    "MaxPool2d, dilated": (
        lambda t: nn.MaxPool2d((2, 3), 1, (0, 1), (3, 2)),
        (2, 3, 6, 7),
        lambda layer, p, x: F.max_pool2d(x, (2, 3), 1, (0, 1), (3, 2)),
    ),
    "AvgPool2d": (lambda t: nn.AvgPool2d(3, 2, 1), (2, 3, 6, 7), lambda layer, p, x: F.avg_pool2d(x, 3, 2, 1)),
    "AvgPool2d, padding not counted": (
        lambda t: nn.AvgPool2d((2, 3), None, (1, 1), count_include_pad=False),
        (2, 3, 6, 7),
        lambda layer, p, x: F.avg_pool2d(x, (2, 3), None, (1, 1), count_include_pad=False),
    ),
    "AdaptiveAvgPool2d": (
        lambda t: nn.AdaptiveAvgPool2d((3, 5)),
        (2, 3, 7, 4),
        lambda layer, p, x: F.adaptive_avg_pool2d(x, (3, 5)),
    ),
    "AdaptiveMaxPool2d": (
        lambda t: nn.AdaptiveMaxPool2d((3, 5)),
        (2, 3, 7, 4),
        lambda layer, p, x: F.adaptive_max_pool2d(x, (3, 5)),
    ),
    "ReLU": (lambda t: nn.ReLU(), (5, 7), lambda layer, p, x: F.relu(x)),
    "GELU": (lambda t: nn.GELU(), (5, 7), lambda layer, p, x: F.gelu(x, approximate="tanh")),
    "SiLU": (lambda t: nn.SiLU(), (5, 7), lambda layer, p, x: F.silu(x)),
    "SwiGLU": (lambda t: nn.SwiGLU(), (5, 8), swiglu),
    "Sigmoid": (lambda t: nn.Sigmoid(), (5, 7), lambda layer, p, x: F.sigmoid(x)),
    "Tanh": (lambda t: nn.Tanh(), (5, 7), lambda layer, p, x: F.tanh(x)),
    "Softmax": (lambda t: nn.Softmax(), (5, 7), lambda layer, p, x: F.softmax(x, -1)),
    "Softmax, dim 1": (lambda t: nn.Softmax(1), (5, 7, 2), lambda layer, p, x: F.softmax(x, 1)),
    "LayerNorm": (
        lambda t: nn.LayerNorm((3, 7), dtype=t),
        (5, 3, 7),
        lambda layer, p, x: F.layer_norm(x, (3, 7), p["weight"], p["bias"]),
    ),
    "LayerNorm, no bias": (
        lambda t: nn.LayerNorm(7, bias=False, dtype=t),
        (5, 3, 7),
        lambda layer, p, x: F.layer_norm(x, (7,), p["weight"]),
    ),
    "LayerNorm, plain": (
        lambda t: nn.LayerNorm(7, 0.1, elementwise_affine=False),
        (5, 3, 7),
        lambda layer, p, x: F.layer_norm(x, (7,), eps=0.1),
    ),
    "RMSNorm": (
        lambda t: nn.RMSNorm((3, 7), dtype=t),
        (5, 3, 7),
        lambda layer, p, x: F.rms_norm(x, (3, 7), p["weight"], 1e-5),
    ),
    "GroupNorm": (
        lambda t: nn.GroupNorm(2, 6, dtype=t),
        (3, 6, 2, 4),
        lambda layer, p, x: F.group_norm(x, 2, p["weight"], p["bias"]),
    ),
    "GroupNorm, rows": (lambda t: nn.GroupNorm(3, 9, affine=False), (4, 9), lambda layer, p, x: F.group_norm(x, 3)),
    "BatchNorm": (lambda t: nn.BatchNorm(3, dtype=t), (4, 3, 2, 5), batchnorm),
    "BatchNorm, eval without statistics": (
        lambda t: nn.BatchNorm(3, affine=False, track_running_stats=False, dtype=t).eval(),
        (6, 3),
        batchnorm,
    ),
}

ATTENTION = {
    "causal": (lambda t: nn.Attention(12, 3, dtype=t), None, {"causal": True}),
    "padding": (lambda t: nn.Attention(12, 3, causal=False, dtype=t), MASK, {}),
    "causal, mask of pairs": (lambda t: nn.Attention(12, 3, dtype=t), MASK3, {"causal": True}),
    "grouped, rotary": (
        lambda t: nn.Attention(12, 6, num_kv_heads=2, rotary_base=100.0, dtype=t),
        None,
        {"causal": True, "base": 100.0},
    ),
    "one head of key and value": (lambda t: nn.Attention(12, 3, causal=False, num_kv_heads=1, dtype=t), MASK3, {}),
}


def scrambled(layer):
    rng = np.random.default_rng(3)
    for parameter in layer.parameters():
        parameter.data[...] = parameter.data + 0.3 * rng.standard_normal(parameter.data.shape)
    return layer


def floats(*shape, dtype, seed=0):
    return np.random.default_rng(seed).standard_normal(shape).astype(dtype)


def exact(array, *, grad=False):
    return torch.tensor(array.astype(np.float64), requires_grad=grad)


def compare(pairs, dtype, units):
    eps = float(ml_dtypes.finfo(dtype).eps)
    for name, (ours, theirs) in pairs.items():
        theirs = theirs.detach().numpy()
        assert ours.dtype == dtype, name
        assert ours.shape == theirs.shape, name
        # The gradient of a key's bias is zero but for rounding.
        scale = np.abs(theirs).max() if name != "key.bias" else np.abs(pairs["key.weight"][0].astype(np.float64)).max()
        error = np.abs(ours.astype(np.float64) - theirs).max() / scale / eps
        assert error <= units, f"{name}: {error} units"


def check(layer, inputs, forward, dtype, units):
    """Compare output and gradients; `inputs` are arrays and perhaps a mask, `forward` takes torch's parameters too."""
    y, pullback = layer.vjp(inputs[0] if len(inputs) == 1 else tuple(inputs))
    grad_y = floats(*y.shape, dtype=dtype, seed=1)
    grads = pullback(grad_y)
    grads = [grads] if len(inputs) == 1 else [grad for grad in grads if grad is not None]
    p = {name: exact(parameter.data, grad=True) for name, parameter in layer.named_parameters()}
    xs = [exact(x, grad=True) for x in inputs if x.dtype != bool]
    expected = forward(layer, p, *xs)
    expected.backward(exact(grad_y))
    pairs = {"output": (y, expected)}
    pairs |= {f"input {i}": (grad, x.grad) for i, (grad, x) in enumerate(zip(grads, xs, strict=True))}
    pairs |= {name: (parameter.grad, p[name].grad) for name, parameter in layer.named_parameters()}
    compare(pairs, dtype, units)


EACH_DTYPE = pytest.mark.parametrize("dtype", UNITS, ids=lambda dtype: np.dtype(dtype).name)


@EACH_DTYPE
@pytest.mark.parametrize("case", LAYERS)
def test_layers(case, dtype):
    make, shape, forward = LAYERS[case]
    check(scrambled(make(dtype)), [floats(*shape, dtype=dtype)], forward, dtype, UNITS[dtype])


# Attention rounds at its five products, and half precision its weights.
@EACH_DTYPE
@pytest.mark.parametrize("case", ATTENTION)
def test_attention(case, dtype):
    make, mask, options = ATTENTION[case]
    x = floats(2, 5, 12, dtype=dtype)
    inputs = [x] if mask is None else [x, mask]
    torch_mask = None if mask is None else torch.tensor(mask)
    check(
        scrambled(make(dtype)),
        inputs,
        lambda layer, p, x: attention(layer, p, x, x, torch_mask, **options),
        dtype,
        4 * UNITS[dtype],
    )


@EACH_DTYPE
@pytest.mark.parametrize("mask", [None, MASK[:, :4]], ids=["whole", "padding"])
def test_cross_attention(mask, dtype):
    layer = scrambled(nn.CrossAttention(12, 6, memory_dim=7, num_kv_heads=3, dtype=dtype))
    inputs = [floats(2, 5, 12, dtype=dtype), floats(2, 4, 7, dtype=dtype, seed=2)]
    torch_mask = None if mask is None else torch.tensor(mask)
    check(
        layer,
        inputs if mask is None else [*inputs, mask],
        lambda layer, p, x, memory: attention(layer, p, x, memory, torch_mask),
        dtype,
        4 * UNITS[dtype],
    )


@EACH_DTYPE
def test_embedding(dtype):
    layer = scrambled(nn.Embedding(5, 3, padding_idx=1, dtype=dtype))
    indices = np.array([[0, 1, 4], [4, 4, 1]])
    y, pullback = layer.vjp(indices)
    grad_y = floats(*y.shape, dtype=dtype)
    assert pullback(grad_y) is None
    weight = exact(layer.weight.data, grad=True)
    expected = F.embedding(torch.tensor(indices), weight, padding_idx=1)
    expected.backward(exact(grad_y))
    compare({"output": (y, expected), "weight": (layer.weight.grad, weight.grad)}, dtype, UNITS[dtype])


@pytest.mark.parametrize("momentum", [0.3, None])
def test_running_statistics(momentum):
    ours, theirs = nn.BatchNorm(3, momentum=momentum), torch.nn.BatchNorm1d(3, momentum=momentum)
    for seed in range(3):
        x = floats(6, 3, dtype=np.float32, seed=seed)
        ours(x)
        theirs(torch.tensor(x))
    for name in ("running_mean", "running_var", "num_batches_tracked"):
        np.testing.assert_allclose(getattr(ours, name).data, getattr(theirs, name).numpy(), rtol=1e-5)


COMPLEX = {
    "Linear": (lambda t: nn.Linear(4, 3, dtype=t), (5, 4)),
    "Conv2d": (lambda t: nn.Conv2d(2, 4, 2, padding=1, groups=2, dtype=t), (2, 2, 3, 4)),
    "ConvTranspose2d": (lambda t: nn.ConvTranspose2d(2, 3, 2, 2, dtype=t), (2, 2, 3, 4)),
    "Unembedding": (lambda t: nn.Unembedding(nn.Embedding(3, 4, dtype=t)), (5, 4)),
}
COMPLEX_FORWARD = {
    "Linear": lambda p, x: x @ p["weight"] + p["bias"],
    "Conv2d": lambda p, x: F.conv2d(x, p["weight"], p["bias"], padding=1, groups=2),
    "ConvTranspose2d": lambda p, x: F.conv_transpose2d(x, p["weight"], p["bias"], stride=2),
    "Unembedding": lambda p, x: x @ p["weight"].T,
}


@pytest.mark.parametrize("case", COMPLEX)
def test_complex_layers(case):
    make, shape = COMPLEX[case]

    def numbers(*shape, seed):
        return floats(*shape, dtype=np.float64, seed=seed) + 1j * floats(*shape, dtype=np.float64, seed=seed + 100)

    layer = make(np.complex128)
    for seed, parameter in enumerate(layer.parameters()):
        parameter.data[...] = numbers(*parameter.data.shape, seed=seed)
    x = numbers(*shape, seed=7)
    y, pullback = layer.vjp(x)
    grad_y = numbers(*y.shape, seed=8)
    grad_x = pullback(grad_y)
    p = {name: torch.tensor(parameter.data, requires_grad=True) for name, parameter in layer.named_parameters()}
    tx = torch.tensor(x, requires_grad=True)
    expected = COMPLEX_FORWARD[case](p, tx)
    expected.backward(torch.tensor(grad_y))
    np.testing.assert_allclose(y, expected.detach().numpy(), rtol=1e-12)
    np.testing.assert_allclose(grad_x, tx.grad.numpy(), rtol=1e-12)
    for name, parameter in layer.named_parameters():
        np.testing.assert_allclose(parameter.grad, p[name].grad.numpy(), rtol=1e-11)
