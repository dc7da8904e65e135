"""LossScaler: keep the small gradients of half precision from becoming zero."""

from __future__ import annotations

import math
import sys
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from types import ModuleType
from typing import Protocol
from weakref import WeakKeyDictionary

import numpy as np

from ferro import ProcessGroup, UsageError

from ..nn.arrays import Array, namespace_of, wide_dtype
from ..nn.parameter import Parameter
from .optimizer import Optimizer, blocks

# Beyond these a gradient in float32 could not be scaled, or unscaled.
_GREATEST = 2.0**127
_LEAST = 2.0**-126


class ScalerWatcher(Protocol):
    """Whoever has to know what a LossScaler does, before it does it."""

    def tell_unscale(self, optimizer: Optimizer) -> None:
        """Its gradients are going to be unscaled."""

    def tell_agree(self, optimizers: Sequence[Optimizer]) -> None:
        """Ranks are going to agree on whether these step."""


class LossScaler:
    """Scales the loss's gradient up, and the parameters' gradients down again.

    In float16 what is below 6e-8 is zero, and gradients often are. So they are computed times a
    scale, as large as can be: when a gradient overflows, the step is skipped and the scale made
    smaller; after many steps without, it is made larger.

        loss, grad = cross_entropy(logits, labels)
        pullback(scaler.scale(grad))
        scaler.unscale(optimizer)                       # only to clip or look at gradients
        clip_grad_norm(model.parameters(), 1.0)
        scaler.step(optimizer)
        optimizer.zero_grad()

    All microbatches whose gradients are added have one scale: it changes in `step` alone.

    Args:
        initial_scale: the first scale.
        growth_factor: by which it grows, above 1.
        backoff_factor: by which it shrinks, between 0 and 1.
        growth_interval: after how many steps in a row without overflow it grows.
        group: ranks that skip together: all that hold pieces of the parameters. None where each
            rank has all gradients, the same on every rank, as with DDP: then all decide alike.

    Attributes:
        current_scale: the scale.

    Raises:
        UsageError: a number is out of its range.

    Source: Micikevicius et al., "Mixed Precision Training", 2018, section 3.2; grows and shrinks
    as torch.amp.GradScaler does, but for that `step` includes what is `update` there.
    """

    def __init__(
        self,
        *,
        initial_scale: float = 2.0**16,
        growth_factor: float = 2.0,
        backoff_factor: float = 0.5,
        growth_interval: int = 2000,
        group: ProcessGroup | None = None,
    ) -> None:
        _check_range("initial_scale", initial_scale, _LEAST, _GREATEST)
        _check_range("growth_factor", growth_factor, math.nextafter(1, 2), sys.float_info.max)
        _check_range("backoff_factor", backoff_factor, sys.float_info.min, math.nextafter(1, 0))
        _check_range("growth_interval", growth_interval, 1, sys.maxsize)
        self.current_scale = float(initial_scale)
        self._growth_factor = growth_factor
        self._backoff_factor = backoff_factor
        self._growth_interval = growth_interval
        self._group = group
        self._steps_in_a_row = 0
        # Whose gradients are unscaled already, and whether these are finite on this rank.
        self._finite: WeakKeyDictionary[Optimizer, bool] = WeakKeyDictionary()
        self._watcher: ScalerWatcher | None = None

    @contextmanager
    def watched(self, watcher: ScalerWatcher) -> Iterator[None]:
        """Tell `watcher` what is done inside, for ranks that have to do likewise."""
        self._watcher = watcher
        try:
            yield
        finally:
            self._watcher = None

    def scale(self, grad: Array) -> Array:
        """Return the loss's gradient times the scale, for the pullback, in its own dtype."""
        with np.errstate(over="ignore"):  # what overflows makes `step` skip
            scaled: Array = grad.astype(wide_dtype(grad.dtype), copy=False) * self.current_scale
            return scaled.astype(grad.dtype, copy=False)

    def unscale(self, optimizer: Optimizer) -> None:
        """Divide the gradients of an optimizer by the scale, in place, before its step.

        Only needed where somebody looks at them before: `step` does it otherwise. Communicates
        nothing.

        Raises:
            UsageError: they are unscaled already; nothing was changed. Or the parameters are in
                pieces, on ranks that are not in `group`.
        """
        if optimizer in self._finite:
            raise UsageError(
                f"LossScaler: the gradients of this {type(optimizer).__name__} are unscaled "
                "already. Call unscale once before each step, after the last pullback."
            )
        for parameter in optimizer.parameters:
            self._check_pieces(parameter)
        if self._watcher is not None:
            self._watcher.tell_unscale(optimizer)
        grads = [item.grad for item in optimizer.parameters if item.grad is not None]
        self._finite[optimizer] = _unscale(grads, 1 / self.current_scale)

    def step(self, *optimizers: Optimizer) -> bool:
        """Unscale the gradients if need be; step if all are finite, on all ranks of the group.

        Then the scale is changed. All ranks of the group call it; it takes one small reduction.

        Args:
            optimizers: all that hold gradients of this loss, together: all step, or none does.

        Returns:
            Whether the step was made.

        Raises:
            UsageError: no optimizer was given, or as from `unscale`. Or gradients overflow even
                with the smallest scale there is; on all ranks of the group.
        """
        if not optimizers:
            raise UsageError("LossScaler.step: give the optimizer that is to step.")
        for optimizer in optimizers:
            if optimizer not in self._finite:
                self.unscale(optimizer)
        finite = self.agree(optimizers)
        if finite:
            for optimizer in optimizers:
                optimizer.step()
        return finite

    def agree(self, optimizers: Sequence[Optimizer]) -> bool:
        """Return whether unscaled gradients are finite on all ranks; change the scale by it.

        The middle of `step`, for ranks whose optimizers then step by themselves.
        """
        if self._watcher is not None:
            self._watcher.tell_agree(optimizers)
        flags = [self._finite.pop(optimizer) for optimizer in optimizers]
        finite = self._everywhere(all(flags), optimizers[0])
        self._adapt(finite)
        return finite

    def state_dict(self) -> dict[str, Array]:
        """Return what changes from step to step: "scale" and "steps_in_a_row"."""
        return {
            "scale": np.array(self.current_scale, np.float64),
            "steps_in_a_row": np.array(self._steps_in_a_row, np.int64),
        }

    def load_state_dict(self, state: Mapping[str, Array]) -> None:
        """Restore what `state_dict` gave.

        Raises:
            UsageError: it is not such a state; nothing was changed.
        """
        fits = set(state) == {"scale", "steps_in_a_row"}
        fits = fits and all(value.shape == () for value in state.values())
        if not fits or not _LEAST <= state["scale"] <= _GREATEST or state["steps_in_a_row"] < 0:
            raise UsageError(
                "LossScaler.load_state_dict: expected a positive 'scale' and the count "
                f"'steps_in_a_row', got {dict(state)}. Nothing was loaded."
            )
        self.current_scale = float(state["scale"])
        self._steps_in_a_row = int(state["steps_in_a_row"])

    def _check_pieces(self, parameter: Parameter) -> None:
        """See that all ranks with pieces of the parameter skip together."""
        together = set(self._group.global_ranks) if self._group is not None else set()
        for split in parameter.splits:
            alone = split.group.world_size == 1
            if not alone and (others := set(split.group.global_ranks) - together):
                raise UsageError(
                    f"LossScaler: parameter {parameter.name!r} is split over group "
                    f"{split.group.name!r}, of which world ranks {sorted(others)} would not skip "
                    "a step together with this rank. Give LossScaler(group=...) a group of all "
                    "ranks that hold pieces of the model.",
                    group=split.group.name,
                    rank=split.group.rank,
                )

    def _everywhere(self, finite: bool, optimizer: Optimizer) -> bool:
        if self._group is None:
            return finite
        xp = namespace_of(optimizer.parameters[0].data)
        return bool(self._group.all_reduce(xp.array(finite, np.uint8), "min"))

    def _adapt(self, finite: bool) -> None:
        if not finite:
            self._steps_in_a_row = 0
            self.current_scale *= self._backoff_factor
            if self.current_scale < _LEAST:
                self.current_scale = _LEAST
                raise UsageError(
                    f"LossScaler: gradients are not finite even when scaled by {_LEAST:g}: the "
                    "scale is not the cause. Look for the first NaN or infinity in the model, "
                    "the data or the learning rate."
                )
            return
        self._steps_in_a_row += 1
        if self._steps_in_a_row >= self._growth_interval:
            self._steps_in_a_row = 0
            self.current_scale = min(self.current_scale * self._growth_factor, _GREATEST)


def _unscale(grads: list[Array], inverse: float) -> bool:
    """Multiply by `inverse`, in place; return whether all are finite."""
    # On each device one flag, read at the end: reading a GPU's waits for it.
    flags: dict[ModuleType, Array] = {}
    for grad in grads:
        xp, wide = namespace_of(grad), wide_dtype(grad.dtype)
        flag = flags.setdefault(xp, xp.ones((), bool))
        for _, block in blocks(grad):
            # Half precision goes through float32, where neither factor can become zero.
            with np.errstate(over="ignore"):
                block[...] = block.astype(wide, copy=False) * inverse
            flag &= xp.isfinite(block).all()
    return all(map(bool, flags.values()))


def _check_range(name: str, value: float, least: float, most: float) -> None:
    if not least <= value <= most:
        raise UsageError(f"LossScaler: {name} must be from {least} to {most}, got {value}.")
