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
from typing import Any, TypeAlias

import numpy as np

from ferro_checkpoint.errors import StateError

Json: TypeAlias = "bool | int | float | str | list[Json] | dict[str, Json] | None"

_DTYPES = {np.dtype(code).name: np.dtype(code) for code in "?bhiqlBHIQLefdgFDG"}  # of kinds b, i, u, f and c
_MOST_DEPTH = 64
_MOST_ARRAY_BYTES = 1 << 16
_MOST_INT_BITS = 4096  # generators have numbers of some hundred bits; Python refuses to read far longer ones


def encode_value(value: object, name: str, depth: int = 0) -> Json:
    """Write a value as JSON.

    Raises:
        StateError: it holds something that a checkpoint cannot have; `name` says where it is.
    """
    if value is None or type(value) is bool:
        return value
    if type(value) is str:
        check_text(value, name)
        return value
    if type(value) is int:
        if value.bit_length() > _MOST_INT_BITS:
            raise StateError(f"{name!r} is a number of {value.bit_length()} bits; at most {_MOST_INT_BITS} are kept")
        return value
    if type(value) is float:
        return value if math.isfinite(value) else {"$float": repr(value)}
    if depth > _MOST_DEPTH:
        raise StateError(f"{name!r} is nested more than {_MOST_DEPTH} deep; does it contain itself?")
    if type(value) is list:
        return [encode_value(item, f"{name}.{place}", depth + 1) for place, item in enumerate(value)]
    if type(value) is tuple:
        return {"$tuple": [encode_value(item, f"{name}.{place}", depth + 1) for place, item in enumerate(value)]}
    if isinstance(value, dict):
        if all(type(key) is str and not key.startswith("$") for key in value):
            for key in value:
                check_text(key, name)
            return {key: encode_value(item, f"{name}.{key}", depth + 1) for key, item in value.items()}
        pairs = [
            [encode_value(key, name, depth + 1), encode_value(item, f"{name}.{key}", depth + 1)]
            for key, item in value.items()
        ]
        return {"$dict": pairs}  # type: ignore[dict-item]
    if isinstance(value, bytes | bytearray):
        return {"$bytes": bytes(value).hex()}
    if type(value) is complex:
        return {"$complex": [encode_value(part, name, depth + 1) for part in (value.real, value.imag)]}
    if isinstance(value, np.generic) and value.dtype.kind in "biufc":
        return {"$scalar": [value.dtype.name, value.tobytes().hex()]}
    if isinstance(value, np.ndarray) and value.dtype.kind in "biufc" and value.nbytes <= _MOST_ARRAY_BYTES:
        value = value.astype(value.dtype.newbyteorder("="))
        return {"$array": [value.dtype.name, list(value.shape), value.tobytes().hex()]}
    if isinstance(value, int | float | str):  # of a class of its own, such as an enumeration
        return encode_value(
            int(value) if isinstance(value, int) else float(value) if isinstance(value, float) else str(value), name
        )
    raise StateError(
        f"{name!r} is {_article(type(value).__name__)}, which a checkpoint cannot hold: it holds arrays, modules, "
        f"optimizers, objects with state_dict() and load_state_dict(), numbers, texts, and lists and dicts of these"
    )


def check_text(text: str, name: str) -> None:
    """Check that a text can be stored.

    Raises:
        StateError: it has half of a surrogate pair, as the names of files can have that are no text.
    """
    try:
        text.encode()
    except UnicodeEncodeError as error:
        raise StateError(f"{name!a} has {text[:100]!a}, which is no text that can be stored: {error.reason}") from error


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
