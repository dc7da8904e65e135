"""Patterns on the command line that choose tensors by name."""

from __future__ import annotations

import difflib
from collections.abc import Iterable, Sequence
from itertools import islice

from ferro.errors import UsageError
from ferro_checkpoint.loading.names import Chooser

_MOST_COMPARED = 2000  # finding near names among more of them, or longer ones, takes seconds
_MOST_CHARACTERS = 200
_MOST_NAMED = 8


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
            raise UsageError(f"--only {pattern}: no tensor has such a name; {_near(pattern, listed)}")
    return list(filter(Chooser(patterns), listed))


def _near(pattern: str, names: Sequence[str]) -> str:
    """Say which names are like a pattern, and what all names begin with."""
    firsts = list(islice(dict.fromkeys(name.partition(".")[0] for name in names), _MOST_COMPARED))
    known = [name for name in dict.fromkeys([*firsts, *names[:_MOST_COMPARED]]) if len(name) <= _MOST_CHARACTERS]
    near = difflib.get_close_matches(pattern, known, 3, 0.6) if len(pattern) <= _MOST_CHARACTERS else []
    named = list(dict.fromkeys([*near, *(first[:_MOST_CHARACTERS] for first in firsts[:_MOST_NAMED])]))
    more = f" and {len(firsts) - _MOST_NAMED} more" if len(firsts) > _MOST_NAMED else ""
    return f"there are: {', '.join(named) or 'none'}{more}"
