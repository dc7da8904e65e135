"""Values of a state that are no arrays, as JSON, from which the same values come back.

JSON has no infinite numbers, tuples, bytes, complex numbers, and only texts as keys. Each of these is written as an
object with one key that begins with "$":

    | {"$float": "inf"}         inf, -inf or nan
    | {"$tuple": [1, 2]}        a tuple
    | {"$bytes": "00ff"}        bytes, in hexadecimal
    | {"$complex": [re, im]}    a complex number, of two floats
    | {"$scalar": ["float32", "0000803f"]}     a NumPy number, with its bytes
    | {"$array": ["float32", [2], "…"]}        a small NumPy array, as in the state of a random generator
    | {"$dict": [[key, value], …]}      a dict with other keys than texts, or with a key that begins with "$"
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any, TypeAlias

import numpy as np

from ferro_checkpoint.errors import StateError

Json: TypeAlias = "bool | int | float | str | list[Json] | dict[str, Json] | None"

_DTYPES = {np.dtype(code).name: np.dtype(code) for code in "?bhiqlBHIQLefdgFDG"}  # of kinds b, i, u, f and c
_MOST_DEPTH = 64
_MOST_ARRAY_BYTES = 1 << 16
_MOST_INT_BITS = 4096  # generators have numbers of some hundred bits; Python refuses to read far longer ones


class _NoValue(Exception):
    """Something in a value cannot be kept.

    Only then are names made of its place, since a list may have millions of items.

    Attributes:
        rest: the message after the name.
        keys: of the containers that it is in, the innermost first.
    """

    def __init__(self, rest: str, *, is_text: bool = False) -> None:
        super().__init__(rest)
        self.rest = rest
        self.is_text = is_text
        self.keys: list[object] = []


def encode_value(value: object, name: str) -> Json:
    """Write a value as JSON.

    Raises:
        StateError: it holds something that a checkpoint cannot have; the message says where, beginning with `name`.
    """
    try:
        return _encode(value, 0)
    except _NoValue as error:
        full = ".".join([name, *map(str, reversed(error.keys))])
        raise StateError(f"{ascii(full) if error.is_text else repr(full)} {error.rest}") from error.__cause__


def _encode(value: object, depth: int) -> Json:
    if value is None or type(value) is bool:
        return value
    if type(value) is str:
        _check_stored(value)
        return value
    if type(value) is int:
        if value.bit_length() > _MOST_INT_BITS:
            raise _NoValue(f"is a number of {value.bit_length()} bits; at most {_MOST_INT_BITS} are kept")
        return value
    if type(value) is float:
        return value if math.isfinite(value) else {"$float": repr(value)}
    if depth > _MOST_DEPTH:
        raise _NoValue(f"is nested more than {_MOST_DEPTH} deep; does it contain itself?")
    if type(value) is list:
        return _encode_items(value, depth)
    if type(value) is tuple:
        return {"$tuple": _encode_items(value, depth)}
    if isinstance(value, dict):
        return _encode_dict(value, depth)
    if isinstance(value, bytes | bytearray):
        return {"$bytes": bytes(value).hex()}
    if type(value) is complex:
        return {"$complex": [_encode(part, depth + 1) for part in (value.real, value.imag)]}
    if isinstance(value, np.generic) and value.dtype.kind in "biufc":
        return {"$scalar": [value.dtype.name, value.tobytes().hex()]}
    if isinstance(value, np.ndarray) and value.dtype.kind in "biufc" and value.nbytes <= _MOST_ARRAY_BYTES:
        value = value.astype(value.dtype.newbyteorder("="))
        return {"$array": [value.dtype.name, list(value.shape), value.tobytes().hex()]}
    if isinstance(value, int | float | str):  # of a class of its own, such as an enumeration
        return _encode(
            int(value) if isinstance(value, int) else float(value) if isinstance(value, float) else str(value), 0
        )
    raise _NoValue(
        f"is {_article(type(value).__name__)}, which a checkpoint cannot hold: it holds arrays, modules, "
        f"optimizers, objects with state_dict() and load_state_dict(), numbers, texts, and lists and dicts of these"
    )


def _encode_items(items: Sequence[object], depth: int) -> list[Json]:
    kinds = set(map(type, items))
    # Items that are all of one simple type need no call each.
    if kinds <= {bool, type(None)}:
        return list(items)  # type: ignore[arg-type]
    if kinds == {int} and max(map(int.bit_length, items)) <= _MOST_INT_BITS:  # type: ignore[arg-type]
        return list(items)  # type: ignore[arg-type]
    if kinds == {float} and all(map(math.isfinite, items)):  # type: ignore[arg-type]
        return list(items)  # type: ignore[arg-type]
    done: list[Json] = []
    try:
        for item in items:
            done.append(_encode(item, depth + 1))  # noqa: PERF401 - the error names the item at which it ends
    except _NoValue as error:
        error.keys.append(len(done))
        raise
    return done


def _encode_dict(value: dict[Any, object], depth: int) -> Json:
    is_plain = all(type(key) is str and not key.startswith("$") for key in value)
    pairs: list[list[Json]] = []
    done: dict[str, Json] = {}
    for key, item in value.items():
        if is_plain:
            _check_stored(key)
        else:
            pairs.append([_encode(key, depth + 1)])
        try:
            encoded = _encode(item, depth + 1)
        except _NoValue as error:
            error.keys.append(key)
            raise
        if is_plain:
            done[key] = encoded
        else:
            pairs[-1].append(encoded)
    return done if is_plain else {"$dict": pairs}  # type: ignore[dict-item]


def _check_stored(text: str) -> None:
    try:
        text.encode()
    except UnicodeEncodeError as error:
        rest = f"has {text[:100]!a}, which is no text that can be stored: {error.reason}"
        raise _NoValue(rest, is_text=True) from error


def check_text(text: str, name: str) -> None:
    """Check that a text can be stored.

    Raises:
        StateError: it has half of a surrogate pair, as the names of files can have that are no text.
    """
    try:
        _check_stored(text)
    except _NoValue as error:
        raise StateError(f"{name!a} {error.rest}") from error.__cause__


def decode_value(value: Json) -> Any:
    """Return the value that `encode_value` has written.

    Raises:
        ValueError: nothing is written so.
    """
    if isinstance(value, list):
        return [decode_value(item) for item in value]
    if not isinstance(value, dict):
        return value
    if len(value) == 1:
        ((kind, content),) = value.items()
        if kind.startswith("$"):
            return _decode_special(kind, content)
    return {key: decode_value(item) for key, item in value.items()}


def _decode_special(kind: str, content: Any) -> Any:
    try:
        match kind:
            case "$float":
                return float(content)
            case "$tuple":
                return tuple(decode_value(item) for item in content)
            case "$bytes":
                return bytes.fromhex(content)
            case "$complex":
                return complex(*(decode_value(part) for part in content))
            case "$scalar":
                return np.frombuffer(bytes.fromhex(content[1]), _DTYPES[content[0]])[0]
            case "$array":
                return np.frombuffer(bytes.fromhex(content[2]), _DTYPES[content[0]]).reshape(content[1]).copy()
            case "$dict":
                return {decode_value(key): decode_value(item) for key, item in content}
    except (TypeError, ValueError, LookupError) as error:
        raise ValueError(f"{kind!r} with {content!r} is no value of a checkpoint") from error
    raise ValueError(f"{kind!r} is no kind of value that this version knows")


def _article(name: str) -> str:
    return f"{'an' if name[:1].lower() in 'aeiou' else 'a'} {name}"
