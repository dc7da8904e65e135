"""JSON that comes from outside: strict, with each key once, and bounded in what it takes to read it."""

from __future__ import annotations

import json
import math
import reprlib
from typing import Any

MOST_VALUES = 16 << 20
"""Values that a text may have: each takes up to some 100 bytes of memory, in the text as few as 2."""
MOST_DEPTH = 128
"""Levels of lists and objects: whoever works on a value by recursion can do so."""


class UnreadableJson(ValueError):
    """The text is no JSON as checkpoints have it; the message says why."""


def read_json(text: bytes, most_values: int | None = None) -> Any:
    """Read JSON whose objects have each key once. The caller bounds its size.

    Raises:
        UnreadableJson: it is not; text that is too deeply nested, has more than `most_values` (by default
            `MOST_VALUES`), a number that no float holds, or half of a surrogate pair, is refused as well.
    """
    check_counts(text, most_values)
    try:
        value = json.loads(
            text.decode("utf-8"), object_pairs_hook=_each_key_once, parse_constant=_refuse_constant, parse_float=_finite
        )
        if b"\\u" in text:
            write_json(value)  # Half of a surrogate pair is no text: nobody could print or store it.
        check_depth(value)
    except UnreadableJson:
        raise
    except (ValueError, RecursionError) as error:
        raise UnreadableJson(str(error)) from error
    return value


def write_json(value: object) -> bytes:
    """Write JSON without spaces; equal values give equal bytes, and floats come back with the same bits.

    Raises:
        ValueError, TypeError: it is no JSON.
    """
    return json.dumps(value, separators=(",", ":"), ensure_ascii=False, allow_nan=False).encode()


def check_counts(text: bytes, most_values: int | None = None) -> None:
    """Check that JSON has no more values than `read_json` reads.

    Raises:
        UnreadableJson: it has.
    """
    most_values = MOST_VALUES if most_values is None else most_values
    if sum(map(text.count, (b",", b"[", b"{"))) > most_values:
        raise UnreadableJson(f"it has more than {most_values} values")


def check_depth(value: Any) -> None:
    """Check that lists and objects are nested no deeper than `read_json` reads them, without recursion.

    Raises:
        UnreadableJson: they are.
    """
    level = [value]
    for _ in range(MOST_DEPTH + 1):
        level = [it for it in level if isinstance(it, dict | list | tuple)]
        if not level:
            return
        level = [item for it in level for item in (it.values() if isinstance(it, dict) else it)]
    raise UnreadableJson(f"its values are nested more than {MOST_DEPTH} levels deep")


def _each_key_once(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    found = dict(pairs)
    if len(found) < len(pairs):
        seen: set[str] = set()
        twice = next(key for key, _ in pairs if key in seen or seen.add(key))  # type: ignore[func-returns-value]
        raise UnreadableJson(f"the key {shown(twice)} comes twice")
    return found


def _refuse_constant(name: str) -> None:
    raise UnreadableJson(f"{name} is no JSON")


def _finite(text: str) -> float:
    value = float(text)
    if math.isinf(value):
        raise UnreadableJson(f"no float holds {shown(text)}")
    return value


_short = reprlib.Repr()  # of pickles, values may have one list many times, and be endless if each is written
_short.maxlevel, _short.maxlist, _short.maxtuple, _short.maxdict = 4, 16, 16, 16
_short.maxstring = _short.maxlong = _short.maxother = 100


def shown(value: object, most: int = 100) -> str:
    """Write a value of unknown size for a message, cut to about `most` characters."""
    if isinstance(value, str):
        text = repr(value[: most + 1])
    elif isinstance(value, list | tuple | dict):
        text = f"a {type(value).__name__} of {len(value)}" if len(value) > most else _short.repr(value)
    else:
        text = repr(value)
    return text if len(text) <= most + 2 else f"{text[:most]}…"
