"""Modules made of modules: Sequential and Residual."""

from __future__ import annotations

from ferro.errors import UsageError

from .arrays import Array, quiet_overflow
from .checks import check_gradient, check_input
from .module import Module, Pullback


class Sequential(Module):
    """A chain of modules: each gets the output of the one before.

    Attributes:
        layers: the modules, first to last; a parameter's name is like "layers.0.weight".
    """

    def __init__(self, *modules: Module) -> None:
        self.layers = list(modules)

    def vjp(self, x: Array) -> tuple[Array, Pullback]:
        """Chain the modules; the pullback frees the activations of each module when it has run.

        The pullback ends at a module whose input has no gradient (indices), and returns None.
        """
        pullbacks: list[Pullback] = []
        for layer in self.layers:
            x, pull = layer.vjp(x)
            pullbacks.append(pull)
        depth, shape = len(pullbacks), x.shape

        def pullback(grad_y: Array) -> Array | None:
            if len(pullbacks) != depth:
                raise UsageError(f"{self!r}: this pullback has been run. Call vjp again for another.")
            check_gradient(self, grad_y, shape)
            grad: Array | None = grad_y
            with quiet_overflow(grad_y.dtype):
                while pullbacks and grad is not None:
                    grad = pullbacks.pop()(grad)
            return grad

        return x, pullback

    def __call__(self, x: Array) -> Array:
        """Compute the output alone; an activation lives only until the next layer has run."""
        for layer in self.layers:
            x = layer(x)
        return x

    def __repr__(self) -> str:
        return f"Sequential({', '.join(map(repr, self.layers))})"


class Residual(Module):
    """y = x + module(x), for a module that keeps the shape."""

    def __init__(self, module: Module) -> None:
        self.module = module

    def vjp(self, x: Array) -> tuple[Array, Pullback]:
        """Add the module's output to its input."""
        inner, pull_inner = self.module.vjp(x)
        self._check(x, inner)
        shape = x.shape

        def pullback(grad_y: Array) -> Array:
            check_gradient(self, grad_y, shape)
            with quiet_overflow(grad_y.dtype):
                grad = pull_inner(grad_y)
                # The sum is a new array, because other layers may use either term.
                return grad_y if grad is None else grad_y + grad

        return x + inner, pullback

    def __call__(self, x: Array) -> Array:
        """Compute the output alone."""
        inner = self.module(x)
        self._check(x, inner)
        return x + inner

    def _check(self, x: Array, inner: Array) -> None:
        check_input(self, x, f"{inner.shape}, its module's output", fits=x.shape == inner.shape)

    def __repr__(self) -> str:
        return f"Residual({self.module!r})"
