"""Arrays that users pass in, and the kind of array that they get back.

NumPy and CuPy arrays are taken as they are. Any other array that supports DLPack (a torch tensor, a JAX array) is taken
without a copy if it is in CPU memory, and results are of its kind. Numbers and lists become NumPy arrays. Arrays that
mean more than their numbers (masks, units, labels) are refused, since the rest would be lost without a word.

Collectives carry all integer, floating, complex and boolean dtypes in native byte order, and bfloat16. Those that only
move data also take dates, time spans, structured dtypes and the other dtypes of ml_dtypes (float8), as integers or
bytes (`InputArray.dtype` is their own).
"""

from __future__ import annotations

import sys
from collections.abc import Callable
from copy import copy
from functools import partial
from typing import TYPE_CHECKING, TypeAlias, cast

import numpy as np

from ferro.arrays.dlpack import SupportsDLPack, exporter, from_dlpack
from ferro.arrays.dtypes import dtype_problem, how_to_reduce, integer_for, is_only_moved
from ferro.errors import UnsupportedError, UsageError
from ferro.types import Array, Device

if TYPE_CHECKING:
    import numpy.typing as npt

Input: TypeAlias = "npt.ArrayLike | SupportsDLPack"

# Kinds of NumPy arrays and scalars that mean nothing but their numbers.
_PLAIN = (np.generic, np.memmap, np.recarray)
_NUMBERS = frozenset((bool, int, float, complex))

# Globals, since each call looks them up: an attribute of a module or an enumeration takes several times as long.
_ndarray = np.ndarray
_CPU, _CUDA = Device.CPU, Device.CUDA

# Converts a result to the kind of the user's array; None for NumPy's and CuPy's own arrays.
_Converter: TypeAlias = "Callable[[Array], object] | None"


class InputArray:
    """A user's array, as the group passes it to a backend.

    Args:
        value: the user's array, number or list.
        what: the argument's name, for messages.
        moved: the call moves the array and computes nothing, so that dates and structured dtypes are taken as well.

    Attributes:
        array: the same memory as a NumPy (or CuPy) array, of a dtype that backends take.
        dtype: the dtype of the user's array. Dates are 64-bit integers in `array`, and structured elements are rows of
            bytes in one axis more.
        device: where that memory is.
        copied: True when `array` is a copy on the host of the user's array on a GPU.

    Raises:
        UsageError: `value` is not an array.
        UnsupportedError: no collective carries its dtype, or memory on its device.
    """

    __slots__ = ("_converter", "array", "copied", "device", "dtype")

    def __init__(self, value: Input, *, what: str = "input", moved: bool = False) -> None:
        if type(value) is _ndarray and not dtype_problem(value.dtype):
            self.array, self.device, self._converter, self.dtype = value, _CPU, None, value.dtype
        else:
            self.array, self.device, self._converter = _imported(value, what)
            self.dtype = self.array.dtype
            if problem := dtype_problem(self.dtype):
                if not is_only_moved(self.dtype):
                    raise UnsupportedError(f"{what} has {problem}")
                if not moved:
                    raise UnsupportedError(f"{what} has dtype {self.dtype}, {how_to_reduce(self.dtype)}")
                self._converter = partial(_restored, self.dtype, self._converter)
                self.array = _as_carried(self.array, what)
        self.copied = False

    def empty(self, shape: tuple[int, ...]) -> Array:
        """Allocate an array of the same dtype, on the same device."""
        if self.device is _CUDA:
            return cast("Array", sys.modules["cupy"].empty(shape, self.array.dtype))
        return np.empty(shape, self.array.dtype)

    def with_dtype(self, dtype: np.dtype) -> InputArray:
        """Describe an array of the same kind and device, of another dtype and without elements."""
        other = copy(self)
        other.array, other.dtype = self.empty((0,)).astype(dtype), dtype
        return other

    def output(self, out: object, shape: tuple[int, ...], device: Device, what: str) -> Array:
        """Check a user's `out` for a result that has `shape` as backends see it, and return its memory as they do."""
        if self.dtype is self.array.dtype:
            return output_array(out, shape, self.dtype, device, what)
        own_shape = shape[:-1] if integer_for(self.dtype) is None else shape
        return _as_carried(output_array(out, own_shape, self.dtype, device, what), what)

    def copy_to_host(self) -> None:
        """Replace a GPU array by a copy in CPU memory; results are copied back to the GPU."""
        cupy = sys.modules["cupy"]
        self.array = cupy.asnumpy(self.array)
        self._converter = cupy.asarray
        self.device = _CPU
        self.copied = True

    def convert_result(self, result: Array) -> object:
        """Convert a result to the kind of array that the user passed in."""
        return result if self._converter is None else self._converter(result)


def output_array(
    value: object, shape: tuple[int, ...], dtype: np.dtype, device: Device = Device.CPU, what: str = "out"
) -> Array:
    """Check a user's `out` argument, and return its memory as a NumPy (or CuPy) array.

    Raises:
        UsageError: it is not a writable contiguous array of this shape, dtype and device.
    """
    array: Array
    if type(value) is _ndarray:  # its dtype is compared below
        array, found = value, _CPU
    elif (
        isinstance(value, np.ndarray)
        or type(value).__module__.startswith("cupy")  # asking a protocol takes microseconds
        or isinstance(value, SupportsDLPack)
    ):
        array, found, _ = _imported(cast("Input", value), what, written=True)
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
    """Return the device of a NumPy or CuPy array."""
    return _CPU if isinstance(array, np.ndarray) else _CUDA


def lost_meaning(value: object) -> str:
    """Explain what a plain array of the value's numbers would lose, and the remedy; "" when it loses nothing."""
    kind = type(value)
    if kind is _ndarray or issubclass(kind, _PLAIN):
        return ""
    if issubclass(kind, (list, tuple)):
        others = (item for item in cast("list[object]", value) if type(item) not in _NUMBERS)
        return next(filter(None, map(lost_meaning, others)), "")
    if not issubclass(kind, np.ndarray):
        # A class that redefines NumPy's arithmetic means more than numbers, such as units; CuPy's has to.
        if not hasattr(kind, "__array_ufunc__") or kind.__module__.partition(".")[0] == "cupy":
            return ""
    elif isinstance(value, np.ma.MaskedArray):
        return "a MaskedArray, whose mask would be lost: pass x.filled(0), or np.asarray(x) and the mask by itself"
    return f"a {kind.__qualname__}, of which only the numbers would travel: pass np.asarray(x)"


def _as_carried(array: Array, what: str) -> Array:
    """View dates and extension dtypes as integers, and structured elements as bytes in a last axis."""
    if (integer := integer_for(array.dtype)) is not None:
        return array.view(integer)
    if not array.ndim:
        raise UnsupportedError(f"{what} is a 0-d array of dtype {array.dtype}: pass x.reshape(1)")
    return np.ascontiguousarray(array).view(np.uint8).reshape(*array.shape, array.dtype.itemsize)


def _restored(dtype: np.dtype, convert: _Converter, carried: Array) -> object:
    """View a result as the user's dtype again, and convert it to the user's kind of array."""
    result: Array = carried.view(dtype)
    if integer_for(dtype) is None:
        result = result.reshape(carried.shape[:-1])
    return result if convert is None else convert(result)


def _imported(value: Input, what: str, *, written: bool = False) -> tuple[Array, Device, _Converter]:
    """Return the memory of a user's array, its device, and the converter of results.

    If `written` is true, the memory must be the array's own.
    """
    device, converter = _CPU, None
    array: Array
    if problem := lost_meaning(value):
        raise UsageError(f"{what} is {problem}")
    if isinstance(value, (np.ndarray, np.generic)):
        array = np.asarray(value)
    elif (library := type(value).__module__.partition(".")[0]) == "cupy":
        array, device = value, _CUDA  # type: ignore[assignment]
    elif isinstance(value, SupportsDLPack):
        array, converter = from_dlpack(value, library, what, copies=not written), exporter(value, library)
    else:
        array = _from_values(value, what)
    return array, device, converter


def _from_values(value: object, what: str) -> Array:
    try:
        array = np.asarray(value)
    except ValueError as error:
        raise UsageError(f"{what} is not an array: {error}") from None
    if array.dtype == object:
        kind = "None" if value is None else f"a {type(value).__name__}"
        raise UsageError(f"{what} is {kind}, not an array of numbers; Python values travel with the *_object methods")
    return array
