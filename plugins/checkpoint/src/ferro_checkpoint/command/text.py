"""Tables and sizes for a terminal, and JSON for programs."""

from __future__ import annotations

import json
import math
from collections.abc import Sequence
from typing import Any

_UNITS = ("B", "KiB", "MiB", "GiB", "TiB", "PiB")
_MOST_CELL = 60
_MOST_WIDTH = 200  # that is filled up: one endless name does not make all rows as long


def say(text: str = "") -> None:
    """Print a line. Names come from files: what would move a terminal's cursor is written as an escape sequence."""
    print(printable(text))  # noqa: T201 - a command talks


def printable(text: str) -> str:
    """Write what would move a terminal's cursor as escape sequences."""
    return text if text.isprintable() else "".join(c if c.isprintable() else repr(c)[1:-1] for c in text)


def say_table(rows: Sequence[Sequence[str]], right: Sequence[int] = ()) -> None:
    """Print rows in columns, the first row being their titles; the columns of `right` are flush right."""
    widths = [min(max(len(row[column]) for row in rows), _MOST_WIDTH) for column in range(len(rows[0]))]
    for row in rows:
        cells = [
            cell.rjust(width) if column in right else cell.ljust(width)
            for column, (cell, width) in enumerate(zip(row, widths, strict=True))
        ]
        say("  ".join(cells).rstrip())


def say_json(value: Any) -> None:
    """Print a value as JSON; numbers that JSON does not have become null."""
    print(json.dumps(_finite(value), indent=1, allow_nan=False))  # noqa: T201 - a command talks


def size_text(nbytes: int) -> str:
    """Write a number of bytes, such as "1.5 MiB"."""
    power = min(int(math.log2(nbytes) // 10) if nbytes else 0, len(_UNITS) - 1)
    return f"{nbytes / (1 << 10 * power):.4g} {_UNITS[power]}" if power else f"{nbytes} B"


def shape_text(shape: Sequence[int]) -> str:
    """Write a shape, such as "20 x 30"; "()" for a number."""
    return " x ".join(map(str, shape)) or "()"


def short(value: Any) -> str:
    """Write a value in a cell of a table, cut to some 60 characters."""
    text = json.dumps(value, ensure_ascii=False)
    return text if len(text) <= _MOST_CELL else f"{text[: _MOST_CELL - 1]}…"


def count(number: int, what: str) -> str:
    """Write a number of things, such as "1 tensor" or "1,200 tensors"."""
    return f"{number:,} {what}{'' if number == 1 else 's'}"


def _finite(value: Any) -> Any:
    if isinstance(value, float):
        return value if math.isfinite(value) else None
    if isinstance(value, dict):
        return {key: _finite(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [_finite(item) for item in value]
    return value
