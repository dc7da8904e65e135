"""Checkpoint: keep a module's input instead of its activations, and compute them again."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import numpy as np

from ferro.errors import UsageError

from .arrays import Array
from .module import Module, Pullback
from .parameter import Use


class Checkpoint(Module):
    """The same function as `module`, in less memory and more time: activation checkpointing.

    The forward half keeps its input alone; the pullback makes the forward half again, and then
    runs its pullback. Output and gradients are those of `module`, bit for bit: the second time
    it draws the same random numbers (from the NumPy generators that are attributes of modules),
    finds every module's `training` as it was, and leaves buffers as they are.

    Names are those of the wrapped module, so a state fits with and without Checkpoint.

    Args:
        module: what is computed twice.

    Attributes:
        module: the wrapped module.

    Source: Chen et al., "Training Deep Nets with Sublinear Memory Cost", 2016, section 3.
    """

    transparent = True

    def __init__(self, module: Module) -> None:
        self.module = module
        self.training = module.training

    def vjp(self, x: Array) -> tuple[Array, Pullback]:
        """Compute the wrapped module's output; `x` may not be changed before the pullback."""
        # Held: an old use that the garbage collector takes meanwhile would hide a new one.
        before = [(item, frozenset(item._uses)) for item in self.module.parameters()]
        conditions = _Conditions(self.module)
        y, dropped = self.module.vjp(x)
        # One use of each parameter that took part, until the second pass announces its own.
        uses = [item.use() for item, old in before if item.outstanding_uses > len(old)]
        del dropped
        kept = [(x, conditions, uses)]

        def pullback(grad_y: Array) -> Array | None:
            if not kept:
                raise UsageError(
                    f"{self!r}: this pullback has been run. Call vjp again for another."
                )
            return self._again(*kept.pop())(grad_y)

        return y, pullback

    def __call__(self, x: Array) -> Array:
        """Compute the output alone."""
        return self.module(x)

    def __repr__(self) -> str:
        return f"Checkpoint({self.module!r})"

    def _again(self, x: Array, conditions: _Conditions, uses: list[Use]) -> Pullback:
        with conditions.restored():
            _, pull = self.module.vjp(x)
        uses.clear()  # before the pullback: what it adds last is to be complete
        return pull


class _Conditions:
    """What a forward pass depends on beside input and parameters, as it is when this is made."""

    def __init__(self, module: Module) -> None:
        self._module = module
        self._training = [(item, item.training) for item in module.modules()]
        self._draws = _states(module)

    @contextmanager
    def restored(self) -> Iterator[None]:
        """Bring them back for a while; afterwards all, and the buffers, is as it was."""
        training = [(item, item.training) for item, _ in self._training]
        draws = [(generator, generator.bit_generator.state) for generator, _ in self._draws]
        buffers = [(item.data, item.data.copy()) for item in self._module.buffers()]
        _restore(self._training, self._draws)
        try:
            yield
        finally:
            _restore(training, draws)
            for array, values in buffers:
                array[...] = values


# A bit generator's state is a nested dict of its own making, kept and given back as it is.
_Draws = list[tuple[np.random.Generator, Any]]


def _states(module: Module) -> _Draws:
    """Return the generators that are attributes of modules, each once, and their states."""
    held = (value for item in module.modules() for value in vars(item).values())
    found = {id(value): value for value in held if isinstance(value, np.random.Generator)}
    return [(generator, generator.bit_generator.state) for generator in found.values()]


def _restore(training: list[tuple[Module, bool]], draws: _Draws) -> None:
    for module, flag in training:
        module.training = flag
    for generator, state in draws:
        generator.bit_generator.state = state
