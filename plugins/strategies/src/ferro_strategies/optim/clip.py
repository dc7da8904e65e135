"""clip_grad_norm: keep a step's gradient from being too long."""

from __future__ import annotations

import math
from collections.abc import Iterable

import numpy as np

from ferro.errors import UsageError

from ..nn.arrays import namespace_of
from ..nn.parameter import Parameter
from .optimizer import blocks


def clip_grad_norm(parameters: Iterable[Parameter], max_norm: float) -> float:
    """Scale all gradients, in place, so that together they are no longer than `max_norm`.

    Call it between the pullback and the step. Gradients that are alike on all ranks, as DDP's
    are, stay alike: nothing is communicated.

    Args:
        parameters: those without gradient are left out.
        max_norm: longest Euclidean norm allowed.

    Returns:
        The norm before, computed in float64. Where it is not finite nothing is scaled: skip
        that step.

    Raises:
        UsageError: `max_norm` is not positive.
    """
    if not max_norm > 0:
        raise UsageError(f"clip_grad_norm: max_norm must be above 0, not {max_norm}.")
    grads = [item.grad for item in parameters if item.grad is not None]
    total = 0.0
    for grad in grads:
        xp = namespace_of(grad)
        wide = np.complex128 if grad.dtype.kind == "c" else np.float64
        for _, block in blocks(grad):
            values = block.astype(wide)
            total += float(xp.vdot(values, values).real)
    norm = math.sqrt(total)
    if max_norm < norm < math.inf:
        for grad in grads:
            grad *= max_norm / norm
    return norm
