"""Clipping: the norm of all gradients of a model, and gradients scaled or cut when they are too large."""

from __future__ import annotations

import math
from collections.abc import Iterable

import numpy as np

from ferro import ProcessGroup, UsageError

from ..nn.arrays import Array, namespace_of
from ..nn.module import Module
from ..nn.parameter import Parameter
from .blocks import blocks, cached_wide_dtype


def clip_grad_norm(parameters: Module | Iterable[Parameter], max_norm: float, norm_type: float = 2.0) -> float:
    """Scale all gradients in place, so that their global norm is at most `max_norm`.

    Call it between the pullback and the step, on every rank.

    Args:
        parameters: the same ones on all ranks that have them; a parameter without gradient counts as zero.
        max_norm: largest norm allowed.
        norm_type: see `grad_norm`.

    Returns:
        The norm before scaling, the same on all ranks (see `grad_norm`). A norm that is not finite scales no gradient:
        skip that step.

    Raises:
        UsageError: `max_norm` or `norm_type` is not positive.
    """
    check_norm_arguments(max_norm, norm_type)
    held = _listed(parameters)
    norm = grad_norm(held, norm_type)
    if max_norm < norm < math.inf:
        for parameter in held:
            if parameter.grad is not None:
                # The product is computed in float32, where the factor cannot become zero.
                for _, block in blocks(parameter.grad):
                    block[...] = block.astype(cached_wide_dtype(block.dtype), copy=False) * (max_norm / norm)
    return norm


def clip_grad_value(parameters: Module | Iterable[Parameter], max_value: float) -> None:
    """Cut every element of all gradients to the range from -max_value to max_value, in place.

    Nothing is sent. Real and imaginary parts of complex gradients are cut by themselves.

    Raises:
        UsageError: `max_value` is not positive.
    """
    if not max_value > 0:
        raise UsageError(f"clip_grad_value: max_value must be above 0, not {max_value}.")
    for parameter in _listed(parameters):
        if parameter.grad is not None:
            xp = namespace_of(parameter.grad)
            for _, block in blocks(parameter.grad):
                wide = block.astype(cached_wide_dtype(block.dtype), copy=False)
                block[...] = xp.clip(wide, -max_value, max_value)


def grad_norm(parameters: Module | Iterable[Parameter], norm_type: float = 2.0) -> float:
    """Compute the norm of all gradients together, as one long vector.

    It is that of the whole model in one process: it includes every piece of a parameter that is split over ranks
    (`Parameter.splits`), the parameters of a pipeline's other stages (`Parameter.stages`), and every parameter once.
    Ranks communicate only where parameters are split or stages are on other ranks. All of these call it together.

    Args:
        parameters: the same ones on all ranks that have them; a parameter without gradient counts as zero.
        norm_type: p of the norm (sum of |g|**p)**(1/p), 2 for the Euclidean norm; infinity for the largest |g|.

    Returns:
        The norm, computed in float64, the same on all ranks.

    Raises:
        UsageError: `norm_type` is not positive.
    """
    check_norm_arguments(1.0, norm_type)
    of_stages = _totals_of_stages(_listed(parameters), norm_type)
    totals = [total if group is None else _reduce(total, group, norm_type) for group, total in of_stages.items()]
    if norm_type == math.inf:
        return max(totals, key=_nan_first, default=0.0)
    return float(math.fsum(totals) ** (1 / norm_type))


def check_norm_arguments(max_norm: float, norm_type: float) -> None:
    """Refuse a largest norm or a type of norm that is zero, negative, NaN or text.

    Raises:
        UsageError: one of them is not positive.
    """
    for name, value in (("max_norm", max_norm), ("norm_type", norm_type)):
        if isinstance(value, str) or not value > 0:  # torch takes "inf" for math.inf
            raise UsageError(f"clip_grad_norm: {name} must be above 0, not {value!r}.")


def _totals_of_stages(parameters: list[Parameter], p: float) -> dict[ProcessGroup | None, float]:
    """Add up powers of gradients over the ranks that hold pieces, for the parameters of each pipeline."""
    totals: dict[tuple[ProcessGroup | None, tuple[ProcessGroup, ...]], float] = {}
    for parameter in parameters:
        key = parameter.stages, tuple(split.group for split in parameter.splits)
        own = 0.0 if parameter.grad is None or parameter.tied_copy else _power(parameter.grad, p)
        totals[key] = _combined(totals.get(key, 0.0), own, p)
    of_stages: dict[ProcessGroup | None, float] = {}
    for (stages, groups), total in totals.items():
        for group in groups:
            total = _reduce(total, group, p)
        of_stages[stages] = _combined(of_stages.get(stages, 0.0), total, p)
    return of_stages


def _power(grad: Array, p: float) -> float:
    """Compute the sum of |g|**p in float64, or the largest |g|."""
    xp = namespace_of(grad)
    total = 0.0
    for _, block in blocks(grad):
        values = block.astype(np.float64)
        if p == 2:
            total += float(xp.vdot(values, values))
            continue
        sizes = xp.abs(values)
        if grad.dtype.kind == "c":
            sizes = xp.hypot(values[::2], values[1::2])  # real and imaginary parts alternate
        total = _combined(total, float(sizes.max() if p == math.inf else (sizes**p).sum()), p)
    return total


def _reduce(total: float, group: ProcessGroup, p: float) -> float:
    if p != math.inf:
        return float(group.all_reduce(np.float64(total)))
    # A maximum may lose a NaN, so the count of NaNs is reduced, too.
    found = group.all_reduce(np.array([0.0 if math.isnan(total) else total, math.isnan(total)]), "max")
    return math.nan if found[1] else float(found[0])


def _combined(one: float, other: float, p: float) -> float:
    return max(one, other, key=_nan_first) if p == math.inf else one + other


def _nan_first(value: float) -> tuple[bool, float]:
    return math.isnan(value), value


def _listed(parameters: Module | Iterable[Parameter]) -> list[Parameter]:
    return list(parameters.parameters() if isinstance(parameters, Module) else parameters)
