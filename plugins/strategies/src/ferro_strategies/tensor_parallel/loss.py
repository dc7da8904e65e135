"""vocab_parallel_cross_entropy: the loss of logits whose columns are divided over the ranks."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal, overload

import numpy as np
import numpy.typing as npt

from ferro import ProcessGroup, UsageError

from ..nn.arrays import Array, namespace_of, quiet_overflow, wide_dtype
from ..nn.sums import row_sums
from .sharding import all_gather_sizes, shard_slice
from .summaries import begin_comparison, different_inputs, end_comparison

_NAME = "vocab_parallel_cross_entropy"


@overload
def vocab_parallel_cross_entropy(
    logits: Array,
    labels: npt.ArrayLike,
    group: ProcessGroup,
    *,
    ignore_index: int | None = None,
    label_smoothing: float = 0.0,
    weight: npt.ArrayLike | None = None,
    with_weight: Literal[False] = False,
) -> tuple[float, Array]: ...


@overload
def vocab_parallel_cross_entropy(
    logits: Array,
    labels: npt.ArrayLike,
    group: ProcessGroup,
    *,
    ignore_index: int | None = None,
    label_smoothing: float = 0.0,
    weight: npt.ArrayLike | None = None,
    with_weight: Literal[True],
) -> tuple[float, Array, float]: ...


def vocab_parallel_cross_entropy(
    logits: Array,
    labels: npt.ArrayLike,
    group: ProcessGroup,
    *,
    ignore_index: int | None = None,
    label_smoothing: float = 0.0,
    weight: npt.ArrayLike | None = None,
    with_weight: bool = False,
) -> tuple[float, Array] | tuple[float, Array, float]:
    """Compute -log softmax(all ranks' logits)[label], averaged over the labels that count, and its gradient.

    The results are those of `nn.cross_entropy` of the gathered logits. The logits are not
    gathered: ranks exchange three numbers for each row, four with label smoothing.

    Args:
        logits: (..., this rank's classes), floating point; the classes are divided as a ColumnParallelLinear divides
            its outputs. All ranks call it.
        labels: (...), integers from 0 to all classes - 1, or `ignore_index`, an array or a (nested) list; the same on
            all ranks.
        group: the ranks.
        ignore_index: a label, usually -100, of rows that do not count.
        label_smoothing: the share of each target that is spread evenly over all classes, from 0 to 1.
        weight: (all classes,), factors of the classes' losses, see `nn.cross_entropy`; the same on all ranks.
        with_weight: return the mean's weight, too: the number of labels that count, or the sum of their class weights.
            A mean over several batches weighs each batch's by it.

    Returns:
        The loss, the same on all ranks, and its gradient with respect to this rank's `logits`,
        of the same shape and dtype; with_weight: and the weight. Without labels that count: 0.0 and zeros.

    Raises:
        UsageError: shapes disagree, a label is no integer or out of range, or label_smoothing is.

    Source: Shoeybi et al., "Megatron-LM", 2019, section 3; for label smoothing, Szegedy et al., "Rethinking the
    Inception Architecture", 2016, section 7.
    """
    xp = namespace_of(logits)
    classes: Array = xp.asarray(labels)
    _check_shapes(logits, classes, label_smoothing)
    sizes = all_gather_sizes(logits.shape[-1], group, logits)
    wanted = classes.reshape(classes.size)
    kept = xp.ones(wanted.shape, bool) if ignore_index is None else wanted != ignore_index
    _check_labels(wanted[kept], sizes, group, ignore_index)
    wide = wide_dtype(logits.dtype)
    weights = None if weight is None else _checked_weights(xp.asarray(weight, wide), sum(sizes))
    # The weight of each row: that of its class, or zero.
    row_weights = kept.astype(wide)
    if weights is not None:
        row_weights[kept] = weights[wanted[kept]]
    total = float(row_weights.sum(dtype=np.float64))
    if total == 0:
        loss, grad = 0.0, xp.zeros_like(logits)
    else:
        shape = logits.shape if classes.ndim else (1, *logits.shape)
        rows = _Rows(classes.reshape(shape[:-1]), kept.reshape(shape[:-1]), row_weights.reshape(shape[:-1]), weights)
        loss, found = _loss_of_rows(logits.reshape(shape), rows, total, group, sizes, label_smoothing)
        with quiet_overflow(logits.dtype):
            grad = found.astype(logits.dtype, copy=False).reshape(logits.shape)
    return (loss, grad, total) if with_weight else (loss, grad)


@dataclass(frozen=True, slots=True)
class _Rows:
    """What is known of the rows: labels, whether they count, their weights, and those of all classes."""

    labels: Array
    kept: Array
    weights: Array
    class_weights: Array | None


def _loss_of_rows(
    logits: Array, rows: _Rows, weight: float, group: ProcessGroup, sizes: tuple[int, ...], smoothing: float
) -> tuple[float, Array]:
    """Compute the mean loss and its gradient in the dtype in which sums are made."""
    xp = namespace_of(logits)
    own = shard_slice(sizes, group.rank)
    comparison = begin_comparison(rows.labels, group)
    own_greatest = logits.max(axis=-1)
    if not end_comparison(comparison):
        raise different_inputs(_NAME, group)
    greatest = group.all_reduce(own_greatest, "max")
    # One array holds, one after the other, the shifted logits, their exponentials, the softmax and the gradient. Its
    # memory layout is that of the logits: time first if their layer gathered sequences.
    grad = logits.astype(wide_dtype(logits.dtype))
    grad -= greatest[..., None]
    local = xp.nonzero(rows.kept & (rows.labels >= own.start) & (rows.labels < own.stop))
    # int64 holds any class; this rank's classes may lie beyond the range of the labels' dtype.
    chosen = (*local, rows.labels[local].astype(np.int64) - own.start)
    own_weights = None if rows.class_weights is None else rows.class_weights[own]
    sums = xp.zeros((3 if smoothing else 2, *rows.labels.shape), grad.dtype)
    sums[1][local] = grad[chosen]
    if smoothing:
        sums[2] = row_sums(grad if own_weights is None else grad * own_weights)
    xp.exp(grad, out=grad)
    sums[0] = row_sums(grad)
    total, at_labels, *at_all = group.all_reduce(sums, out=sums)
    log_total = xp.log(total)
    losses = (1 - smoothing) * rows.weights * (log_total - at_labels)
    factors = (1 - smoothing) * rows.weights
    grad /= total[..., None]
    if smoothing:
        share = smoothing / sum(sizes)
        all_weights = sum(sizes) if rows.class_weights is None else rows.class_weights.sum(dtype=np.float64)
        losses += share * (all_weights * log_total - at_all[0])
        factors += share * all_weights
    grad *= factors[..., None]
    grad[chosen] -= ((1 - smoothing) * rows.weights)[local]
    if smoothing:
        grad -= share if own_weights is None else share * own_weights
    grad[~rows.kept] = 0
    grad /= grad.dtype.type(weight)
    return float(losses[rows.kept].sum(dtype=np.float64)) / weight, grad


def _check_shapes(logits: Array, labels: Array, label_smoothing: float) -> None:
    if logits.ndim == 0 or labels.shape != logits.shape[:-1]:
        raise UsageError(
            f"{_NAME}: logits of shape {logits.shape} need labels of shape {logits.shape[:-1]}, got {labels.shape}."
        )
    if logits.dtype.kind in "iubc":
        raise UsageError(f"{_NAME}: logits must be real floating-point numbers, got {logits.dtype}.")
    if labels.dtype.kind not in "iu":
        raise UsageError(f"{_NAME}: labels must be integers, got {labels.dtype}.")
    if not 0 <= label_smoothing <= 1:
        raise UsageError(f"{_NAME}: label_smoothing must be from 0 to 1, got {label_smoothing}.")


def _check_labels(kept: Array, sizes: tuple[int, ...], group: ProcessGroup, ignore_index: int | None) -> None:
    classes = sum(sizes)
    if min(sizes) < 1:
        raise UsageError(f"{_NAME}: the ranks of group {group.name!r} have {sizes} classes; each needs at least one.")
    if kept.size and (int(kept.min()) < 0 or int(kept.max()) >= classes):
        allowed = f"from 0 to {classes - 1}" + ("" if ignore_index is None else f", or {ignore_index} to be ignored")
        advice = " Give ignore_index= for rows that do not count." if ignore_index is None else ""
        raise UsageError(f"{_NAME}: labels must be {allowed}, got {int(kept.min())} to {int(kept.max())}.{advice}")


def _checked_weights(weights: Array, classes: int) -> Array:
    if weights.shape != (classes,):
        raise UsageError(f"{_NAME}: weight must have the shape ({classes},), got {weights.shape}.")
    return weights
