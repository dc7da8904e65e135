"""Samples: arrays that are determined by rank and size, and the results that collectives must give.

Elements are small whole numbers, so every sum and product that the checks form is exact in every
dtype and the results can be compared bit for bit.
"""

from __future__ import annotations

import functools
import importlib
import importlib.util
import math
import threading
from collections.abc import Callable, Sequence
from typing import ParamSpec, TypeAlias, TypeVar

import numpy as np

from ferro.types import Array

Shape: TypeAlias = tuple[int, ...]
_P = ParamSpec("_P")
_T = TypeVar("_T")

BFLOAT16 = "bfloat16"  # NumPy knows it only with the package ml_dtypes
DTYPES = (
    "bool",
    "int8",
    "int16",
    "int32",
    "int64",
    "uint8",
    "uint16",
    "uint32",
    "uint64",
    "float16",
    BFLOAT16,
    "float32",
    "float64",
    "complex64",
    "complex128",
)
# 0-d, empty, one element, sizes that few world sizes divide, several dimensions, one of them empty.
SHAPES: tuple[Shape, ...] = ((), (0,), (1,), (7,), (3, 5), (2, 3, 5), (3, 0, 2))
LARGE = 300_001  # elements: several segments, the last of them shorter

_UFUNCS: dict[str, np.ufunc] = {
    "sum": np.add,
    "mean": np.add,
    "prod": np.multiply,
    "min": np.minimum,
    "max": np.maximum,
    "band": np.bitwise_and,
    "bor": np.bitwise_or,
    "bxor": np.bitwise_xor,
}
_HALF = ("float16", BFLOAT16)


def dtype_of(name: str) -> np.dtype:
    """Return a dtype by name; bfloat16 and float8 need the package ml_dtypes."""
    return np.dtype(getattr(importlib.import_module("ml_dtypes"), name) if _of_ml_dtypes(name) else name)


def known(names: Sequence[str]) -> tuple[str, ...]:
    """Return the names whose dtypes are installed: bfloat16 and float8 need ml_dtypes."""
    is_there = importlib.util.find_spec("ml_dtypes") is not None
    return tuple(name for name in names if is_there or not _of_ml_dtypes(name))


def _of_ml_dtypes(name: str) -> bool:
    return name == BFLOAT16 or name.startswith("float8")


def reductions(dtype: str) -> tuple[str, ...]:
    """Return the names of the reductions that are defined for a dtype."""
    kind = dtype_of(dtype).kind
    if kind in "iub":
        return ("sum", "prod", "min", "max", "band", "bor", "bxor")
    return ("sum", "mean", "prod") if kind == "c" else ("sum", "mean", "prod", "min", "max")


def preferred(dtype: str, dtypes: Sequence[str]) -> str:
    """Return `dtype` where it is among `dtypes`, else the first of them."""
    return dtype if dtype in dtypes else dtypes[0]


def computed_once(maxsize: int) -> Callable[[Callable[_P, _T]], Callable[_P, _T]]:
    """Keep the last results of a function; of ranks that are threads and ask at the same time, one computes."""

    def decorate(function: Callable[_P, _T]) -> Callable[_P, _T]:
        cached, lock = functools.lru_cache(maxsize)(function), threading.Lock()

        @functools.wraps(function)
        def call(*args: _P.args, **kwargs: _P.kwargs) -> _T:
            with lock:
                return cached(*args, **kwargs)  # type: ignore[arg-type]  # the arguments can be hashed

        return call

    return decorate


@computed_once(maxsize=256)
def sample(rank: int, shape: Shape, dtype: str, salt: int = 0) -> Array:
    """Return the array that `rank` gives: 1, 2, 3 in an order that depends on rank and salt.

    It is read-only, so that writing to it raises.
    """
    whole = (np.arange(11) * 5 + rank * 7 + salt * 3) % 11 % 3  # a period
    values = whole % 2 == 0 if dtype == "bool" else whole + 1
    if dtype.startswith("complex"):
        values = values + 1j * (whole % 2)
    size = math.prod(shape)
    array: Array = np.tile(values.astype(dtype_of(dtype)), -(-size // 11))[:size].reshape(shape)
    array.flags.writeable = False
    return array


def reduced(arrays: Sequence[Array], op: str) -> Array:
    """Reduce one array of each rank, in order of rank; half precision is accumulated in float32."""
    dtype = arrays[0].dtype
    half = dtype.name in _HALF and op in ("sum", "mean", "prod")
    operands = [array.astype(np.float32) if half else array for array in arrays]
    total = functools.reduce(lambda a, b: np.asarray(_UFUNCS[op](a, b)), operands)
    if op == "mean":
        parts = total.reshape(-1).view(total.real.dtype)
        total = (parts / np.asarray(len(arrays), parts.dtype)).view(total.dtype).reshape(total.shape)
    array: Array = total.astype(dtype)
    return array


@computed_once(maxsize=64)
def reduced_samples(ranks: int, shape: Shape, dtype: str, op: str, salt: int = 0) -> Array:
    """Reduce the samples of the first ranks, in order of rank."""
    return reduced([sample(rank, shape, dtype, salt) for rank in range(ranks)], op)


@computed_once(maxsize=16)
def reduced_noise(ranks: int, count: int, dtype: str, op: str) -> Array:
    """Reduce the noise of the first ranks, in order of rank."""
    return reduced([noise(rank, count, dtype) for rank in range(ranks)], op)


def rows(array: Array) -> Array:
    """Return an array with an axis 0 to concatenate along: a 0-d array becomes one row."""
    return array.reshape(1) if array.ndim == 0 else array


def in_blocks(shape: Shape, n: int) -> Shape:
    """Return a shape that n ranks can cut: n times the rows, or about as many when it is large."""
    count = shape[0] // n * n if shape[0] >= LARGE else shape[0] * n
    return (count, *shape[1:])


def noise(rank: int, count: int, dtype: str) -> Array:
    """Return floating-point numbers of all magnitudes, whose sum depends on the order."""
    array: Array = _noise(rank, count).astype(dtype_of(dtype))
    return array


@computed_once(maxsize=16)
def _noise(rank: int, count: int) -> Array:
    random = np.random.default_rng(1000 + rank)
    return random.standard_normal(count) * 10.0 ** random.integers(-3, 4, count)


class Findings:
    """The mistakes that a rank found; only the first few are kept, since one mistake tends to show often."""

    KEPT = 5

    def __init__(self, rank: int) -> None:
        self._rank = rank
        self._found: list[str] = []
        self._count = 0

    def same(self, found: object, wanted: Array, what: str) -> None:
        """Note a mistake unless a result has the shape, dtype and values wanted, bit for bit."""
        if not isinstance(found, np.ndarray):
            self.note(f"{what}: got {type(found).__name__} in place of an array")
        elif found.shape != wanted.shape or found.dtype != wanted.dtype:
            self.note(f"{what}: got {found.dtype}{found.shape}, not {wanted.dtype}{wanted.shape}")
        elif found.tobytes() != wanted.tobytes():
            at = int(np.argmax((found != wanted).reshape(-1)))
            self.note(
                f"{what}: {int(np.count_nonzero(found != wanted))} of {found.size} elements "
                f"differ; element {at} is {found.reshape(-1)[at]}, not {wanted.reshape(-1)[at]}"
            )

    def true(self, holds: bool, what: str) -> None:
        """Note a mistake unless a condition holds."""
        if not holds:
            self.note(what)

    def note(self, what: str) -> None:
        """Note a mistake."""
        self._count += 1
        if len(self._found) < self.KEPT:
            self._found.append(f"rank {self._rank}: {what}")

    def report(self) -> list[str]:
        """Return all mistakes, in words."""
        more = self._count - len(self._found)
        return [*self._found, f"rank {self._rank}: and {more} more"] if more else self._found
