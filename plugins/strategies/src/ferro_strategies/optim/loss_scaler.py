"""LossScaler: scale the loss, so that small gradients in half precision do not become zero."""

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
from ..nn.trees import Arrays, map_leaves
from .blocks import blocks
from .optimizer import Optimizer

# With a scale outside this range, float32 gradients could not be scaled or unscaled.
_GREATEST = 2.0**127
_LEAST = 2.0**-126


class LossScalerListener(Protocol):
    """An object that a LossScaler calls before it acts (see `LossScaler.notifying`)."""

    def before_unscale(self, optimizer: Optimizer) -> None:
        """The scaler is about to unscale the gradients of this optimizer."""

    def before_agree(self, optimizers: Sequence[Optimizer]) -> None:
        """The ranks are about to agree on whether these optimizers step."""


class LossScaler:
    """Scales the loss's gradient, and divides the parameters' gradients by the same number.

    In float16 a number below 6e-8 is zero, and gradients are often that small. So they are
    computed with a scale as large as possible: when a gradient overflows, the step is skipped and
    the scale shrinks; after many steps without overflow it grows.

        loss, grad = cross_entropy(logits, labels)
        pullback(scaler.scale(grad))
        scaler.unscale(optimizer)                       # only to clip or look at gradients
        clip_grad_norm(model.parameters(), 1.0)
        scaler.step(optimizer)
        optimizer.zero_grad()

    Only `step` changes the scale, so all microbatches of a step have the same scale.

    Args:
        initial_scale: the first scale.
        growth_factor: factor by which the scale grows, above 1.
        backoff_factor: factor by which the scale shrinks, between 0 and 1.
        growth_interval: number of steps in a row without overflow after which the scale grows.
        group: more ranks that skip a step together. It is needed only where models on several ranks belong together
            without a strategy: all ranks that have pieces of the parameters, or other stages of a pipeline, skip
            together without it, and with DDP every rank has the same gradients.

    Attributes:
        current_scale: the scale.

    Raises:
        UsageError: a number is out of its range.

    Source: Micikevicius et al., "Mixed Precision Training", 2018, section 3.2. The scale changes as
    that of torch.amp.GradScaler; `step` includes the `update` of that class.
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
        # The optimizers whose gradients are unscaled, and whether these are finite on this rank.
        self._finite: WeakKeyDictionary[Optimizer, bool] = WeakKeyDictionary()
        self._listener: LossScalerListener | None = None

    @contextmanager
    def notifying(self, listener: LossScalerListener) -> Iterator[None]:
        """Call `listener` before each action in the block, so that other ranks can do the same."""
        self._listener = listener
        try:
            yield
        finally:
            self._listener = None

    def scale(self, grad: Arrays) -> Arrays:
        """Multiply the loss's gradient by the scale, in its own dtype, for the pullback."""

        def scaled(leaf: Array) -> Array:
            product: Array = leaf.astype(wide_dtype(leaf.dtype), copy=False) * self.current_scale
            return product.astype(leaf.dtype, copy=False)

        with np.errstate(over="ignore"):  # an overflow makes `step` skip
            return map_leaves(scaled, grad)

    def unscale(self, optimizer: Optimizer) -> None:
        """Divide the gradients of an optimizer by the scale, in place, before its step.

        Call it to use the gradients before the step; otherwise `step` does it. It does not
        communicate.

        Raises:
            UsageError: the gradients are unscaled already; nothing was changed.
        """
        if optimizer in self._finite:
            raise UsageError(
                f"LossScaler: the gradients of this {type(optimizer).__name__} are unscaled "
                "already. Call unscale once before each step, after the last pullback."
            )
        if self._listener is not None:
            self._listener.before_unscale(optimizer)
        grads = [item.grad for item in optimizer.parameters if item.grad is not None]
        self._finite[optimizer] = _unscale(grads, 1 / self.current_scale)

    def step(self, *optimizers: Optimizer) -> bool:
        """Unscale the gradients where needed, step if all are finite, and adapt the scale.

        All ranks that have a part of the model call it, and make the same decision, by one small reduction over each
        group of ranks that share parameters, and one over the stages of a pipeline.

        Args:
            optimizers: all optimizers with gradients of this loss; either all of them step, or none.

        Returns:
            Whether the step was made.

        Raises:
            UsageError: no optimizer was given; or gradients overflow with the smallest scale (raised on all of these
                ranks).
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
        """Find out whether the unscaled gradients are finite on all ranks; adapt the scale.

        This is a part of `step`, for callers that then step their optimizers themselves.
        """
        if self._listener is not None:
            self._listener.before_agree(optimizers)
        flags = [self._finite.pop(optimizer) for optimizer in optimizers]
        finite = self._finite_on_all_ranks(all(flags), optimizers)
        if not finite:  # The step is skipped, so nothing waits for these gradients.
            for optimizer in optimizers:
                optimizer.note_gradients_used()
        self._adapt(finite)
        return finite

    def state_dict(self) -> dict[str, Array]:
        """Copy the state that steps change: "scale" and "steps_in_a_row"."""
        return {
            "scale": np.array(self.current_scale, np.float64),
            "steps_in_a_row": np.array(self._steps_in_a_row, np.int64),
        }

    def load_state_dict(self, state: Mapping[str, Array]) -> None:
        """Restore a state from `state_dict`.

        Raises:
            UsageError: `state` is no such state; nothing was changed.
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

    # -- for a checkpoint, which keeps two numbers better among its values than in a file of arrays -----

    def checkpoint_arrays(self) -> dict[str, Array]:
        """Return {}: there are no arrays."""
        return {}

    def checkpoint_values(self) -> dict[str, float]:
        """Copy the state that steps change, the same on all ranks; see `state_dict`."""
        return {name: value.item() for name, value in self.state_dict().items()}

    def load_checkpoint_values(self, value: Mapping[str, float]) -> None:
        """Restore what `checkpoint_values` copied; see `load_state_dict`."""
        self.load_state_dict({name: np.asarray(number) for name, number in value.items()})

    def _finite_on_all_ranks(self, finite: bool, optimizers: Sequence[Optimizer]) -> bool:
        held = [parameter for optimizer in optimizers for parameter in optimizer.parameters]
        if not held and self._group is None:
            raise UsageError(
                "LossScaler: the optimizers of this rank have no parameters, so it cannot know which ranks decide with "
                "it. Give LossScaler(group=...) all ranks of the model, on each of them."
            )
        xp = namespace_of(held[0].data) if held else np
        for group in self._groups(held):
            finite = bool(group.all_reduce(xp.array(finite, np.uint8), "min"))
        return finite

    def _groups(self, held: Sequence[Parameter]) -> list[ProcessGroup]:
        """List the groups that together connect all ranks which have a part of the parameters.

        One group after another, each takes the result of the one before: pieces of a parameter lie along the axes of a
        mesh, and the stages of a pipeline along another one.
        """
        groups = [split.group for parameter in held for split in parameter.splits]
        groups += [parameter.stages for parameter in held if parameter.stages is not None]
        distinct = {group.global_ranks: group for group in groups if group.world_size > 1}
        if self._group is None:
            return list(distinct.values())
        together = {*self._group.global_ranks}
        return [*(group for ranks, group in distinct.items() if not {*ranks} <= together), self._group]

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
    """Multiply by `inverse` in place; return True if all results are finite."""
    # There is one flag for each kind of array, read at the end, because reading it waits for a GPU.
    flags: dict[ModuleType, Array] = {}
    for grad in grads:
        xp, wide = namespace_of(grad), wide_dtype(grad.dtype)
        flag = flags.setdefault(xp, xp.ones((), bool))
        for _, block in blocks(grad):
            # The product is computed in float32, where neither factor can become zero.
            with np.errstate(over="ignore"):
                block[...] = block.astype(wide, copy=False) * inverse
            flag &= xp.isfinite(block).all()
    return all(map(bool, flags.values()))


def _check_range(name: str, value: float, least: float, most: float) -> None:
    if not least <= value <= most:
        raise UsageError(f"LossScaler: {name} must be from {least} to {most}, got {value}.")
