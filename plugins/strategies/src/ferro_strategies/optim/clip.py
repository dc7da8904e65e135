"""clip_grad_norm: scale all gradients down when their global norm is too large."""

from __future__ import annotations

import math
from collections.abc import Iterable

import numpy as np

from ferro import ProcessGroup, UsageError

from ..nn.arrays import Array, namespace_of
from ..nn.parameter import Parameter
from .blocks import blocks


def clip_grad_norm(parameters: Iterable[Parameter], max_norm: float) -> float:
    """Scale all gradients in place, so that their global norm is at most `max_norm`.

    Call it between the pullback and the step, on every rank. The norm is that of the whole model in one process: it
    includes every piece of a parameter that is split over ranks (`Parameter.splits`), and every parameter once. Ranks
    communicate only where parameters are split. In a pipeline call `Pipeline.clip_grad_norm`, because a rank has only
    the parameters of its own stages.

    Args:
        parameters: the same ones on all ranks; a parameter without gradient counts as zero.
        max_norm: largest Euclidean norm allowed.

    Returns:
        The norm before scaling, computed in float64, the same on all ranks. A norm that is not
        finite scales no gradient: skip that step.

    Raises:
        UsageError: `max_norm` is not positive.
    """
    check_max_norm(max_norm)
    held = list(parameters)
    norm = math.sqrt(squared_norm(held))
    scale_grads(held, max_norm, norm)
    return norm


def check_max_norm(max_norm: float) -> None:
    """Refuse a `max_norm` that is zero, negative or NaN.

    Raises:
        UsageError: `max_norm` is not positive.
    """
    if not max_norm > 0:
        raise UsageError(f"clip_grad_norm: max_norm must be above 0, not {max_norm}.")


def squared_norm(parameters: Iterable[Parameter]) -> float:
    """Sum the squares of all gradients, including the pieces that other ranks hold.

    Ranks that hold pieces call this together, with parameters that are split over the same groups.
    """
    totals: dict[tuple[ProcessGroup, ...], float] = {}
    for parameter in parameters:
        groups = tuple(split.group for split in parameter.splits)
        own = 0.0 if parameter.grad is None else _squared(parameter.grad)
        totals[groups] = totals.get(groups, 0.0) + own
    for groups in totals:
        for group in groups:
            totals[groups] = float(group.all_reduce(np.float64(totals[groups])))
    return math.fsum(totals.values())


def scale_grads(parameters: Iterable[Parameter], max_norm: float, norm: float) -> None:
    """Scale gradients of norm `norm` down to `max_norm` in place, if `norm` is finite."""
    if max_norm < norm < math.inf:
        for parameter in parameters:
            if parameter.grad is not None:
                parameter.grad *= max_norm / norm


def _squared(grad: Array) -> float:
    xp = namespace_of(grad)
    wide = np.complex128 if grad.dtype.kind == "c" else np.float64
    total = 0.0
    for _, block in blocks(grad):
        values = block.astype(wide)
        total += float(xp.vdot(values, values).real)
    return total
