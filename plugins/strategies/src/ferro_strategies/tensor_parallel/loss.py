"""vocab_parallel_cross_entropy: the loss of logits whose columns are divided over the ranks."""

from __future__ import annotations

from typing import Literal, overload

import numpy as np

from ferro import ProcessGroup, UsageError

from ..nn.arrays import Array, namespace_of, wide_dtype
from .sharding import all_gather_sizes, shard_slice

_NAME = "vocab_parallel_cross_entropy"


@overload
def vocab_parallel_cross_entropy(
    logits: Array,
    labels: Array,
    group: ProcessGroup,
    *,
    ignore_index: int | None = None,
    label_smoothing: float = 0.0,
    with_weight: Literal[False] = False,
) -> tuple[float, Array]: ...


@overload
def vocab_parallel_cross_entropy(
    logits: Array,
    labels: Array,
    group: ProcessGroup,
    *,
    ignore_index: int | None = None,
    label_smoothing: float = 0.0,
    with_weight: Literal[True],
) -> tuple[float, Array, float]: ...


def vocab_parallel_cross_entropy(
    logits: Array,
    labels: Array,
    group: ProcessGroup,
    *,
    ignore_index: int | None = None,
    label_smoothing: float = 0.0,
    with_weight: bool = False,
) -> tuple[float, Array] | tuple[float, Array, float]:
    """Compute -log softmax(all ranks' logits)[label], averaged over the labels that count, and its gradient.

    The results are those of `nn.cross_entropy` of the gathered logits. The logits are not
    gathered: ranks exchange three numbers for each row, four with label smoothing.

    Args:
        logits: (..., this rank's classes), floating point; the classes are divided as a ColumnParallelLinear divides
            its outputs. All ranks call it.
        labels: (...), integers from 0 to all classes - 1, or `ignore_index`; the same on all ranks.
        group: the ranks.
        ignore_index: a label, usually -100, of rows that do not count.
        label_smoothing: the share of each target that is spread evenly over all classes, from 0 to 1.
        with_weight: return the number of labels that count, too, for a mean over several batches.

    Returns:
        The loss, the same on all ranks, and its gradient with respect to this rank's `logits`,
        of the same shape and dtype; with_weight: and the weight. Without labels that count: 0.0 and zeros.

    Raises:
        UsageError: shapes disagree, a label is no integer or out of range, or label_smoothing is.

    Source: Shoeybi et al., "Megatron-LM", 2019, section 3; for label smoothing, Szegedy et al., "Rethinking the
    Inception Architecture", 2016, section 7.
    """
    xp = namespace_of(logits)
    _check_shapes(logits, labels, label_smoothing)
    sizes = all_gather_sizes(logits.shape[-1], group, logits)
    kept = xp.ones(labels.shape, bool) if ignore_index is None else labels != ignore_index
    _check_labels(labels[kept], sizes, group, ignore_index)
    weight = int(kept.sum())
    if weight == 0:
        loss, grad = 0.0, xp.zeros_like(logits)
    else:
        shape = logits.shape
        if labels.ndim == 0:
            logits, labels, kept = logits[None], labels[None], kept[None]
        loss, wide = _loss_of_rows(logits, labels, kept, group, sizes, label_smoothing)
        grad = wide.astype(logits.dtype, copy=False).reshape(shape)
    return (loss, grad, float(weight)) if with_weight else (loss, grad)


def _loss_of_rows(
    logits: Array, labels: Array, kept: Array, group: ProcessGroup, sizes: tuple[int, ...], smoothing: float
) -> tuple[float, Array]:
    """Compute the mean loss and its gradient in the dtype in which sums are made."""
    xp = namespace_of(logits)
    own = shard_slice(sizes, group.rank)
    weight = int(kept.sum())
    greatest = group.all_reduce(logits.max(axis=-1), "max")
    # One array holds, one after the other, the shifted logits, their exponentials, the softmax and the gradient. Its
    # memory layout is that of the logits: time first if their layer gathered sequences.
    grad = logits.astype(wide_dtype(logits.dtype))
    grad -= greatest[..., None]
    local = xp.nonzero(kept & (labels >= own.start) & (labels < own.stop))
    # int64 holds any class; this rank's classes may lie beyond the range of the labels' dtype.
    chosen = (*local, labels[local].astype(np.int64) - own.start)
    sums = xp.zeros((3 if smoothing else 2, *labels.shape), grad.dtype)
    sums[1][local] = grad[chosen]
    if smoothing:
        sums[2] = grad.sum(axis=-1)
    xp.exp(grad, out=grad)
    sums[0] = grad.sum(axis=-1)
    total, at_labels, *of_all = group.all_reduce(sums, out=sums)
    target = at_labels
    if smoothing:
        target = (1 - smoothing) * at_labels + (smoothing / sum(sizes)) * of_all[0]
    losses = (xp.log(total) - target)[kept]
    grad /= total[..., None]
    if smoothing:
        grad -= smoothing / sum(sizes)
    grad[chosen] -= 1 - smoothing
    grad[~kept] = 0
    grad /= weight
    return float(losses.sum(dtype=np.float64)) / weight, grad


def _check_shapes(logits: Array, labels: Array, label_smoothing: float) -> None:
    namespace_of(labels)
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
        raise UsageError(
            f"{_NAME}: labels must be from 0 to {classes - 1}, got {int(kept.min())} to {int(kept.max())}. "
            f"Rows that do not count have the label ignore_index={ignore_index}."
        )
