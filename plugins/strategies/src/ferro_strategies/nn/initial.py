"""Initial values of parameters."""

from __future__ import annotations

import math
from typing import TypeAlias

import numpy as np
import numpy.typing as npt

from .arrays import Array

# What layers accept as `rng`: a generator to draw from, a seed, or None for a new seed each time.
Rng: TypeAlias = np.random.Generator | int | None


def he_uniform(shape: tuple[int, ...], fan_in: int, dtype: npt.DTypeLike, rng: Rng) -> Array:
    """Draw from U(-b, b) with b = sqrt(6 / fan_in): variance is kept through a ReLU layer.

    The draw is made in float64, so one seed gives the same values in every dtype.
    Source: He et al., "Delving Deep into Rectifiers", 2015, section 2.2.
    """
    bound = math.sqrt(6.0 / fan_in)
    return np.random.default_rng(rng).uniform(-bound, bound, shape).astype(dtype)
