"""Dropout: set a random part of the input to zero during training."""

from __future__ import annotations

from collections.abc import Callable
from types import ModuleType

import numpy as np

from ferro.errors import UsageError

from .arguments import check_floating
from .arrays import Array, Rng, namespace_of, quiet_overflow, wide_dtype
from .checks import checked_pullback
from .module import Module, Pullback


class Dropout(Module):
    """Set each element to zero with probability p, and scale the others by 1 / (1 - p).

    In evaluation it is the identity. Each `vjp` draws new random numbers; give ranks the same seed
    where they must draw the same numbers, and different seeds elsewhere. Save the generators' states for a training
    that is to go on exactly, see `Module.generator_state_dict`.

    Args:
        p: probability that an element becomes zero, from 0 to 1.
        rng: random generator or seed.

    Source: Srivastava et al., "Dropout", 2014, section 10 (the inverted form).
    """

    def __init__(self, p: float = 0.5, rng: Rng = None) -> None:
        if not 0 <= p <= 1:
            raise UsageError(f"Dropout: p must be from 0 to 1, got {p}.")
        self.p = p
        self.rng = np.random.default_rng(rng)

    def vjp(self, x: Array) -> tuple[Array, Pullback]:
        """Set random elements of `x`, of any shape, to zero."""
        check_floating(self, x)
        drop = self.draw(namespace_of(x), x.shape)
        if drop is None:
            return x, checked_pullback(self, x.shape, lambda grad_y: grad_y)
        return drop(x), checked_pullback(self, x.shape, drop)

    def draw(self, xp: ModuleType, shape: tuple[int, ...]) -> Callable[[Array], Array] | None:
        """Draw the elements that become zero; return the function that sets them to zero and scales the others.

        None instead of the function stands for the identity.
        """
        if not self.training or self.p == 0:
            return None
        scale = 1 / (1 - self.p) if self.p < 1 else 0.0
        keep = xp.asarray(self.rng.random(shape, dtype=np.float32) >= self.p)

        def drop(values: Array) -> Array:
            # In half precision, the scale itself would be rounded, and change the mean.
            wide = values.astype(wide_dtype(values.dtype), copy=False)
            dropped: Array = xp.where(keep, wide, wide.dtype.type(0))  # a product could make NaN of infinity
            dropped *= scale
            with quiet_overflow(values.dtype):
                return dropped.astype(values.dtype, copy=False)

        return drop

    def __repr__(self) -> str:
        return f"Dropout({self.p})"
