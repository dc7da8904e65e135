"""Dropout: silence a random part of the input while training."""

from __future__ import annotations

import numpy as np

from ferro.errors import UsageError

from .arrays import Array, Rng, namespace_of
from .module import Module, Pullback


class Dropout(Module):
    """Set each element to zero with probability p, and scale the others by 1 / (1 - p).

    The identity in evaluation. Each `vjp` draws anew; ranks that must draw alike share a seed,
    others take different ones.

    Args:
        p: probability of silence, 0 to 1.
        rng: generator or seed.

    Source: Srivastava et al., "Dropout", 2014, section 10 (the inverted form).
    """

    def __init__(self, p: float = 0.5, rng: Rng = None) -> None:
        if not 0 <= p <= 1:
            raise UsageError(f"Dropout: p must be from 0 to 1, got {p}.")
        self.p = p
        self.rng = np.random.default_rng(rng)

    def vjp(self, x: Array) -> tuple[Array, Pullback]:
        """Silence elements of `x`, of any shape."""
        if not self.training or self.p == 0:
            return x, lambda grad_y: grad_y
        scale = 1 / (1 - self.p) if self.p < 1 else 0.0
        keep = namespace_of(x).asarray(self.rng.random(x.shape, dtype=np.float32) >= self.p)

        def mask(values: Array) -> Array:
            masked: Array = values * keep
            masked *= scale
            return masked

        return mask(x), mask

    def __repr__(self) -> str:
        return f"Dropout({self.p})"
