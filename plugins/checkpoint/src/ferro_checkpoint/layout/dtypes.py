"""The names of dtypes in safetensors files."""

from __future__ import annotations

import numpy as np

from ferro_checkpoint.errors import StateError

_OF_NUMPY = {
    "bool": "BOOL",
    "int8": "I8",
    "uint8": "U8",
    "int16": "I16",
    "uint16": "U16",
    "int32": "I32",
    "uint32": "U32",
    "int64": "I64",
    "uint64": "U64",
    "float16": "F16",
    "bfloat16": "BF16",
    "float32": "F32",
    "float64": "F64",
    "complex64": "C64",
    "float8_e4m3fn": "F8_E4M3",
    "float8_e5m2": "F8_E5M2",
    "float8_e8m0fnu": "F8_E8M0",
}
# complex128 is in no safetensors file: it is written as pairs of float64, with a last dimension of 2 more, and the
# record says so.
_NAMES = {name: dtype for dtype, name in _OF_NUMPY.items()}
_OF_DTYPE: dict[np.dtype, str] = {}  # NumPy takes microseconds to compose a dtype's name
_WITH_ML_DTYPES = frozenset(("bfloat16", "float8_e4m3fn", "float8_e5m2", "float8_e8m0fnu"))


def dtype_name(dtype: np.dtype, tensor: str) -> str:
    """Return the name of a dtype in a file.

    Raises:
        StateError: there is none for it; `tensor` names the array.
    """
    if (found := _OF_DTYPE.get(dtype)) is not None:
        return found
    name = _OF_NUMPY.get(dtype.name)
    if name is None or dtype.byteorder == ">":
        raise StateError(
            f"{tensor!r} has dtype {dtype}, which no checkpoint carries: convert it to an integer, floating, "
            f"complex or boolean dtype of this machine's byte order"
        )
    return _OF_DTYPE.setdefault(dtype, name)


def dtype_of(name: str) -> np.dtype | None:
    """Return the dtype of this name in a file; None if it is unknown, or needs ml_dtypes, which is not installed."""
    found = _NAMES.get(name)
    if found is None or found not in _WITH_ML_DTYPES:
        return None if found is None else np.dtype(found)
    try:
        import ml_dtypes
    except ImportError:
        return None
    return np.dtype(getattr(ml_dtypes, found)) if hasattr(ml_dtypes, found) else None


ITEM_BYTES = {
    **{name: np.dtype(dtype).itemsize for dtype, name in _OF_NUMPY.items() if dtype not in _WITH_ML_DTYPES},
    "BF16": 2,
    "F8_E4M3": 1,
    "F8_E5M2": 1,
    "F8_E8M0": 1,
}
"""Bytes of an element, by name, of every dtype that a file may have."""
