"""Flatten: one row per example."""

from __future__ import annotations

import math

from .arrays import Array
from .checks import check_input
from .module import Module, Pullback


class Flatten(Module):
    """Reshape (N, ...) to (N, features), for the layers that take rows."""

    def vjp(self, x: Array) -> tuple[Array, Pullback]:
        """Join all dimensions but the first."""
        check_input(self, x, "(N, ...)", fits=x.ndim >= 1)
        y = x.reshape(x.shape[0], math.prod(x.shape[1:]))
        return y, lambda grad_y: grad_y.reshape(x.shape)

    def __repr__(self) -> str:
        return "Flatten()"
