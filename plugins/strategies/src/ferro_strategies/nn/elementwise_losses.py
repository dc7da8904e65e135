"""Losses that compare element by element, each with its gradient: mse, l1, smooth l1, and binary cross entropy."""

from __future__ import annotations

from typing import Literal, TypeAlias, overload

import numpy as np
import numpy.typing as npt

from ferro.errors import UsageError

from .activations import sigmoid
from .arguments import check_real, is_floating
from .arrays import Array, namespace_of, quiet_overflow, wide_dtype
from .sums import row_dots

# How a loss makes one number of those of all elements, or rows; "none" keeps them all.
Reduction: TypeAlias = Literal["mean", "sum", "none"]
_One: TypeAlias = Literal["mean", "sum"]


@overload
def mse_loss(prediction: Array, target: npt.ArrayLike, *, reduction: _One = "mean") -> tuple[float, Array]: ...
@overload
def mse_loss(prediction: Array, target: npt.ArrayLike, *, reduction: Literal["none"]) -> tuple[Array, Array]: ...
def mse_loss(prediction: Array, target: npt.ArrayLike, *, reduction: Reduction = "mean") -> tuple[float | Array, Array]:
    """Compute the mean of abs(prediction - target)**2 over all elements, and its gradient.

    Args:
        prediction: any shape, floating point or complex.
        target: array, or nested list, of the same shape and of any dtype; complex only for a complex prediction.
        reduction: "mean" or "sum" over all elements, or "none" for an array of the elements' losses.

    Returns:
        The loss, and its gradient with respect to `prediction`, of the same shape and dtype. With "none", an element of
        the gradient is that of the element's own loss. The mean of no elements is 0.0, with an empty gradient.

    Raises:
        UsageError: the shapes disagree, or a dtype is none of these.
    """
    _check_prediction("mse_loss", prediction, complex_numbers=True)
    error = _error("mse_loss", prediction, target)
    if reduction == "none" or error.dtype.kind == "c":
        square = error.real**2 + error.imag**2 if error.dtype.kind == "c" else error * error
        return _reduced("mse_loss", square, error * 2, prediction, reduction)
    check_reduction("mse_loss", reduction)
    # Without an array of the squares, this loss of many elements takes half the time.
    row = error.reshape(1, error.size)
    count = max(error.size, 1) if reduction == "mean" else 1
    loss = float(row_dots(row, row)[0]) / count
    error *= 2 / count
    with quiet_overflow(prediction.dtype):
        return loss, error.astype(prediction.dtype, copy=False)


@overload
def l1_loss(prediction: Array, target: npt.ArrayLike, *, reduction: _One = "mean") -> tuple[float, Array]: ...
@overload
def l1_loss(prediction: Array, target: npt.ArrayLike, *, reduction: Literal["none"]) -> tuple[Array, Array]: ...
def l1_loss(prediction: Array, target: npt.ArrayLike, *, reduction: Reduction = "mean") -> tuple[float | Array, Array]:
    """Compute the mean of abs(prediction - target), and its gradient, which is 0 where they are equal.

    Args:
        prediction: any shape, floating point.
        target: see `mse_loss`, as are the result and the errors.
        reduction: see `mse_loss`.
    """
    _check_prediction("l1_loss", prediction)
    error = _error("l1_loss", prediction, target)
    return _reduced("l1_loss", abs(error), namespace_of(prediction).sign(error), prediction, reduction)


@overload
def smooth_l1_loss(
    prediction: Array, target: npt.ArrayLike, *, beta: float = 1.0, reduction: _One = "mean"
) -> tuple[float, Array]: ...
@overload
def smooth_l1_loss(
    prediction: Array, target: npt.ArrayLike, *, beta: float = 1.0, reduction: Literal["none"]
) -> tuple[Array, Array]: ...
def smooth_l1_loss(
    prediction: Array, target: npt.ArrayLike, *, beta: float = 1.0, reduction: Reduction = "mean"
) -> tuple[float | Array, Array]:
    """Compute the mean of e**2 / (2 * beta) where e = abs(prediction - target) < beta, and of e - beta / 2 elsewhere.

    Args:
        prediction: any shape, floating point.
        target: see `mse_loss`, as are the result and the errors.
        beta: the error at which the parabola becomes a line, greater than 0.
        reduction: see `mse_loss`.

    Source: Girshick, "Fast R-CNN", 2015, section 2.3.
    """
    if not beta > 0:
        raise UsageError(f"smooth_l1_loss: beta must be greater than 0, got {beta}. For 0, use l1_loss.")
    _check_prediction("smooth_l1_loss", prediction)
    error = _error("smooth_l1_loss", prediction, target)
    xp, size = namespace_of(prediction), abs(error)
    losses = xp.where(size < beta, error * error / (2 * beta), size - beta / 2)
    return _reduced("smooth_l1_loss", losses, xp.clip(error / beta, -1, 1), prediction, reduction)


@overload
def binary_cross_entropy_with_logits(
    logits: Array, target: npt.ArrayLike, *, pos_weight: npt.ArrayLike | None = None, reduction: _One = "mean"
) -> tuple[float, Array]: ...
@overload
def binary_cross_entropy_with_logits(
    logits: Array, target: npt.ArrayLike, *, pos_weight: npt.ArrayLike | None = None, reduction: Literal["none"]
) -> tuple[Array, Array]: ...
def binary_cross_entropy_with_logits(
    logits: Array, target: npt.ArrayLike, *, pos_weight: npt.ArrayLike | None = None, reduction: Reduction = "mean"
) -> tuple[float | Array, Array]:
    """Compute the mean of -target * log(sigmoid(logits)) - (1 - target) * log(1 - sigmoid(logits)), and its gradient.

    Args:
        logits: any shape, floating point, to which no sigmoid has been applied.
        target: array, or nested list, of the same shape: probabilities from 0 to 1, or booleans.
        pos_weight: factor of the term of `target`, a number or an array that broadcasts to the logits, such as one for
            each class; more than 1 makes misses dearer than false alarms.
        reduction: see `mse_loss`, as is the result.

    Raises:
        UsageError: the shapes disagree, a dtype is none of these, or a target is not from 0 to 1.
    """
    name = "binary_cross_entropy_with_logits"
    _check_prediction(name, logits)
    xp, wide = namespace_of(logits), wide_dtype(logits.dtype)
    x, goal = logits.astype(wide, copy=False), _target(name, logits, target)
    if goal.size and not (goal.min() >= 0 and goal.max() <= 1):
        raise UsageError(f"{name}: targets must be from 0 to 1, got {goal.min()} to {goal.max()}.")
    positive = goal if pos_weight is None else goal * _factor(name, xp.asarray(pos_weight), logits)
    # Each sum below has terms of one sign, so no digits cancel.
    small = xp.log1p(xp.exp(-abs(x)))
    losses = (1 - goal) * (xp.maximum(x, 0) + small) + positive * (xp.maximum(-x, 0) + small)
    grad = (1 - goal) * sigmoid(x) - positive * sigmoid(-x)
    return _reduced(name, losses, grad, logits, reduction)


def _reduced(
    name: str, losses: Array, grads: Array, prediction: Array, reduction: Reduction
) -> tuple[float | Array, Array]:
    """Make the loss and its gradient from those of all elements.

    Args:
        name: the loss, for messages.
        losses: each element's, or row's, loss.
        grads: the gradient of the sum of the losses.
        prediction: the array of whose dtype the gradient is to be.
        reduction: see `mse_loss`.
    """
    check_reduction(name, reduction)
    xp = namespace_of(prediction)
    loss: float | Array = xp.asarray(losses)
    if reduction != "none":
        # A float32 sum of many numbers would have lost digits.
        loss = float(losses.sum(dtype=np.float64))
    if reduction == "mean":
        loss /= max(losses.size, 1)
        grads = grads / max(losses.size, 1)
    with quiet_overflow(prediction.dtype):
        return loss, xp.asarray(grads).astype(prediction.dtype, copy=False)


def check_reduction(name: str, reduction: str) -> None:
    """Refuse a reduction that does not exist.

    Raises:
        UsageError: the message names those that do.
    """
    if reduction not in ("mean", "sum", "none"):
        raise UsageError(f'{name}: reduction must be "mean", "sum" or "none", got {reduction!r}.')


def _check_prediction(name: str, prediction: Array, *, complex_numbers: bool = False) -> None:
    namespace_of(prediction)
    if not (complex_numbers and prediction.dtype.kind == "c"):
        check_real(name, prediction, "the prediction")


def _target(name: str, prediction: Array, target: npt.ArrayLike) -> Array:
    """Check a target, and make it an array of the prediction's wide dtype."""
    if not isinstance(target, int | float | complex | list | tuple | np.generic):
        namespace_of(target)  # type: ignore[arg-type]  # this refuses masked arrays, among others
    goal: Array = namespace_of(prediction).asarray(target)
    if prediction.shape != goal.shape:
        raise UsageError(
            f"{name}: prediction has shape {prediction.shape}, target {goal.shape}; they must be equal. "
            "Reshape one of them; a broadcast would compare each element with all."
        )
    if goal.dtype.kind not in "iub" and not is_floating(goal.dtype):
        if goal.dtype.kind != "c":
            raise UsageError(f"{name}: the target must be of numbers, got {goal.dtype}.")
        if prediction.dtype.kind != "c":
            raise UsageError(f"{name}: a complex target needs a complex prediction, got {prediction.dtype}.")
    return goal.astype(wide_dtype(prediction.dtype), copy=False)


def _error(name: str, prediction: Array, target: npt.ArrayLike) -> Array:
    goal = _target(name, prediction, target)
    error: Array = namespace_of(prediction).asarray(prediction.astype(goal.dtype, copy=False) - goal)
    return error


def _factor(name: str, factor: Array, logits: Array) -> Array:
    """Check a factor that is to be broadcast to the logits."""
    wide = factor.astype(wide_dtype(logits.dtype), copy=False)
    lead = (1,) * (logits.ndim - factor.ndim) + factor.shape
    fits = len(lead) == logits.ndim and all(size in (1, whole) for size, whole in zip(lead, logits.shape, strict=True))
    if not fits or factor.dtype.kind in "cb":
        raise UsageError(
            f"{name}: pos_weight must be real numbers that broadcast to the logits' shape {logits.shape}, "
            f"got {factor.dtype} {factor.shape}."
        )
    return wide
