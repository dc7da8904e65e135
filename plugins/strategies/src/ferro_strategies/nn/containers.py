"""Modules made of modules: Sequential and Residual."""

from __future__ import annotations

import operator
from collections.abc import Iterable, Iterator
from typing import Self, SupportsIndex, overload

import numpy as np

from ferro.errors import UsageError

from .arrays import Array
from .checks import check_gradient, check_input_gradient
from .module import Module, Pullback
from .trees import Arrays, Shapes, has_gradient, map_leaves, quiet_overflow_in, shapes_of


def checked_module(container: str, module: Module) -> Module:
    """Return a module that a container is made of.

    Raises:
        UsageError: it is no module, such as a class or a function.
    """
    if isinstance(module, Module):
        return module
    kind = module.__name__ if isinstance(module, type) else type(module).__name__
    what = f"the class {kind}; make a module of it: {kind}(...)" if isinstance(module, type) else f"a {kind}"
    raise UsageError(f"{container} is made of modules, one argument each; got {what}.")


class Sequential(Module):
    """A chain of modules: each gets the output of the one before.

    It is used like a list of its modules: `model[0]`, `model[-1] = layer`, `model[2:]` (a Sequential of the same module
    objects), `del model[1]`, `len(model)`, `for layer in model`, and with `append`, `insert` and `extend`. Change it
    before a strategy wraps it, and before an optimizer is made.

    Attributes:
        layers: the modules, first to last; a parameter's name is like "layers.0.weight".
        first_layer: in a stage from `split_model`, the index of the first of these modules in the model that was split.

    Raises:
        UsageError: an item is no module.
    """

    first_layer: int | None = None

    def __init__(self, *modules: Module) -> None:
        self.layers = [self._checked(module) for module in modules]

    @overload
    def __getitem__(self, index: SupportsIndex) -> Module: ...

    @overload
    def __getitem__(self, index: slice) -> Sequential: ...

    def __getitem__(self, index: SupportsIndex | slice) -> Module:
        """Return one module, or a Sequential of several, which shares them."""
        if isinstance(index, slice):
            part = Sequential(*self.layers[index])
            part.training = self.training
            return part
        return self.layers[index]

    def __setitem__(self, index: SupportsIndex, module: Module) -> None:
        """Replace one module."""
        self.layers[index] = self._checked(module)

    def __delitem__(self, index: SupportsIndex | slice) -> None:
        """Remove one module or several."""
        del self.layers[index]

    def __len__(self) -> int:
        """Count the modules."""
        return len(self.layers)

    def __iter__(self) -> Iterator[Module]:
        """Yield the modules, first to last."""
        return iter(self.layers)

    def __bool__(self) -> bool:
        """Return True, also without modules: a model is no empty list."""
        return True

    def append(self, module: Module) -> Self:
        """Add a module at the end; returns the chain."""
        return self.extend((module,))

    def insert(self, index: SupportsIndex, module: Module) -> Self:
        """Add a module before the one at `index`; returns the chain."""
        self.layers.insert(index, self._checked(module))
        return self

    def extend(self, modules: Iterable[Module]) -> Self:
        """Add modules at the end, all or, if an item is no module, none; returns the chain."""
        self.layers += [self._checked(module) for module in modules]
        return self

    @staticmethod
    def _checked(module: Module) -> Module:
        return checked_module("Sequential", module)

    def vjp(self, x: Arrays) -> tuple[Arrays, Pullback]:
        """Chain the modules; the pullback frees the activations of each module when it has run.

        Inputs and outputs may be trees of arrays. The pullback ends at a module whose input has no gradient (indices),
        and returns None. Each gradient is checked against the array that it belongs to.
        """
        parts: list[tuple[Module, Pullback, Shapes]] = []
        for layer in self.layers:
            taken = x.shape if type(x) is np.ndarray else shapes_of(x)
            x, pull = layer.vjp(x)
            parts.append((layer, pull, taken))
        depth, shape = len(parts), shapes_of(x)

        def pullback(grad_y: Arrays) -> Arrays | None:
            if len(parts) != depth:
                raise UsageError(f"{self!r}: this pullback has been run. Call vjp again for another.")
            check_gradient(self, grad_y, shape)
            grad: Arrays | None = grad_y
            with quiet_overflow_in(grad_y):
                while parts and grad is not None:
                    layer, pull, taken = parts[-1]
                    # A layer that refuses the output's gradient leaves the pullback as it was, to be run again.
                    grad = pull(grad)
                    parts.pop()
                    if type(grad) is not np.ndarray or grad.shape != taken:
                        check_input_gradient(layer, grad, taken)
                        grad = grad if has_gradient(grad) else None
            # No gradient comes to the modules before indices, so their activations and uses are not needed any more.
            parts.clear()
            return grad

        return x, pullback

    def __call__(self, x: Arrays) -> Arrays:
        """Compute the output alone; an activation lives only until the next layer has run."""
        for layer in self.layers:
            x = layer(x)
        return x

    def __repr__(self) -> str:
        return f"Sequential({', '.join(map(repr, self.layers))})"


class Residual(Module):
    """y = x + module(x), for a module that keeps the shape, or the structure and shapes of a tree of arrays."""

    def __init__(self, module: Module) -> None:
        self.module = checked_module("Residual", module)

    def vjp(self, x: Arrays) -> tuple[Arrays, Pullback]:
        """Add the module's output to its input."""
        inner, pull_inner = self.module.vjp(x)
        shape = self._check(x, inner)

        def pullback(grad_y: Arrays) -> Arrays:
            check_gradient(self, grad_y, shape)
            with quiet_overflow_in(grad_y):
                grad = pull_inner(grad_y)
                check_input_gradient(self.module, grad, shape)
                # The sum is a new array, because other layers may use either term.
                return grad_y if grad is None else map_leaves(_add_gradients, grad_y, grad)

        return map_leaves(operator.add, x, inner), pullback

    def __call__(self, x: Arrays) -> Arrays:
        """Compute the output alone."""
        inner = self.module(x)
        self._check(x, inner)
        return map_leaves(operator.add, x, inner)

    def _check(self, x: Arrays, inner: Arrays) -> Shapes:
        taken, made = shapes_of(x), shapes_of(inner)
        if taken != made:
            raise UsageError(f"{self!r}: expected input of shape {made}, its module's output, got {taken}.")
        return taken

    def __repr__(self) -> str:
        return f"Residual({self.module!r})"


def _add_gradients(outer: Array, inner: Array | None) -> Array:
    return outer if inner is None else outer + inner
