"""Arrays of other libraries, exchanged through DLPack without a copy.

NumPy does not exchange the dtypes that ml_dtypes adds to it. They travel as unsigned integers of the same size, and the
exchanged structure is told the real dtype on the way out, or another one on the way in.
"""

from __future__ import annotations

import sys
from collections.abc import Callable
from typing import TYPE_CHECKING, Protocol, runtime_checkable

import numpy as np

from ferro.arrays.dtypes import dtype_from_name
from ferro.errors import UnsupportedError, UsageError

if TYPE_CHECKING:
    from ferro.types import Array


@runtime_checkable
class SupportsDLPack(Protocol):
    """An array of any library that implements DLPack, the protocol for exchanging arrays without a copy."""

    def __dlpack__(self) -> object: ...

    def __dlpack_device__(self) -> tuple[int, int]: ...


_CPU = 1
_UNSIGNED = 1  # DLPack's code of unsigned integers
# DLPack's codes of the dtypes of ml_dtypes, by the number of their bits. Source: dlpack.h, version 1.1.
_NAMES = {(4, 16): "bfloat16"}
_NAMES |= {
    (7 + index, 8): f"float8_{form}"
    for index, form in enumerate(("e3m4", "e4m3", "e4m3b11fnuz", "e4m3fn", "e4m3fnuz", "e5m2", "e5m2fnuz", "e8m0fnu"))
}
_CODES = {name: code for (code, _), name in _NAMES.items()}
# Where the structures of both versions have the dtype: its code in one byte, its bits in the next.
_DTYPE_AT = {b"dltensor": 20, b"dltensor_versioned": 32 + 20}


class _WithDtype:
    """Exports an array by DLPack with another dtype of the same size than the library gives it.

    Args:
        array: the array.
        code: DLPack's code of the dtype.

    Attributes:
        found: the code and the number of bits that the library gave, once the array has been exported.
    """

    def __init__(self, array: SupportsDLPack, code: int) -> None:
        self._array = array
        self._code = code
        self.found = (0, 0)

    def __dlpack__(self, **options: object) -> object:
        import ctypes  # here, since it is slow to import and seldom needed

        capsule = self._array.__dlpack__(**options)
        api = ctypes.pythonapi
        name_of, address_of = api.PyCapsule_GetName, api.PyCapsule_GetPointer
        name_of.argtypes, name_of.restype = [ctypes.py_object], ctypes.c_char_p
        address_of.argtypes, address_of.restype = [ctypes.py_object, ctypes.c_char_p], ctypes.c_void_p
        name = name_of(capsule)
        dtype = (ctypes.c_uint8 * 2).from_address(address_of(capsule, name) + _DTYPE_AT[name])
        self.found = (dtype[0], dtype[1])
        dtype[0] = self._code
        return capsule

    def __dlpack_device__(self) -> tuple[int, int]:
        return self._array.__dlpack_device__()


def from_dlpack(value: SupportsDLPack, library: str, what: str, *, copies: bool) -> Array:
    """View another library's array as a NumPy array.

    Args:
        value: the array.
        library: its library, for messages.
        what: the argument's name, for messages.
        copies: the caller only reads, so that an array whose memory does not hold its values as they are may be copied.

    Raises:
        UnsupportedError: the array is not in CPU memory.
        UsageError: the array cannot be exchanged.
    """
    device: object
    try:
        device, _ = value.__dlpack_device__()
    except Exception as error:
        raise UnsupportedError(f"{what} is a {library} array that DLPack does not take: {error}") from error
    if device != _CPU:
        raise UnsupportedError(
            f"{what} is a {library} array on DLPack device {device}; only CPU memory is taken from "
            "other libraries: move it to the CPU, or hand over a CuPy array"
        )
    value = _with_signs(value, library, what, copies=copies)
    try:
        return np.from_dlpack(value)  # type: ignore[arg-type]
    except (BufferError, RuntimeError, TypeError, ValueError) as error:
        exported = _WithDtype(value, _UNSIGNED)
        try:
            bits: Array = np.from_dlpack(exported)  # type: ignore[arg-type]
            return bits.view(dtype_from_name(_NAMES[exported.found]))
        except (BufferError, ImportError, KeyError, RuntimeError, TypeError, ValueError):
            text = f"{what} is a {library} array that cannot be exchanged through DLPack: {error}"
            raise UsageError(text) from error


def exporter(value: object, library: str) -> Callable[[Array], object] | None:
    """Find the function of the value's library that makes its arrays of NumPy's; None if there is none."""
    spaces = [sys.modules.get(name) for name in (library, f"{library}.dlpack", f"{library}.numpy")]
    namespace = getattr(value, "__array_namespace__", None)  # of the array API standard
    if callable(namespace):
        spaces.append(namespace())
    function = next((found for space in spaces if callable(found := getattr(space, "from_dlpack", None))), None)
    if function is None:
        return None

    def export(array: Array) -> object:
        code = _CODES.get(array.dtype.name)
        if code is None:
            return function(array)
        return function(_WithDtype(array.view(f"u{array.itemsize}"), code))

    return export


def _with_signs(value: SupportsDLPack, library: str, what: str, *, copies: bool) -> SupportsDLPack:
    """Copy an array that is the negative of its memory, which DLPack does not tell."""
    is_negated, negate = getattr(value, "is_neg", None), getattr(value, "resolve_neg", None)
    if not (callable(is_negated) and callable(negate) and is_negated()):
        return value
    if not copies:
        raise UsageError(f"{what} is a {library} array whose memory holds the negative numbers: pass another array")
    return negate()  # type: ignore[no-any-return]
