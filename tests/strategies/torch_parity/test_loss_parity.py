"""Losses beside torch's: values and gradients, in four dtypes, against torch's in float64 on the same numbers."""

import itertools

import ml_dtypes
import numpy as np
import pytest

from ferro_strategies import nn

torch = pytest.importorskip("torch")
F = torch.nn.functional

# Gradients' errors, in units of the dtype's epsilon times the largest element.
UNITS = {np.float64: 64, np.float32: 16, np.float16: 0.75, ml_dtypes.bfloat16: 0.75}
EACH_DTYPE = pytest.mark.parametrize("dtype", UNITS, ids=lambda dtype: np.dtype(dtype).name)
REDUCTIONS = ("mean", "sum", "none")


def compare(ours, prediction, expected, dtype):
    """Compare (loss, grad) with torch's loss, whose gradient is that of its sum."""
    loss, grad = ours
    if not prediction.requires_grad:
        raise AssertionError
    expected.sum().backward()
    np.testing.assert_allclose(loss, expected.detach().numpy(), rtol=1e-12 if dtype == np.float64 else 3e-6, atol=1e-7)
    exact = prediction.grad.numpy()
    assert (grad.dtype, grad.shape) == (dtype, exact.shape)
    error = np.abs(grad.astype(np.float64) - exact).max() / np.abs(exact).max() / float(ml_dtypes.finfo(dtype).eps)
    assert error <= UNITS[dtype], f"{error} units"


def exact(array):
    return torch.tensor(array.astype(np.float64), requires_grad=True)


@EACH_DTYPE
def test_cross_entropy_and_nll(dtype):
    rng = np.random.default_rng(0)
    weights = [0.5, 2.0, 0.0, 1.0, 3.0]
    logits = (2 * rng.standard_normal((3, 4, 5))).astype(dtype)
    labels = rng.integers(0, 5, (3, 4))
    labels[0, 1] = labels[2, 3] = -100
    flat = torch.tensor(labels.reshape(-1))
    for reduction, smoothing, class_weights in itertools.product(REDUCTIONS, (0.0, 0.2), (None, weights)):
        options = {"ignore_index": -100, "reduction": reduction}
        torch_weights = None if class_weights is None else torch.tensor(class_weights, dtype=torch.float64)
        x = exact(logits)
        expected = F.cross_entropy(x.flatten(0, 1), flat, torch_weights, label_smoothing=smoothing, **options)
        ours = nn.cross_entropy(logits, labels, label_smoothing=smoothing, weight=class_weights, **options)
        compare(ours, x, expected.reshape(labels.shape) if reduction == "none" else expected, dtype)
        if not smoothing:
            x = exact(logits)
            expected = F.nll_loss(x.flatten(0, 1), flat, torch_weights, **options)
            ours = nn.nll_loss(logits, labels, weight=class_weights, **options)
            compare(ours, x, expected.reshape(labels.shape) if reduction == "none" else expected, dtype)


@EACH_DTYPE
def test_losses_by_element(dtype):
    rng = np.random.default_rng(0)
    prediction = rng.standard_normal((4, 3)).astype(dtype)
    target = rng.standard_normal((4, 3)).astype(dtype).astype(np.float64)
    share = (rng.random((4, 3)) > 0.4).astype(np.float64)
    positive = torch.tensor([0.5, 1.0, 4.0], dtype=torch.float64)
    cases = {
        nn.mse_loss: (F.mse_loss, target, {}, {}),
        nn.l1_loss: (F.l1_loss, target, {}, {}),
        nn.smooth_l1_loss: (F.smooth_l1_loss, target, {"beta": 0.7}, {"beta": 0.7}),
        nn.binary_cross_entropy_with_logits: (
            F.binary_cross_entropy_with_logits,
            share,
            {"pos_weight": [0.5, 1.0, 4.0]},
            {"pos_weight": positive},
        ),
    }
    for reduction, (ours, (theirs, goal, options, torch_options)) in itertools.product(REDUCTIONS, cases.items()):
        x = exact(prediction)
        expected = theirs(x, torch.tensor(goal), reduction=reduction, **torch_options)
        compare(ours(prediction, goal, reduction=reduction, **options), x, expected, dtype)
