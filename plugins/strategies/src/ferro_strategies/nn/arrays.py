"""The arrays that layers work on, and the namespace (NumPy or CuPy) that computes on them."""

from __future__ import annotations

import math
from contextlib import AbstractContextManager, nullcontext
from types import ModuleType
from typing import Any, TypeAlias

import numpy as np
import numpy.typing as npt

from ferro.errors import UsageError

# Element types are checked at run time. A CuPy array goes by the same name, for it has the same
# methods, and CuPy need not be installed for this code to be type-checked.
Array: TypeAlias = npt.NDArray[Any]

# What layers accept as `rng`: a generator to draw from, a seed, or None for a new seed each time.
Rng: TypeAlias = np.random.Generator | int | None


def namespace_of(array: Array) -> ModuleType:
    """Return the module whose functions work on `array`: numpy, or cupy for a CuPy array.

    Raises:
        UsageError: it is neither a NumPy nor a CuPy array.
    """
    if isinstance(array, np.ndarray):
        return np
    kind = type(array)
    if kind.__module__.partition(".")[0] == "cupy":
        import cupy  # present, since the array is its own

        namespace: ModuleType = cupy
        return namespace
    raise UsageError(
        f"expected a NumPy or CuPy array, got {kind.__module__}.{kind.__qualname__}. "
        "Convert it first, for instance with numpy.asarray."
    )


def wide_dtype(dtype: npt.DTypeLike) -> np.dtype:
    """Return the dtype to compute in: float32 for half precision, otherwise the same."""
    return np.promote_types(dtype, np.float32)


def quiet_overflow(dtype: npt.DTypeLike) -> AbstractContextManager[object]:
    """Return a context in which NumPy does not warn of overflow, if `dtype` is half precision.

    Gradients in half precision overflow in the normal course: a LossScaler finds it in those of
    the parameters, and skips the step. In wider types it is news.
    """
    if wide_dtype(dtype) == dtype:
        return nullcontext()
    return np.errstate(over="ignore", invalid="ignore")


def matmul(a: Array, b: Array, *, out: Array | None = None) -> Array:
    """Multiply two matrices of one dtype; the product has it, too.

    NumPy multiplies half precision element by element, 40 times slower than by way of float32,
    and bfloat16 not at all.

    Args:
        a: (..., n, k).
        b: (..., k, m).
        out: (..., n, m), where to put the product; None: a new array.
    """
    xp = namespace_of(a)
    wide = wide_dtype(a.dtype)
    if xp is not np or wide == a.dtype:
        product: Array = xp.matmul(a, b, out=out)
        return product
    with quiet_overflow(a.dtype):
        product = np.matmul(a.astype(wide), b.astype(wide))
        if out is None:
            return product.astype(a.dtype)
        out[...] = product
        return out


def he_uniform(shape: tuple[int, ...], fan_in: int, dtype: npt.DTypeLike, rng: Rng) -> Array:
    """Draw from U(-b, b) with b = sqrt(6 / fan_in): variance is kept through a ReLU layer.

    The draw is made in float64, so one seed gives the same values in every dtype.
    Source: He et al., "Delving Deep into Rectifiers", 2015, section 2.2.
    """
    bound = math.sqrt(6.0 / fan_in)
    return np.random.default_rng(rng).uniform(-bound, bound, shape).astype(dtype)
