"""Optimizer: the base of SGD and AdamW, with parameters, state, and updates in place."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable, Iterator, Mapping

import numpy as np

from ferro.errors import UsageError

from ..nn.arrays import Array, namespace_of, quiet_overflow
from ..nn.checks import first_few
from ..nn.parameter import Parameter, check_step

# An update works on blocks of this many elements. On a CPU a block of each array stays in the cache from one operation
# to the next, and the scratch memory is small; a GPU needs large operations.
_CPU_BLOCK = 1 << 15
_GPU_BLOCK = 1 << 24


class Optimizer(ABC):
    """The base of optimizers, which change parameters in place by their gradients.

    Attributes:
        parameters: the parameters, in the order given.
        lr: learning rate; assign to it to follow a schedule.
        state: for each parameter, the arrays that the optimizer keeps, by name; empty before the
            parameter's first step.

    Raises:
        UsageError: `parameters` is empty, repeats a parameter, or holds another object, or `lr` is
            negative.
    """

    def __init__(self, parameters: Iterable[Parameter], lr: float) -> None:
        self.parameters = list(parameters)
        name = type(self).__name__
        if not self.parameters:
            raise UsageError(f"{name}: there are no parameters. Pass module.parameters().")
        seen: set[int] = set()
        for index, parameter in enumerate(self.parameters):
            if not isinstance(parameter, Parameter):
                kind = type(parameter).__name__
                raise UsageError(f"{name}: item {index} is a {kind}, not a Parameter.")
            if id(parameter) in seen:
                raise UsageError(f"{name}: item {index}, {parameter!r}, is given twice.")
            seen.add(id(parameter))
            parameter.add_state_owner(self)
        check_at_least_zero(name, lr=lr)
        self.lr = lr
        self.state: list[dict[str, Array]] = [{} for _ in self.parameters]
        self._listeners: list[Callable[[], None]] = []

    def before_step(self, listener: Callable[[], None]) -> Callable[[], None]:
        """Call `listener()` at the start of every step; returns a function that removes it."""
        self._listeners.append(listener)
        return lambda: self._listeners.remove(listener)

    def step(self) -> None:
        """Update every parameter that has a gradient; other parameters and their state stay."""
        for listener in tuple(self._listeners):
            listener()
        check_step(self.parameters, self.lr)
        for parameter, state in zip(self.parameters, self.state, strict=True):
            grad = parameter.grad
            if grad is not None:
                if not state:
                    state.update(self._initial_state(parameter.data))
                if grad.dtype != parameter.data.dtype:
                    with quiet_overflow(parameter.data.dtype):
                        grad = grad.astype(parameter.data.dtype)
                self._update(parameter.data, grad, state)

    def zero_grad(self) -> None:
        """Mark every parameter's gradient absent."""
        for parameter in self.parameters:
            parameter.zero_grad()

    def state_dict(self) -> dict[str, Array]:
        """Copy the state that steps change: "lr", and "<index>.<name>" for each parameter.

        An index is the position in `parameters`. Settings made at construction are not included.
        """
        state = {"lr": np.array(self.lr, np.float64)}
        for index, arrays in enumerate(self.state):
            state |= {f"{index}.{name}": array.copy() for name, array in arrays.items()}
        return state

    def load_state_dict(self, state: Mapping[str, Array]) -> None:
        """Restore a state from `state_dict`, into an optimizer of parameters of the same shapes.

        Raises:
            UsageError: a name is missing or unexpected, or a shape or dtype differs; the first
                few of each are listed, and nothing was changed.
        """
        rest, faults = dict(state), []
        lr = rest.pop("lr", None)
        if lr is None or lr.shape != ():
            faults.append("'lr' is missing or no single number")
        loaded: list[dict[str, Array]] = []
        for index, parameter in enumerate(self.parameters):
            fresh = self._initial_state(parameter.data)
            given = {name: rest.pop(f"{index}.{name}", None) for name in fresh}
            loaded.append({})
            if all(array is None for array in given.values()):
                continue  # saved before this parameter's first step
            for name, here in fresh.items():
                there = given[name]
                if there is None:
                    faults.append(f"missing '{index}.{name}'")
                elif (here.shape, here.dtype) != (there.shape, there.dtype):
                    faults.append(f"'{index}.{name}' is {here.dtype} {here.shape}, given {there.dtype} {there.shape}")
                else:
                    here[...] = namespace_of(here).asarray(there)
                    loaded[index][name] = here
        unexpected = [f"unexpected {name!r}" for name in rest]
        faults = [*first_few(faults), *first_few(unexpected)]
        if faults or lr is None:
            raise UsageError(
                f"load_state_dict: the state does not fit this {type(self).__name__} of "
                f"{len(self.parameters)} parameters: {'; '.join(faults)}. Nothing was loaded."
            )
        self.lr, self.state = float(lr), loaded

    @abstractmethod
    def _initial_state(self, data: Array) -> dict[str, Array]:
        """Make the state of a parameter with this value before its first step."""

    @abstractmethod
    def _update(self, data: Array, grad: Array, state: dict[str, Array]) -> None:
        """Make one step: change `data` and `state` in place, and leave `grad` as it is."""


def blocks(data: Array, *others: Array) -> Iterator[tuple[Array, ...]]:
    """Cut C-contiguous arrays of one size into matching blocks, and add a scratch block.

    Yields:
        (scratch, block of data, block of each other array), one-dimensional. The scratch block is
        the same memory each time, of the dtype of `data`, with arbitrary content.
    """
    xp = namespace_of(data)
    size = min(data.size, _CPU_BLOCK if xp is np else _GPU_BLOCK)
    scratch = xp.empty(size, data.dtype)
    flat = [array.reshape(array.size) for array in (data, *others)]
    for start in range(0, data.size, max(size, 1)):
        parts = [array[start : start + size] for array in flat]
        yield (scratch[: parts[0].size], *parts)


def check_at_least_zero(optimizer: str, **settings: float) -> None:
    """Refuse settings below zero or NaN.

    Raises:
        UsageError: a setting is negative or NaN; the message names the optimizer and the setting.
    """
    for name, value in settings.items():
        if not value >= 0:
            raise UsageError(f"{optimizer}: {name} must be at least 0, got {value}.")
