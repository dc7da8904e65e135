"""UnitHooks and Unit: a module whose parameters are unsharded only while it computes."""

from __future__ import annotations

from typing import NoReturn

from ferro import UsageError

from ..nn.arrays import Array
from ..nn.module import Module, Pullback
from ..nn.trees import Arrays
from .flat_parameter_group import FlatParameterGroup, UnshardedParameters
from .unit_scheduler import UnitScheduler


class UnitHooks:
    """Runs a module's forward and backward pass with its unit's parameters gathered.

    Args:
        unit: the unit's parameters.
        scheduler: the scheduler of the FSDP module around the unit.
    """

    def __init__(self, unit: FlatParameterGroup, scheduler: UnitScheduler) -> None:
        self._unit = unit
        self._scheduler = scheduler

    def vjp(self, module: Module, x: Arrays) -> tuple[Arrays, Pullback]:
        """Compute a module's output, and a pullback that reduces its gradients."""
        scheduler, sync = self._scheduler, self._scheduler.syncs
        scheduler.check()
        with scheduler.forward(self._unit) as kept:
            y, pull = module.vjp(x)
        held: list[tuple[Pullback, UnshardedParameters | None]] = [(pull, kept)]
        del kept, pull  # From here on `held` alone keeps activations and parameters in memory.

        def pullback(grad_y: Arrays) -> Arrays | None:
            if not held:
                raise UsageError("FSDP: this pullback has been run. Call vjp again for another.")
            scheduler.check()
            pull, unsharded = held.pop()
            with scheduler.backward(self._unit, unsharded, sync=sync):
                del unsharded
                return pull(grad_y)

        return y, pullback

    def call(self, module: Module, x: Arrays) -> Arrays:
        """Compute a module's output alone."""
        self._scheduler.check()
        with self._scheduler.forward(self._unit, evaluating=True):
            return module(x)


class Unit(Module):
    """A module inside an FSDP module that is gathered and freed by itself.

    Attributes:
        module: the wrapped module.
    """

    transparent = True

    def __init__(self, module: Module, hooks: UnitHooks) -> None:
        self.module = module
        self.training = module.training
        self._hooks = hooks

    def vjp(self, x: Array) -> tuple[Array, Pullback]:
        """Compute the wrapped module's output and pullback."""
        return self._hooks.vjp(self.module, x)

    def __call__(self, x: Arrays) -> Arrays:
        """Compute the wrapped module's output alone."""
        return self._hooks.call(self.module, x)

    def __deepcopy__(self, memo: dict[int, object]) -> NoReturn:
        """Refuse, because shards belong to a group of ranks."""
        raise copy_error()

    def __repr__(self) -> str:
        return f"Unit({self.module!r})"


def copy_error() -> UsageError:
    """Make the error for an attempt to copy a sharded module."""
    return UsageError(
        "FSDP: a module in pieces cannot be copied: its pieces belong to a group of ranks. Build "
        "a second model, wrap it, and load the full_state_dict() of the first."
    )
