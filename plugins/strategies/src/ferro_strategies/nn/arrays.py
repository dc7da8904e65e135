"""Arrays of NumPy or CuPy: their type and namespace, half precision, and random initial values."""

from __future__ import annotations

import math
from contextlib import AbstractContextManager, nullcontext
from types import ModuleType
from typing import Any, TypeAlias

import numpy as np
import numpy.typing as npt

from ferro.arrays import lost_meaning
from ferro.errors import UsageError

# The type stands for CuPy arrays, too: they have the same methods, and type-checking this code must not need CuPy.
# Dtypes are checked at run time.
Array: TypeAlias = npt.NDArray[Any]

# Layers accept as `rng` a random generator, a seed, or None for a new seed each time.
Rng: TypeAlias = np.random.Generator | int | None


def namespace_of(array: Array) -> ModuleType:
    """Return the module whose functions work on `array`: numpy, or cupy for a CuPy array.

    Raises:
        UsageError: `array` is neither a NumPy nor a CuPy array, or means more than its numbers, as masked arrays do.
    """
    if type(array) is np.ndarray:
        return np
    if hasattr(array, "full_tensor"):
        raise UsageError(
            "expected a plain array, got a DTensor, which has no gradients: pass .local where that is right for each "
            "part, or full_tensor(). ferro_strategies.tensor_parallel has layers that are split over ranks."
        )
    if problem := lost_meaning(array):
        raise UsageError(f"expected a plain array, got {problem}.")
    if isinstance(array, np.ndarray):
        return np
    kind = type(array)
    if kind.__module__.partition(".")[0] == "cupy":
        import cupy  # the array proves that it is installed

        namespace: ModuleType = cupy
        return namespace
    raise UsageError(
        f"expected a NumPy or CuPy array, got {kind.__module__}.{kind.__qualname__}. "
        "Convert it first, for instance with numpy.asarray."
    )


def wide_dtype(dtype: npt.DTypeLike) -> np.dtype:
    """Choose the dtype to compute in: float32 for half precision, otherwise the same."""
    return np.promote_types(dtype, np.float32)


def quiet_overflow(dtype: npt.DTypeLike) -> AbstractContextManager[object]:
    """Make a context in which NumPy does not warn of overflow, if `dtype` is half precision.

    Gradients in half precision may overflow: a LossScaler then finds infinities in the parameters'
    gradients, and skips the step. In wider dtypes an overflow is unexpected.
    """
    if wide_dtype(dtype) == dtype:
        return nullcontext()
    return np.errstate(over="ignore", invalid="ignore")


def matmul(a: Array, b: Array, *, out: Array | None = None) -> Array:
    """Multiply two matrices of one dtype; the product has the same dtype.

    Half precision is multiplied in float32: NumPy itself takes 40 times as long for float16, and
    cannot multiply bfloat16 matrices.

    Args:
        a: (..., n, k).
        b: (..., k, m).
        out: (..., n, m), array for the product; None: a new array.
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
    """Draw from U(-b, b) with b = sqrt(6 / fan_in): a ReLU layer then keeps the variance.

    Values are drawn in float64, so one seed gives the same values in every dtype.
    Source: He et al., "Delving Deep into Rectifiers", 2015, section 2.2.
    """
    bound = math.sqrt(6.0 / fan_in)
    return np.random.default_rng(rng).uniform(-bound, bound, shape).astype(dtype)
