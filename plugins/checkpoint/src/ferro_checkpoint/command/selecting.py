"""Patterns on the command line that choose tensors by name."""

from __future__ import annotations

import difflib
from collections.abc import Iterable, Sequence
from fnmatch import fnmatchcase

from ferro.errors import UsageError


def selected(names: Iterable[str], patterns: Sequence[str] | None) -> list[str]:
    """Return the names that a pattern matches, in their order; all if there are no patterns.

    A pattern such as "model.*.bias" matches whole names; "model" and "model.0" all names that begin so, up to a dot.

    Raises:
        UsageError: a pattern matches no name; the message has names that are like it.
    """
    listed = list(names)
    if not patterns:
        return listed
    for pattern in patterns:
        if not any(_matches(name, pattern) for name in listed):
            near = difflib.get_close_matches(pattern, listed, 3, 0.3) or listed[:3]
            raise UsageError(f"--only {pattern}: no tensor has such a name; there are: {', '.join(near) or 'none'}")
    return [name for name in listed if any(_matches(name, pattern) for pattern in patterns)]


def _matches(name: str, pattern: str) -> bool:
    return fnmatchcase(name, pattern) or name.startswith(f"{pattern}.")
