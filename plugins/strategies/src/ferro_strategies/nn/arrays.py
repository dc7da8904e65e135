"""Arrays of NumPy or CuPy: their type and namespace, half precision, and random initial values."""

from __future__ import annotations

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


def wide_matmul(a: Array, b: Array) -> Array:
    """Multiply matrices of one dtype; the product of half precision is float32, and so not yet rounded."""
    wide = wide_dtype(a.dtype)
    product: Array = namespace_of(a).matmul(a.astype(wide, copy=False), b.astype(wide, copy=False))
    return product


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
    if xp is not np or wide_dtype(a.dtype) == a.dtype:
        product: Array = xp.matmul(a, b, out=out)
        return product
    with quiet_overflow(a.dtype):
        product = wide_matmul(a, b)
        if out is None:
            return product.astype(a.dtype)
        out[...] = product
        return out


def affine(rows: Array, weight: Array, bias: Array | None) -> Array:
    """Compute rows @ weight + bias; half precision is rounded once, at the end.

    Args:
        rows: (n, k).
        weight: (k, m).
        bias: (m,) or None.
    """
    if bias is None or wide_dtype(rows.dtype) == rows.dtype:
        y = matmul(rows, weight)
        if bias is not None:
            y += bias
        return y
    with quiet_overflow(rows.dtype):
        y = wide_matmul(rows, weight)
        y += bias
        return y.astype(rows.dtype)


def conjugate(a: Array) -> Array:
    """Conjugate complex numbers; other arrays are returned as they are."""
    conjugated: Array = a.conj() if a.dtype.kind == "c" else a
    return conjugated
