"""Small Python values as bytes: the MessagePack format, and nothing that could run code.

Takes None, bool, int, float, complex, str, bytes, list, tuple (comes back as a list), dict and NumPy arrays. Depth,
number of items, size and the keys' collisions are bounded in decoding, so a hostile message takes time and memory in
proportion to its size.

Source: the MessagePack specification; arrays, complex numbers and integers of more than 64 bits are extension types 1
to 3.
"""

from __future__ import annotations

import operator
import re
import struct
from collections.abc import Callable
from typing import Any

import numpy as np

from ferro.arrays import dtype_from_name, lost_meaning
from ferro.errors import UsageError

MAX_DEPTH = 32
_ARRAY, _COMPLEX, _INTEGER = 1, 2, 3
_MAX_COLLISIONS = 64  # of a dict's keys: equal hashes, each of which is compared with all others
_DTYPE = re.compile(r"[|<][biufc]\d{1,2}|bfloat16")


def encode(value: object) -> bytes:
    """Encode a value; UsageError names the type and the place of a part that has no safe form."""
    out = bytearray()
    _put(value, out, "value", 0)
    return bytes(out)


def decode(data: bytes | bytearray | memoryview) -> object:
    """Decode the value that `encode` was given; UsageError says that the bytes are not such a value."""
    reader = _Reader(memoryview(data))
    value = reader.value(0)
    if reader.left():
        raise UsageError(f"{reader.left()} bytes follow the encoded value")
    return value


def _put(value: object, out: bytearray, place: str, depth: int) -> None:
    if depth > MAX_DEPTH:
        raise UsageError(f"{place} is nested deeper than {MAX_DEPTH} levels")
    if value is None:
        out.append(0xC0)
    elif isinstance(value, (bool, np.bool_)):
        out.append(0xC3 if value else 0xC2)
    elif isinstance(value, (int, np.integer)):
        number = int(value)
        if 0 <= number < 128:
            out.append(number)
        elif not -(1 << 63) <= number < 1 << 64:  # such as the state of a random generator
            body = number.to_bytes(number.bit_length() // 8 + 1, "big", signed=True)
            out += struct.pack(">BIb", 0xC9, len(body), _INTEGER) + body
        else:
            out += struct.pack(">Bq", 0xD3, number) if number < 1 << 63 else struct.pack(">BQ", 0xCF, number)
    elif isinstance(value, (float, np.floating)):
        out += struct.pack(">Bd", 0xCB, value)
    elif isinstance(value, (complex, np.complexfloating)):
        out += struct.pack(">BBbdd", 0xC7, 16, _COMPLEX, value.real, value.imag)
    elif isinstance(value, str):
        try:
            _put_sized(0xDB, value.encode(), out, place)
        except UnicodeEncodeError as error:
            raise UsageError(f"{place} is a string that UTF-8 cannot hold: {error}") from None
    elif isinstance(value, (bytes, bytearray, memoryview)):
        _put_sized(0xC6, bytes(value), out, place)
    elif isinstance(value, (list, tuple)):
        out += struct.pack(">BI", 0xDD, len(value))
        for index, item in enumerate(value):
            _put(item, out, f"{place}[{index}]", depth + 1)
    elif isinstance(value, dict):
        out += struct.pack(">BI", 0xDF, len(value))
        for key, item in value.items():
            if isinstance(key, tuple):
                raise UsageError(f"key {key!r} of {place} is a tuple, which comes back as a list")
            shown = _shown(key)
            _put(key, out, f"key {shown} of {place}", depth + 1)
            _put(item, out, f"{place}[{shown}]", depth + 1)
    elif isinstance(value, np.ndarray):
        if problem := lost_meaning(value):
            raise UsageError(f"{place} is {problem}, or pass codec='pickle' where you trust every rank")
        _put_array(value, out, place)
    else:
        raise UsageError(
            f"{place} is a {type(value).__name__}, which has no safe encoding: send numbers, strings, bytes, lists, "
            "dicts and NumPy arrays, or pass codec='pickle' where you trust every rank"
        )


def _shown(key: object) -> str:
    """Show a key in the place of an item, in few characters, for every item below it has them in its place."""
    if isinstance(key, (str, bytes)):
        return repr(key[:40])
    return repr(key)[:40] if not isinstance(key, int) or key.bit_length() < 100 else "(a large integer)"


def _put_sized(code: int, data: bytes, out: bytearray, place: str) -> None:
    if len(data) >= 1 << 32:
        raise UsageError(f"{place} is larger than 4 GiB")
    out += struct.pack(">BI", code, len(data)) + data


def _put_array(array: np.ndarray, out: bytearray, place: str) -> None:
    name = ""
    if array.dtype.name == "bfloat16":  # of a package that may be absent, so it travels as integers
        name, array = array.dtype.name, np.ascontiguousarray(array).view(np.uint16).reshape(array.shape)
    if array.dtype.kind not in "biufc" or array.dtype.isbuiltin == 2:  # 2: the dtype of a package, as float8
        raise UsageError(f"{place} is an array of {array.dtype}, which has no safe encoding")
    little = np.ascontiguousarray(array, array.dtype.newbyteorder("<"))
    body = encode(name or little.dtype.str) + encode(list(array.shape)) + little.tobytes()
    if len(body) >= 1 << 32:
        raise UsageError(f"{place} is larger than 4 GiB; send it with an array collective")
    out += struct.pack(">BIb", 0xC9, len(body), _ARRAY) + body


class _Reader:
    """Reads one value after the other, never past the end."""

    def __init__(self, data: memoryview) -> None:
        self._data = data
        self._at = 0

    def left(self) -> int:
        return len(self._data) - self._at

    def take(self, count: int) -> memoryview:
        start, self._at = self._at, self._at + count
        if self._at > len(self._data):
            raise UsageError("the encoded value is cut short")
        return self._data[start : self._at]

    def number(self, form: str) -> Any:
        """Read a big-endian number of the form that `struct` gives it."""
        structure = _STRUCTURES[form]
        return structure.unpack(self.take(structure.size))[0]

    def value(self, depth: int) -> object:
        if depth > MAX_DEPTH:
            raise UsageError(f"the encoded value is nested deeper than {MAX_DEPTH} levels")
        code = self.take(1)[0]
        if code < 0x80:
            return code
        if code >= 0xE0:
            return code - 256
        if code <= 0x8F:
            return self.mapping(code & 15, depth)
        if code <= 0x9F:
            return self.sequence(code & 15, depth)
        if code <= 0xBF:
            return self.text(code & 31, depth)
        if code in _NUMBERS:
            return self.number(_NUMBERS[code])
        if code in _SIZED:
            form, read = _SIZED[code]
            return read(self, self.number(form), depth)
        if code not in _CONSTANTS:
            raise UsageError(f"byte {code:#04x} begins no value that ferro reads")
        return _CONSTANTS[code]

    def binary(self, length: int, _depth: int) -> bytes:
        return bytes(self.take(length))

    def text(self, length: int, _depth: int) -> str:
        try:
            return bytes(self.take(length)).decode()
        except UnicodeDecodeError as error:
            raise UsageError(f"an encoded string is not UTF-8: {error}") from None

    def sequence(self, length: int, depth: int) -> list[object]:
        if length > self.left():
            raise UsageError("the encoded value is cut short")
        return [self.value(depth + 1) for _ in range(length)]

    def mapping(self, length: int, depth: int) -> dict[object, object]:
        items = self.sequence(2 * length, depth)
        for key in items[::2]:
            if isinstance(key, (list, dict, np.ndarray)):
                raise UsageError(f"an encoded dict has a {type(key).__name__} as key")
        if length > _MAX_COLLISIONS and length - len(set(map(hash, items[::2]))) > _MAX_COLLISIONS:
            raise UsageError(f"an encoded dict has {length} keys of which too many have the same hash")
        return dict(zip(items[::2], items[1::2], strict=True))

    def extension(self, length: int, depth: int) -> object:
        kind = self.number("b")
        body = _Reader(self.take(length))
        if kind == _COMPLEX and length == 16:
            return complex(body.number("d"), body.number("d"))
        if kind == _ARRAY:
            return body.array(depth + 1)
        if kind == _INTEGER:
            return int.from_bytes(body.take(length), "big", signed=True)
        raise UsageError(f"extension type {kind} is not one that ferro reads")

    def array(self, depth: int) -> np.ndarray:
        """Read an array: dtype, shape, then its bytes."""
        name, shape = self.value(depth), self.value(depth)
        if not isinstance(name, str) or not isinstance(shape, list):
            raise UsageError("an encoded array has no dtype and shape")
        if not _DTYPE.fullmatch(name):  # np.dtype would read far more than one element's type
            raise UsageError(f"an encoded array has the dtype {name[:20]!r}")
        try:
            if name == "bfloat16":
                flat = np.frombuffer(self.take(self.left()), "<u2").astype(np.uint16).view(dtype_from_name(name))
            else:
                flat = np.frombuffer(self.take(self.left()), name)
            return flat.reshape([operator.index(size) for size in shape]).copy()
        except (TypeError, ValueError, OverflowError) as error:
            raise UsageError(f"an encoded array does not fit its shape: {error}") from None


_STRUCTURES = {form: struct.Struct(">" + form) for form in "fdBHIQbhiq"}
_CONSTANTS = {0xC0: None, 0xC2: False, 0xC3: True}
_NUMBERS = dict(zip(range(0xCA, 0xD4), "fdBHIQbhiq", strict=True))
# Each kind has consecutive codes, one for each size of its length field.
_SIZED: dict[int, tuple[str, Callable[[_Reader, int, int], object]]] = {
    first + index: (form, read)
    for first, forms, read in (
        (0xC4, "BHI", _Reader.binary),
        (0xC7, "BHI", _Reader.extension),
        (0xD9, "BHI", _Reader.text),
        (0xDC, "HI", _Reader.sequence),
        (0xDE, "HI", _Reader.mapping),
    )
    for index, form in enumerate(forms)
}
