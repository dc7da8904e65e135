"""Unit: a module whose parameters are whole while it computes, and pieces otherwise."""

from __future__ import annotations

from typing import NoReturn

from ferro import UsageError

from ..nn.arrays import Array
from ..nn.module import Module, Pullback
from .gathered import Gathered, Shards
from .passes import Passes


class Pacer:
    """Gathers a unit's parameters for each half of a module's passes.

    Args:
        shards: the unit's parameters.
        passes: of the FSDP module around the unit.
    """

    def __init__(self, shards: Shards, passes: Passes) -> None:
        self._shards = shards
        self._passes = passes

    def vjp(self, module: Module, x: Array) -> tuple[Array, Pullback]:
        """Compute a module's output and pullback, which reduces its gradients."""
        passes, sync = self._passes, self._passes.syncs
        passes.check()
        with passes.forward(self._shards) as kept:
            y, pull = module.vjp(x)
        held: list[tuple[Pullback, Gathered | None]] = [(pull, kept)]
        del kept, pull

        def pullback(grad_y: Array) -> Array | None:
            if not held:
                raise UsageError("FSDP: this pullback has been run. Call vjp again for another.")
            passes.check()
            pull, gathered = held.pop()
            with passes.backward(self._shards, gathered, sync=sync):
                del gathered
                return pull(grad_y)

        return y, pullback

    def call(self, module: Module, x: Array) -> Array:
        """Compute a module's output alone."""
        self._passes.check()
        with self._passes.forward(self._shards):
            return module(x)


class Unit(Module):
    """A module inside an FSDP module that is gathered and freed by itself.

    Attributes:
        module: the wrapped module.
    """

    transparent = True

    def __init__(self, module: Module, pacer: Pacer) -> None:
        self.module = module
        self.training = module.training
        self._pacer = pacer

    def vjp(self, x: Array) -> tuple[Array, Pullback]:
        """Compute the wrapped module's output and pullback."""
        return self._pacer.vjp(self.module, x)

    def __call__(self, x: Array) -> Array:
        """Compute the wrapped module's output alone."""
        return self._pacer.call(self.module, x)

    def __deepcopy__(self, memo: dict[int, object]) -> NoReturn:
        """Refuse."""
        raise no_copy()

    def __repr__(self) -> str:
        return f"Unit({self.module!r})"


def no_copy() -> UsageError:
    """Return the error of who copies what only exists in pieces."""
    return UsageError(
        "FSDP: a module in pieces cannot be copied: its pieces belong to a group of ranks. Build "
        "a second model, wrap it, and load the full_state_dict() of the first."
    )
