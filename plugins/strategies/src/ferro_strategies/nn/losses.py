"""Losses of classes, each with its gradient: cross entropy and negative log-likelihood."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal, overload

import numpy as np
import numpy.typing as npt

from ferro.errors import UsageError

from .arguments import check_real, plain_array
from .arrays import Array, namespace_of, quiet_overflow, wide_dtype
from .elementwise_losses import Reduction, check_reduction
from .sums import row_sums


@overload
def cross_entropy(
    logits: Array,
    labels: npt.ArrayLike,
    *,
    ignore_index: int | None = None,
    label_smoothing: float = 0.0,
    weight: npt.ArrayLike | None = None,
    reduction: Literal["mean", "sum"] = "mean",
    with_weight: Literal[False] = False,
) -> tuple[float, Array]: ...
@overload
def cross_entropy(
    logits: Array,
    labels: npt.ArrayLike,
    *,
    ignore_index: int | None = None,
    label_smoothing: float = 0.0,
    weight: npt.ArrayLike | None = None,
    reduction: Literal["none"],
    with_weight: Literal[False] = False,
) -> tuple[Array, Array]: ...
@overload
def cross_entropy(
    logits: Array,
    labels: npt.ArrayLike,
    *,
    ignore_index: int | None = None,
    label_smoothing: float = 0.0,
    weight: npt.ArrayLike | None = None,
    reduction: Literal["mean"] = "mean",
    with_weight: Literal[True],
) -> tuple[float, Array, float]: ...
def cross_entropy(
    logits: Array,
    labels: npt.ArrayLike,
    *,
    ignore_index: int | None = None,
    label_smoothing: float = 0.0,
    weight: npt.ArrayLike | None = None,
    reduction: Reduction = "mean",
    with_weight: bool = False,
) -> tuple[float | Array, Array] | tuple[float | Array, Array, float]:
    """Compute -log softmax(logits)[label], averaged over the rows, and its gradient.

    Half precision is computed in float32. With class weights, the mean is the sum of the rows' losses, each times the
    weight of its label, over the sum of these weights. With label smoothing s, a row's loss is 1 - s of that of its
    label and s / classes of those of all classes, each times its class's weight.

    Args:
        logits: (..., classes), floating point.
        labels: (...), integers from 0 to classes - 1; an array or a (nested) list.
        ignore_index: a label whose rows count for nothing, such as -100; their gradient is 0.
        label_smoothing: share of the loss that goes to all classes alike, from 0 to 1.
        weight: (classes,), factors of the classes' losses.
        reduction: "mean" or "sum" over the rows, or "none" for an array of the rows' losses.
        with_weight: whether to return the mean's weight, too: the number of rows that are not ignored, or the sum of
            their class weights. A mean over several batches weighs each batch's mean, and gradient, by it.

    Returns:
        The loss, and its gradient with respect to `logits`, of the same shape and dtype. With "none", a row of the
        gradient is that of the row's own loss. A mean without rows is 0.0, with a gradient of zeros and weight 0.

    Raises:
        UsageError: shapes disagree, labels are no integers, a label is out of range, or an option is.

    Source: for label_smoothing, Szegedy et al., "Rethinking the Inception Architecture", 2015, section 7.
    """
    name = "cross_entropy"
    if not 0 <= label_smoothing <= 1:
        raise UsageError(f"{name}: label_smoothing must be from 0 to 1, got {label_smoothing}.")
    kept = _chosen(name, logits, labels, ignore_index, weight)
    xp, classes = namespace_of(logits), max(logits.shape[-1], 1)
    if not kept.labels.size:
        empty = xp.zeros(logits.shape, wide_dtype(logits.dtype))
        return _result(name, logits, kept, empty.sum(axis=-1), empty, reduction, with_weight=with_weight)
    rows = logits.reshape(kept.labels.size, classes)
    # One array holds in turn the logits minus their maximum, exponentials, softmax and gradient.
    grad = rows.astype(wide_dtype(rows.dtype), copy=False) - rows.max(axis=1, keepdims=True)
    at_labels = grad[kept.places]
    smooth: Array | None = None
    if label_smoothing:
        smooth = row_sums(grad if kept.class_weights is None else grad * kept.class_weights)
    xp.exp(grad, out=grad)
    total = row_sums(grad)
    log_total = xp.log(total)
    grad /= total[:, None]
    losses = kept.weighted(log_total - at_labels)
    if smooth is None:
        if kept.row_weights is not None:
            grad *= kept.row_weights[:, None]
        grad[kept.places] -= kept.weighted(1)
    else:
        share = label_smoothing / classes
        every = xp.ones(classes, grad.dtype) if kept.class_weights is None else kept.class_weights
        sum_of_weights = float(every.sum(dtype=np.float64))
        losses = (1 - label_smoothing) * losses + share * (sum_of_weights * log_total - smooth)
        grad *= (xp.asarray(kept.weighted(1 - label_smoothing)) + share * sum_of_weights).reshape(-1, 1)
        grad[kept.places] -= kept.weighted(1 - label_smoothing)
        grad -= share * every
    return _result(name, logits, kept, losses, grad, reduction, with_weight=with_weight)


@overload
def nll_loss(
    log_probabilities: Array,
    labels: npt.ArrayLike,
    *,
    ignore_index: int | None = None,
    weight: npt.ArrayLike | None = None,
    reduction: Literal["mean", "sum"] = "mean",
    with_weight: Literal[False] = False,
) -> tuple[float, Array]: ...
@overload
def nll_loss(
    log_probabilities: Array,
    labels: npt.ArrayLike,
    *,
    ignore_index: int | None = None,
    weight: npt.ArrayLike | None = None,
    reduction: Literal["none"],
    with_weight: Literal[False] = False,
) -> tuple[Array, Array]: ...
@overload
def nll_loss(
    log_probabilities: Array,
    labels: npt.ArrayLike,
    *,
    ignore_index: int | None = None,
    weight: npt.ArrayLike | None = None,
    reduction: Literal["mean"] = "mean",
    with_weight: Literal[True],
) -> tuple[float, Array, float]: ...
def nll_loss(
    log_probabilities: Array,
    labels: npt.ArrayLike,
    *,
    ignore_index: int | None = None,
    weight: npt.ArrayLike | None = None,
    reduction: Reduction = "mean",
    with_weight: bool = False,
) -> tuple[float | Array, Array] | tuple[float | Array, Array, float]:
    """Compute -log_probabilities[label], averaged over the rows, and its gradient.

    Args:
        log_probabilities: (..., classes), floating point: logarithms, as of a softmax. For logits, use `cross_entropy`.
        labels: see `cross_entropy`, as are the other arguments, the result and the errors.
        ignore_index: see `cross_entropy`.
        weight: see `cross_entropy`.
        reduction: see `cross_entropy`.
        with_weight: see `cross_entropy`.
    """
    name = "nll_loss"
    kept = _chosen(name, log_probabilities, labels, ignore_index, weight)
    xp, wide = namespace_of(log_probabilities), wide_dtype(log_probabilities.dtype)
    rows = log_probabilities.reshape(kept.labels.size, log_probabilities.shape[-1])
    grad = xp.zeros(rows.shape, wide)
    grad[kept.places] = kept.weighted(-1)
    losses = kept.weighted(-rows[kept.places].astype(wide, copy=False))
    return _result(name, log_probabilities, kept, losses, grad, reduction, with_weight=with_weight)


@dataclass(frozen=True, slots=True, kw_only=True)
class _Chosen:
    """The rows' labels, and the weights of classes and rows.

    Attributes:
        labels: (n,), from 0 to classes - 1; 0 for ignored rows.
        places: index of each row's label among the logits.
        ignored: (n,), True for ignored rows; None when there are none.
        class_weights: (classes,) or None when all are 1.
        row_weights: (n,), the weight of each row's label; None when all are 1.
    """

    labels: Array
    places: tuple[Array, Array]
    ignored: Array | None
    class_weights: Array | None
    row_weights: Array | None

    def weighted(self, values: Array | float) -> Array | float:
        """Multiply each row's value, or a value of all rows, by the row's weight."""
        return values if self.row_weights is None else values * self.row_weights

    def total_weight(self) -> float:
        """Add up the weights of the rows that are not ignored: their number, without class weights."""
        if self.row_weights is None:
            return self.labels.size if self.ignored is None else self.labels.size - int(self.ignored.sum())
        weights = self.row_weights if self.ignored is None else self.row_weights[~self.ignored]
        return float(weights.sum(dtype=np.float64))


def _chosen(
    name: str, logits: Array, labels: npt.ArrayLike, ignore_index: int | None, class_weights: npt.ArrayLike | None
) -> _Chosen:
    """Check the arguments that losses of classes share."""
    check_real(name, logits, "logits")
    xp = namespace_of(logits)
    numbers = plain_array(xp, labels)
    if isinstance(labels, list | tuple) and not numbers.size:
        numbers = numbers.astype(np.int64)
    if logits.ndim == 0 or numbers.shape != logits.shape[:-1]:
        raise UsageError(
            f"{name}: logits of shape {logits.shape} need labels of shape {logits.shape[:-1]}, got {numbers.shape}. "
            "The last dimension of the logits is that of the classes; labels have no such dimension."
        )
    if numbers.dtype.kind not in "iu":
        raise UsageError(f"{name}: labels must be integers, got {numbers.dtype}.")
    flat, classes = numbers.reshape(numbers.size), logits.shape[-1]
    ignored: Array | None = None
    if ignore_index is not None:
        ignored = flat == ignore_index
        if not ignored.any():
            ignored = None
        else:
            flat = xp.where(ignored, flat.dtype.type(0), flat)
    if flat.size and (int(flat.min()) < 0 or int(flat.max()) >= classes):
        raise UsageError(
            f"{name}: labels must be from 0 to {classes - 1}, got {int(flat.min())} to {int(flat.max())}. "
            "Rows that are not to count have a label of their own, ignore_index."
        )
    weights: Array | None = None
    if class_weights is not None:
        weights = plain_array(xp, class_weights)
        if weights.shape != (classes,) or weights.dtype.kind in "cbOSU":
            raise UsageError(
                f"{name}: weight must be {classes} real numbers, one for each class, "
                f"got {weights.dtype} {weights.shape}."
            )
        weights = weights.astype(wide_dtype(logits.dtype), copy=False)
    return _Chosen(
        labels=flat,
        places=(xp.arange(flat.size), flat),
        ignored=ignored,
        class_weights=weights,
        row_weights=None if weights is None else weights[flat],
    )


def _result(
    name: str,
    logits: Array,
    kept: _Chosen,
    losses: Array | float,
    grad: Array,
    reduction: Reduction,
    *,
    with_weight: bool,
) -> tuple[float | Array, Array] | tuple[float | Array, Array, float]:
    """Make the result from each row's loss, and the gradient of their sum."""
    check_reduction(name, reduction)
    if with_weight and reduction != "mean":
        raise UsageError(f'{name}: with_weight gives the weight of a mean; it needs reduction="mean".')
    assert not isinstance(losses, float), "each row has a loss"
    if kept.ignored is not None:
        losses[kept.ignored] = 0  # a product with 0 would make NaN of infinity
        grad[kept.ignored] = 0
    weight = kept.total_weight()
    loss: float | Array = losses.reshape(logits.shape[:-1])
    if reduction != "none":
        loss = float(losses.sum(dtype=np.float64))
    if reduction == "mean":
        loss = loss / weight if weight else 0.0
        grad /= weight or 1
    with quiet_overflow(logits.dtype):
        grad = grad.reshape(logits.shape).astype(logits.dtype, copy=False)
    return (loss, grad, weight) if with_weight else (loss, grad)
