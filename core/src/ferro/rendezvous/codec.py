"""Small Python values as bytes: the MessagePack format, and nothing that could run code.

Takes None, bool, int (64 bits), float, complex, str, bytes, list, tuple (comes back as a list),
dict and NumPy arrays. Depth, number of items and size are bounded on the way in, so a hostile
message costs at most what it weighs.

Source: the MessagePack specification; arrays and complex numbers are extension types 1 and 2.
"""

from __future__ import annotations

import operator
import re
import struct
from collections.abc import Callable

import numpy as np

from ferro.errors import UsageError

MAX_DEPTH = 32
_ARRAY, _COMPLEX = 1, 2
_DTYPE = re.compile(r"[|<][biufc]\d{1,2}")


def encode(value: object) -> bytes:
    """Return `value` as bytes.

    Raises:
        UsageError: it holds something that has no safe form; names the type and where it is.
    """
    out = bytearray()
    _put(value, out, "value", 0)
    return bytes(out)


def decode(data: bytes | bytearray | memoryview) -> object:
    """Return the value that `encode` was given.

    Raises:
        UsageError: the bytes are not such a value.
    """
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
        _put_int(int(value), out, place)
    elif isinstance(value, (float, np.floating)):
        out += b"\xcb" + struct.pack(">d", value)
    elif isinstance(value, (complex, np.complexfloating)):
        out += struct.pack(">BBbdd", 0xC7, 16, _COMPLEX, value.real, value.imag)
    elif isinstance(value, str):
        _put_sized(0xDB, _utf8(value, place), out, place)
    elif isinstance(value, (bytes, bytearray, memoryview)):
        _put_sized(0xC6, bytes(value), out, place)
    elif isinstance(value, (list, tuple)):
        out += b"\xdd" + struct.pack(">I", len(value))
        for index, item in enumerate(value):
            _put(item, out, f"{place}[{index}]", depth + 1)
    elif isinstance(value, dict):
        out += b"\xdf" + struct.pack(">I", len(value))
        for key, item in value.items():
            if isinstance(key, tuple):
                raise UsageError(f"key {key!r} of {place} is a tuple, which comes back as a list")
            _put(key, out, f"key {key!r} of {place}", depth + 1)
            _put(item, out, f"{place}[{key!r}]", depth + 1)
    elif isinstance(value, np.ndarray):
        _put_array(value, out, place)
    else:
        raise UsageError(
            f"{place} is a {type(value).__name__}, which has no safe encoding: send numbers, "
            "strings, bytes, lists, dicts and NumPy arrays, or pass codec='pickle' where you "
            "trust every rank"
        )


def _put_int(value: int, out: bytearray, place: str) -> None:
    if 0 <= value < 128:
        out.append(value)
    elif -(1 << 63) <= value < (1 << 63):
        out += b"\xd3" + struct.pack(">q", value)
    elif value < (1 << 64) and value > 0:
        out += b"\xcf" + struct.pack(">Q", value)
    else:
        raise UsageError(f"{place} is an integer of more than 64 bits")


def _utf8(text: str, place: str) -> bytes:
    try:
        return text.encode()
    except UnicodeEncodeError as error:
        raise UsageError(f"{place} is a string that UTF-8 cannot hold: {error}") from None


def _put_sized(code: int, data: bytes, out: bytearray, place: str) -> None:
    if len(data) >= 1 << 32:
        raise UsageError(f"{place} is larger than 4 GiB")
    out += struct.pack(">BI", code, len(data)) + data


def _put_array(array: np.ndarray, out: bytearray, place: str) -> None:
    if array.dtype.kind not in "biufc":
        raise UsageError(f"{place} is an array of {array.dtype}, which has no safe encoding")
    little = np.ascontiguousarray(array, array.dtype.newbyteorder("<"))
    head = bytearray()
    _put(little.dtype.str, head, place, 0)
    _put(list(array.shape), head, place, 0)
    body = bytes(head) + little.tobytes()
    if len(body) >= 1 << 32:
        raise UsageError(f"{place} is larger than 4 GiB; send it with an array collective")
    out += struct.pack(">BIb", 0xC9, len(body), _ARRAY) + body


class _Reader:
    """Reads one value after the other, never past the end."""

    def __init__(self, data: memoryview) -> None:
        self._data = data
        self._at = 0

    def left(self) -> int:
        """Return how many bytes are unread."""
        return len(self._data) - self._at

    def take(self, count: int) -> memoryview:
        """Return the next bytes."""
        if count > self.left():
            raise UsageError("the encoded value is cut short")
        self._at += count
        return self._data[self._at - count : self._at]

    def number(self, form: str) -> int:
        """Return the next big-endian number."""
        return int(struct.unpack(">" + form, self.take(struct.calcsize(form)))[0])

    def value(self, depth: int) -> object:
        """Return the next value."""
        if depth > MAX_DEPTH:
            raise UsageError(f"the encoded value is nested deeper than {MAX_DEPTH} levels")
        code = self.number("B")
        if code < 0x80:
            return code
        if code >= 0xE0:
            return code - 256
        if 0x80 <= code <= 0x8F:
            return self.mapping(code & 15, depth)
        if 0x90 <= code <= 0x9F:
            return self.sequence(code & 15, depth)
        if 0xA0 <= code <= 0xBF:
            return self.text(code & 31)
        read = _CODES.get(code)
        if read is None:
            raise UsageError(f"byte {code:#04x} begins no value that ferro reads")
        return read(self, depth)

    def text(self, length: int) -> str:
        """Return a string."""
        try:
            return bytes(self.take(length)).decode()
        except UnicodeDecodeError as error:
            raise UsageError(f"an encoded string is not UTF-8: {error}") from None

    def sequence(self, length: int, depth: int) -> list[object]:
        """Return a list."""
        if length > self.left():
            raise UsageError("the encoded value is cut short")
        return [self.value(depth + 1) for _ in range(length)]

    def mapping(self, length: int, depth: int) -> dict[object, object]:
        """Return a dict."""
        if 2 * length > self.left():
            raise UsageError("the encoded value is cut short")
        result: dict[object, object] = {}
        for _ in range(length):
            key = self.value(depth + 1)
            if isinstance(key, (list, dict, np.ndarray)):
                raise UsageError(f"an encoded dict has a {type(key).__name__} as key")
            result[key] = self.value(depth + 1)
        return result

    def real(self) -> float:
        """Return a double."""
        return float(struct.unpack(">d", self.take(8))[0])

    def extension(self, length: int, depth: int) -> object:
        """Return an array or a complex number."""
        kind = self.number("b")
        body = _Reader(self.take(length))
        if kind == _COMPLEX and length == 16:
            return complex(body.real(), body.real())
        if kind == _ARRAY:
            return body.array(depth + 1)
        raise UsageError(f"extension type {kind} is not one that ferro reads")

    def array(self, depth: int) -> np.ndarray:
        """Return an array: dtype, shape, then its bytes."""
        name, shape = self.value(depth), self.value(depth)
        if not isinstance(name, str) or not isinstance(shape, list):
            raise UsageError("an encoded array has no dtype and shape")
        if not _DTYPE.fullmatch(name):  # np.dtype would read far more than one element's type
            raise UsageError(f"an encoded array has the dtype {name[:20]!r}")
        try:
            flat = np.frombuffer(self.take(self.left()), name)
            return flat.reshape([operator.index(size) for size in shape]).copy()
        except (TypeError, ValueError, OverflowError) as error:
            raise UsageError(f"an encoded array does not fit its shape: {error}") from None


_CODES: dict[int, Callable[[_Reader, int], object]] = {
    0xC0: lambda r, d: None,
    0xC2: lambda r, d: False,
    0xC3: lambda r, d: True,
    0xC4: lambda r, d: bytes(r.take(r.number("B"))),
    0xC5: lambda r, d: bytes(r.take(r.number("H"))),
    0xC6: lambda r, d: bytes(r.take(r.number("I"))),
    0xC7: lambda r, d: r.extension(r.number("B"), d),
    0xC8: lambda r, d: r.extension(r.number("H"), d),
    0xC9: lambda r, d: r.extension(r.number("I"), d),
    0xCA: lambda r, d: float(struct.unpack(">f", r.take(4))[0]),
    0xCB: lambda r, d: r.real(),
    0xCC: lambda r, d: r.number("B"),
    0xCD: lambda r, d: r.number("H"),
    0xCE: lambda r, d: r.number("I"),
    0xCF: lambda r, d: r.number("Q"),
    0xD0: lambda r, d: r.number("b"),
    0xD1: lambda r, d: r.number("h"),
    0xD2: lambda r, d: r.number("i"),
    0xD3: lambda r, d: r.number("q"),
    0xD9: lambda r, d: r.text(r.number("B")),
    0xDA: lambda r, d: r.text(r.number("H")),
    0xDB: lambda r, d: r.text(r.number("I")),
    0xDC: lambda r, d: r.sequence(r.number("H"), d),
    0xDD: lambda r, d: r.sequence(r.number("I"), d),
    0xDE: lambda r, d: r.mapping(r.number("H"), d),
    0xDF: lambda r, d: r.mapping(r.number("I"), d),
}
