"""JSON that comes from outside: strict, and with each key once."""

from __future__ import annotations

import json
from typing import Any


class UnreadableJson(ValueError):
    """The text is no JSON as checkpoints have it; the message says why."""


def read_json(text: bytes) -> Any:
    """Read JSON whose objects have each key once. The caller bounds its size.

    Raises:
        UnreadableJson: it is not; too deeply nested text is refused as well.
    """
    try:
        return json.loads(text.decode("utf-8"), object_pairs_hook=_each_key_once, parse_constant=_refuse_constant)
    except UnreadableJson:
        raise
    except (ValueError, RecursionError) as error:
        raise UnreadableJson(str(error)) from error


def write_json(value: object) -> bytes:
    """Write JSON without spaces; equal values give equal bytes, and floats come back with the same bits.

    Raises:
        ValueError, TypeError: it is no JSON.
    """
    return json.dumps(value, separators=(",", ":"), ensure_ascii=False, allow_nan=False).encode()


def _each_key_once(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    found: dict[str, Any] = {}
    for key, value in pairs:
        if key in found:
            raise UnreadableJson(f"the key {key!r} comes twice")
        found[key] = value
    return found


def _refuse_constant(name: str) -> None:
    raise UnreadableJson(f"{name} is no JSON")
