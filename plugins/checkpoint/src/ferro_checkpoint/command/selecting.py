"""Patterns on the command line that choose tensors by name."""

from __future__ import annotations

import difflib
from collections.abc import Iterable, Sequence

from ferro.errors import UsageError
from ferro_checkpoint.loading.names import Chooser

_MOST_COMPARED = 2000  # finding near names among more of them takes seconds


def selected(names: Iterable[str], patterns: Sequence[str] | None) -> list[str]:
    """Return the names that any pattern chooses, in their order, as `load` does with `only`; all if there is none.

    Raises:
        UsageError: a pattern chooses no name; the message has names that are like it.
    """
    listed = list(names)
    if patterns is None:
        return listed
    for pattern in patterns:
        if not any(map(Chooser(pattern), listed)):
            known = dict.fromkeys([*(name.partition(".")[0] for name in listed), *listed[:_MOST_COMPARED]])
            near = difflib.get_close_matches(pattern, known, 3, 0.3) or list(known)[:3]
            raise UsageError(f"--only {pattern}: no tensor has such a name; there are: {', '.join(near) or 'none'}")
    return list(filter(Chooser(patterns), listed))
