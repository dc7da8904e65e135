"""A whole number from a variable, with the variable's name for messages."""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass

from ferro.errors import UsageError


@dataclass(frozen=True, slots=True)
class Found:
    """A number, and the variable or argument that it came from."""

    value: int
    source: str


def integer(env: Mapping[str, str], name: str) -> Found:
    """A variable's whole number."""
    text = env[name]
    if not re.fullmatch(r"-?[0-9]{1,18}", text):
        raise UsageError(f"{name}={text!r} is not a whole number; correct it, or unset it")
    return Found(int(text), name)
