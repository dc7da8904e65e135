"""The one door from a user's array to a buffer, and back.

NumPy and CuPy arrays enter as they are; anything else that speaks DLPack (a torch tensor, a JAX
array) enters without a copy and its result leaves as its own kind; numbers and lists become
NumPy arrays.
"""

from __future__ import annotations

import importlib
import sys
from collections.abc import Callable
from functools import lru_cache
from typing import TYPE_CHECKING, Protocol, TypeAlias, cast, runtime_checkable

import numpy as np

from ferro.errors import UnsupportedError, UsageError
from ferro.types import Array, Device

if TYPE_CHECKING:
    import numpy.typing as npt


@runtime_checkable
class SupportsDLPack(Protocol):
    """An array of any library that can be exchanged without a copy."""

    def __dlpack__(self) -> object:
        """Return the capsule."""

    def __dlpack_device__(self) -> tuple[int, int]:
        """Return the device."""


Input: TypeAlias = "npt.ArrayLike | SupportsDLPack"

# What collectives carry; bfloat16 is known by its name, for its package may be absent.
_KINDS = "biufc"
_EXTENDED = ("bfloat16",)
_CPU_DLPACK = 1

# Looked up in each call; of an enumeration it takes several times as long.
_ndarray = np.ndarray
_CPU, _CUDA = Device.CPU, Device.CUDA

# How a result leaves as the kind of array that came in; None for NumPy's and CuPy's own.
_Leave: TypeAlias = "Callable[[Array], object] | None"


class InputArray:
    """A user's array on its way through a call.

    Attributes:
        array: the same memory as a NumPy (or CuPy) array.
        device: where that memory is.
        copied: `array` is a copy on the host of the user's array on a GPU.
    """

    __slots__ = ("_leave", "array", "copied", "device")

    def __init__(self, value: Input, *, what: str = "input") -> None:
        """Take an array in.

        Args:
            value: the user's array, number or list.
            what: its name, for messages.

        Raises:
            UsageError: it is not an array.
            UnsupportedError: its dtype or device cannot be carried.
        """
        if type(value) is _ndarray and not objection(value.dtype):
            self.array, self.device, self._leave = value, _CPU, None
        else:
            self.array, self.device, self._leave = _opened(value, what)
        self.copied = False

    def empty(self, shape: tuple[int, ...]) -> Array:
        """Return new memory of the same dtype, on the same device."""
        if self.device is _CUDA:
            empty: Array = sys.modules["cupy"].empty(shape, self.array.dtype)
            return empty
        return np.empty(shape, self.array.dtype)

    def through_host(self) -> None:
        """Move to the CPU a GPU array for which the user asked for host copies."""
        cupy = sys.modules["cupy"]
        self.array = cupy.asnumpy(self.array)
        self._leave = cupy.asarray
        self.device = _CPU
        self.copied = True

    def leave(self, result: Array) -> object:
        """Return a result as the kind of array that came in."""
        return result if self._leave is None else self._leave(result)


def writable(
    value: object, shape: tuple[int, ...], dtype: np.dtype, device: Device = Device.CPU, what: str = "out"
) -> Array:
    """Return `out` as an array that can be written in place.

    Raises:
        UsageError: it is read-only, not contiguous, or not of this shape, dtype and device.
    """
    array: Array
    if type(value) is _ndarray:  # whose dtype is compared below
        array, found = value, _CPU
    elif (
        isinstance(value, np.ndarray)
        or type(value).__module__.startswith("cupy")  # asking a protocol takes microseconds
        or isinstance(value, SupportsDLPack)
    ):
        array, found, _ = _opened(cast("Input", value), what)
    else:
        raise UsageError(f"{what} must be an array, not {type(value).__name__}")
    if found is not device:
        raise UsageError(f"{what} is on device {found}, the result on {device}")
    if array.shape != shape or array.dtype != dtype:
        raise UsageError(
            f"{what} has shape {array.shape} and dtype {array.dtype}; the result has shape {shape} and dtype {dtype}"
        )
    flags = array.flags
    if not flags.c_contiguous:
        raise UsageError(f"{what} is not contiguous: pass a contiguous array")
    if not getattr(flags, "writeable", True):  # CuPy's flags have no such attribute
        raise UsageError(f"{what} is read-only: pass a writable array")
    return array


def device_of(array: Array) -> Device:
    """Return where a NumPy or CuPy array is."""
    return _CPU if isinstance(array, np.ndarray) else _CUDA


@lru_cache(maxsize=256)
def name_of(dtype: np.dtype) -> str:
    """Return a dtype's name, remembered: NumPy takes microseconds to compose it."""
    return dtype.name


def dtype_named(name: str) -> np.dtype:
    """Return the dtype that another rank calls `name`."""
    if name in _EXTENDED and name not in np.sctypeDict:
        importlib.import_module("ml_dtypes")  # where these dtypes come from
    return np.dtype(name)


def _opened(value: Input, what: str) -> tuple[Array, Device, _Leave]:
    """Return what is in a user's array: the memory, where it is, how a result leaves."""
    device, leave = _CPU, None
    array: Array
    if type(value) is np.ndarray:  # nearly always: it need not go through what follows
        array = value
    elif isinstance(value, (np.ndarray, np.generic)):
        array = np.asarray(value)
    elif (kind := type(value).__module__.partition(".")[0]) == "cupy":
        array, device = value, _CUDA  # type: ignore[assignment]
    elif isinstance(value, SupportsDLPack):
        array, leave = _import(value, kind, what), _exporter(kind)
    else:
        array = _convert(value, what)
    wrong = objection(array.dtype)
    if wrong:
        raise UnsupportedError(f"{what} has {wrong}")
    return array, device, leave


def _import(value: SupportsDLPack, kind: str, what: str) -> Array:
    device, _ = value.__dlpack_device__()
    if device != _CPU_DLPACK:
        raise UnsupportedError(
            f"{what} is a {kind} array on DLPack device {device}; only CPU memory is taken from "
            "other libraries: move it to the CPU, or hand over a CuPy array"
        )
    try:
        return np.from_dlpack(value)  # type: ignore[arg-type]
    except (BufferError, RuntimeError, TypeError, ValueError) as error:
        raise UsageError(f"{what} is a {kind} array that cannot be exchanged through DLPack: {error}") from error


def _exporter(kind: str) -> Callable[[Array], object] | None:
    """Return the library's own from_dlpack, where it keeps it."""
    for module in (kind, f"{kind}.dlpack", f"{kind}.numpy"):
        function = getattr(sys.modules.get(module), "from_dlpack", None)
        if callable(function):
            return function  # type: ignore[no-any-return]
    return None


def _convert(value: object, what: str) -> Array:
    try:
        array = np.asarray(value)
    except ValueError as error:
        raise UsageError(f"{what} is not an array: {error}") from None
    if array.dtype == object:
        raise UsageError(
            f"{what} is a {type(value).__name__}, not an array of numbers; Python values travel "
            "with the *_object methods"
        )
    return array


@lru_cache(maxsize=256)
def objection(dtype: np.dtype) -> str:
    """Say what is wrong with a dtype; "" when collectives carry it."""
    if dtype.kind not in _KINDS and dtype.name not in _EXTENDED:
        return f"dtype {dtype}, which no collective carries: use an integer, floating, complex or boolean dtype"
    if not dtype.isnative:
        return f"the foreign byte order dtype {dtype.str}: convert it with x.astype(x.dtype.newbyteorder('='))"
    if dtype.type in (np.longdouble, np.clongdouble):
        return f"dtype {dtype}, whose layout differs between machines"
    return ""
