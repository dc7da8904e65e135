"""vocab_parallel_cross_entropy: the loss of logits whose columns are divided over the ranks."""

from __future__ import annotations

import numpy as np

from ferro import ProcessGroup, UsageError

from ..nn.arrays import Array, namespace_of, wide_dtype
from .sharding import all_gather_sizes, shard_slice


def vocab_parallel_cross_entropy(logits: Array, labels: Array, group: ProcessGroup) -> tuple[float, Array]:
    """Compute -log softmax(all ranks' logits)[label], averaged over the rows, and its gradient.

    The results are those of `nn.cross_entropy` of the gathered logits. The logits are not
    gathered: ranks exchange three numbers for each row.

    Args:
        logits: (..., this rank's classes), floating point; the classes are divided as a ColumnParallelLinear divides
            its outputs. All ranks call it.
        labels: (...), integers from 0 to all classes - 1; the same on all ranks.
        group: the ranks.

    Returns:
        The loss, the same on all ranks, and its gradient with respect to this rank's `logits`,
        of the same shape and dtype. Without rows: 0.0 and an empty gradient.

    Raises:
        UsageError: shapes disagree, or a label is no integer or out of range.

    Source: Shoeybi et al., "Megatron-LM", 2019, section 3.
    """
    xp = namespace_of(logits)
    _check_shapes(logits, labels)
    sizes = all_gather_sizes(logits.shape[-1], group, logits)
    _check_labels(labels, sizes, group)
    if labels.size == 0:
        return 0.0, xp.zeros_like(logits)
    if labels.ndim == 0:
        loss, grad = vocab_parallel_cross_entropy(logits[None], labels[None], group)
        return loss, grad[0]
    own = shard_slice(sizes, group.rank)
    greatest = group.all_reduce(logits.max(axis=-1), "max")
    # One array holds, one after the other, the shifted logits, their exponentials, the softmax and the gradient. Its
    # memory layout is that of the logits: time first if their layer gathered sequences.
    grad = logits.astype(wide_dtype(logits.dtype))
    grad -= greatest[..., None]
    local = xp.nonzero((labels >= own.start) & (labels < own.stop))
    # int64 holds any class; this rank's classes may lie beyond the range of the labels' dtype.
    chosen = (*local, labels[local].astype(np.int64) - own.start)
    sums = xp.zeros((2, *labels.shape), grad.dtype)
    sums[1][local] = grad[chosen]
    xp.exp(grad, out=grad)
    sums[0] = grad.sum(axis=-1)
    total, at_labels = group.all_reduce(sums, out=sums)
    loss = float((xp.log(total) - at_labels).mean())
    grad /= total[..., None]
    grad[chosen] -= 1
    grad /= labels.size
    return loss, grad.astype(logits.dtype, copy=False)


def _check_shapes(logits: Array, labels: Array) -> None:
    if logits.ndim == 0 or labels.shape != logits.shape[:-1]:
        raise UsageError(
            f"vocab_parallel_cross_entropy: logits of shape {logits.shape} need labels of shape "
            f"{logits.shape[:-1]}, got {labels.shape}."
        )
    if labels.dtype.kind not in "iu":
        raise UsageError(f"vocab_parallel_cross_entropy: labels must be integers, got {labels.dtype}.")


def _check_labels(labels: Array, sizes: tuple[int, ...], group: ProcessGroup) -> None:
    classes = sum(sizes)
    if min(sizes) < 1:
        raise UsageError(
            f"vocab_parallel_cross_entropy: the ranks of group {group.name!r} have {sizes} "
            "classes; each needs at least one."
        )
    if labels.size and (int(labels.min()) < 0 or int(labels.max()) >= classes):
        raise UsageError(
            f"vocab_parallel_cross_entropy: labels must be from 0 to {classes - 1}, "
            f"got {int(labels.min())} to {int(labels.max())}."
        )
