"""Loss functions, each with its gradient."""

from __future__ import annotations

from ferro.errors import UsageError

from .arrays import Array, namespace_of, wide_dtype


def cross_entropy(logits: Array, labels: Array) -> tuple[float, Array]:
    """Compute -log softmax(logits)[label], averaged over the rows, and its gradient.

    Args:
        logits: (..., classes), floating point.
        labels: (...), integers from 0 to classes - 1.

    Returns:
        The loss, and its gradient with respect to `logits`, of the same shape and dtype.
        Without rows these are 0.0 and an empty gradient.

    Raises:
        UsageError: shapes disagree, labels are no integers, or a label is out of range.
    """
    xp = namespace_of(logits)
    namespace_of(labels)
    _check_labels(logits, labels)
    if labels.size == 0:
        return 0.0, xp.zeros_like(logits)
    count = labels.size
    rows = logits.reshape(count, logits.shape[-1])
    chosen = (xp.arange(count), labels.reshape(count))
    # One array holds in turn the logits minus their maximum, exponentials, softmax and gradient.
    grad = rows.astype(wide_dtype(rows.dtype), copy=False) - rows.max(axis=1, keepdims=True)
    at_labels = grad[chosen]
    xp.exp(grad, out=grad)
    total = grad.sum(axis=1, keepdims=True)
    loss = float((xp.log(total[:, 0]) - at_labels).mean())
    grad /= total
    grad[chosen] -= 1
    grad /= count
    return loss, grad.reshape(logits.shape).astype(logits.dtype, copy=False)


def mse_loss(prediction: Array, target: Array) -> tuple[float, Array]:
    """Compute the mean of (prediction - target)**2 over all elements, and its gradient.

    Args:
        prediction: any shape, floating point.
        target: array of the same shape; any dtype.

    Returns:
        The loss, and its gradient with respect to `prediction`, of the same shape and dtype.
        Without elements these are 0.0 and an empty gradient.

    Raises:
        UsageError: the shapes disagree.
    """
    xp = namespace_of(prediction)
    namespace_of(target)
    if prediction.shape != target.shape:
        raise UsageError(
            f"mse_loss: prediction has shape {prediction.shape}, target {target.shape}; they must be equal."
        )
    if prediction.size == 0:
        return 0.0, xp.zeros_like(prediction)
    wide = wide_dtype(prediction.dtype)
    grad = prediction.astype(wide, copy=False) - target.astype(wide, copy=False)
    loss = float(xp.vdot(grad, grad)) / grad.size
    grad *= 2 / grad.size
    return loss, grad.astype(prediction.dtype, copy=False)


def _check_labels(logits: Array, labels: Array) -> None:
    if logits.ndim == 0 or labels.shape != logits.shape[:-1]:
        raise UsageError(
            f"cross_entropy: logits of shape {logits.shape} need labels of shape "
            f"{logits.shape[:-1]}, got {labels.shape}."
        )
    if labels.dtype.kind not in "iu":
        raise UsageError(f"cross_entropy: labels must be integers, got {labels.dtype}.")
    classes = logits.shape[-1]
    if labels.size and (int(labels.min()) < 0 or int(labels.max()) >= classes):
        raise UsageError(
            f"cross_entropy: labels must be from 0 to {classes - 1}, got {int(labels.min())} to {int(labels.max())}."
        )
