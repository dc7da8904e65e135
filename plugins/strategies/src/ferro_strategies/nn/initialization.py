"""Initial values of parameters, and deferred building: modules whose parameters do not have their arrays yet."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass
from typing import TypeAlias

import numpy as np
import numpy.typing as npt

from .arrays import Array, Rng

# A function that fills an array with values drawn from a generator. It draws the same number of times each time.
Fill: TypeAlias = Callable[[np.random.Generator, Array], None]

# Values are drawn in blocks of this many float64, so that a large parameter needs no second array of its size.
_BLOCK = 1 << 16

_is_deferring: ContextVar[bool] = ContextVar("is_deferring", default=False)


@dataclass(frozen=True, slots=True)
class DeferredValue:
    """The initial value of a parameter that is drawn when it is needed.

    Attributes:
        shape: that of the array.
        dtype: that of the array.
        draw: makes the array, with the same values each time.
    """

    shape: tuple[int, ...]
    dtype: np.dtype
    draw: Callable[[], Array]


@contextmanager
def deferred() -> Iterator[None]:
    """Build modules without the arrays of their parameters, for models that are larger than this rank's memory.

    with ferro_strategies.deferred():
        model = nn.Sequential(*(nn.Linear(4096, 4096, rng=seed) for seed in range(64)))
    model = FSDP(model, group)          # draws one unit after the other, and keeps this rank's pieces

    The parameters know their `shape` and `dtype`, and how to draw their values, which are those of a model that was
    built as a whole from the same seeds. FSDP, tensor parallelism and Pipeline draw what they keep; elsewhere call
    `model.materialize()`, or load a state. Only what `drawn` makes is deferred, such as the weights of this package's
    layers; small arrays of zeros or ones, buffers, and a parameter that is made of an array, are made at once.
    """
    token = _is_deferring.set(True)
    try:
        yield
    finally:
        _is_deferring.reset(token)


def drawn(fill: Fill, shape: tuple[int, ...], dtype: npt.DTypeLike, rng: Rng) -> Array | DeferredValue:
    """Draw the initial value of a `Parameter`, or inside `deferred()` plan to draw it.

    A generator that is given, and so may be shared by layers, is always advanced now: the values are drawn and thrown
    away. So each layer gets the same values as in a model that is not deferred.

    Args:
        fill: fills the array, see `Fill`.
        shape: that of the array.
        dtype: that of the array.
        rng: a generator, a seed, or None for a new seed.
    """
    dtype = np.dtype(dtype)
    generator = np.random.default_rng(rng)

    def draw(source: np.random.Generator) -> Array:
        array = np.empty(shape, dtype)
        fill(source, array)
        return array

    if not _is_deferring.get():
        return draw(generator)
    kind, state = type(generator.bit_generator), generator.bit_generator.state

    def draw_again() -> Array:
        bits = kind()
        bits.state = state
        return draw(np.random.Generator(bits))

    if generator is rng:
        draw(generator)
    return DeferredValue(shape, dtype, draw_again)


def he_uniform(shape: tuple[int, ...], fan_in: int, dtype: npt.DTypeLike, rng: Rng) -> Array | DeferredValue:
    """Draw from U(-b, b) with b = sqrt(6 / fan_in): a ReLU layer then keeps the variance.

    Values are drawn in float64, so one seed gives the same values in every dtype.
    Source: He et al., "Delving Deep into Rectifiers", 2015, section 2.2.
    """
    bound = math.sqrt(6.0 / fan_in)

    def fill(generator: np.random.Generator, array: Array) -> None:
        for block in _blocks(array):
            block[...] = generator.uniform(-bound, bound, block.size)

    return drawn(fill, shape, dtype, rng)


def standard_normal(
    shape: tuple[int, ...], dtype: npt.DTypeLike, rng: Rng, *, zero_row: int | None = None
) -> Array | DeferredValue:
    """Draw from the standard normal distribution, in float64 as `he_uniform` does.

    Args:
        shape: that of the array.
        dtype: that of the array.
        rng: a generator, a seed, or None for a new seed.
        zero_row: the index along axis 0 of values that are drawn and then set to zero; None: none.
    """

    def fill(generator: np.random.Generator, array: Array) -> None:
        for block in _blocks(array):
            block[...] = generator.standard_normal(block.size)
        if zero_row is not None:
            array[zero_row] = 0

    return drawn(fill, shape, dtype, rng)


def _blocks(array: Array) -> Iterator[Array]:
    flat = array.reshape(array.size)
    for start in range(0, array.size, _BLOCK):
        yield flat[start : start + _BLOCK]
