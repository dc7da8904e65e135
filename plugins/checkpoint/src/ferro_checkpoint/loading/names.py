"""Which tensors and values of a checkpoint go where in a state: choosing, renaming, and what does not fit."""

from __future__ import annotations

import difflib
from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from fnmatch import fnmatchcase
from typing import TypeAlias

from ferro_checkpoint.errors import StateError

Rename: TypeAlias = "Mapping[str, str] | Callable[[str], str]"
_MOST_NAMED = 5


class Chooser:
    """Says whether a name of the state is to be loaded.

    Args:
        only: names, beginnings of names up to a dot, or patterns with "*"; None chooses all.

    Raises:
        StateError: `only` is none of these, or empty.
    """

    def __init__(self, only: str | Iterable[str] | None) -> None:
        if only is None or isinstance(only, str):
            self._patterns = None if only is None else [only]
        else:
            patterns: list[object] = list(only) if isinstance(only, Iterable) else [only]
            if not all(isinstance(pattern, str) for pattern in patterns):
                raise StateError(f"only is {only!r}: give names, their beginnings up to a dot, or patterns with '*'")
            self._patterns = [str(pattern) for pattern in patterns]
        if self._patterns == []:
            raise StateError("only=[] loads nothing: leave it out to load everything")

    def __call__(self, name: str) -> bool:
        """Say whether a name is chosen."""
        return self._patterns is None or any(_matches(name, pattern) for pattern in self._patterns)

    def check(self, names: Collection[str]) -> None:
        """Check that each pattern chooses some of the names that the checkpoint has.

        Raises:
            StateError: one does not, as when it is misspelt.
        """
        for pattern in self._patterns or ():
            if not any(_matches(name, pattern) for name in names):
                beginnings = {name[:end] for name in names for end, char in enumerate(name) if char == "."}
                near = difflib.get_close_matches(pattern, sorted(beginnings | set(names))[:2000], n=1, cutoff=0.6)
                hint = f"; did you mean {near[0]!r}?" if near else ""
                raise StateError(f"only has {pattern!r}, and the checkpoint has nothing of that name{hint}")


def _matches(name: str, pattern: str) -> bool:
    return name == pattern or name.startswith(f"{pattern}.") or fnmatchcase(name, pattern)


def renamer(rename: Rename | None) -> Callable[[str], str]:
    """Return the function from a name in the checkpoint to the name in the state.

    Args:
        rename: a function, or a dict of names, or of beginnings of names up to a dot; of several the longest counts.

    Raises:
        StateError: it is none of these; the function that is returned raises it, too, if `rename` returns no name.
    """
    if rename is None:
        return lambda name: name
    if callable(rename):
        function = rename

        def called(name: str) -> str:
            new = function(name)
            if not isinstance(new, str):
                raise StateError(f"rename returned {new!r} for {name!r}, which is no name")
            return new

        return called
    if not isinstance(rename, Mapping) or not all(isinstance(text, str) for pair in rename.items() for text in pair):
        raise StateError(f"rename is {rename!r}: give a dict from names to names, or a function")
    table = dict(rename)
    keys = sorted(table, key=len, reverse=True)

    def renamed(name: str) -> str:
        for key in keys:
            if name == key:
                return table[key]
            if name.startswith(f"{key}."):
                return table[key] + name[len(key) :]
        return name

    return renamed


def renamed_names(names: Iterable[str], rename: Rename | None) -> dict[str, str]:
    """Map the names that the state has to those that the checkpoint has.

    Raises:
        StateError: two names become one.
    """
    to_state = renamer(rename)
    found: dict[str, str] = {}
    for name in names:
        new = to_state(name)
        if new in found:
            raise StateError(f"rename gives {new!r} to both {found[new]!r} and {name!r} of the checkpoint")
        found[new] = name
    return found


def name_faults(wanted: Iterable[str], there: Iterable[str], what: str, *, strict: bool) -> list[str]:
    """List names that the state wants and the checkpoint lacks, and those that nothing in the state takes."""
    wanted, there = set(wanted), set(there)
    missing, extra = sorted(wanted - there), sorted(there - wanted)
    if not strict:
        return []
    faults = []
    for name in missing[:_MOST_NAMED]:
        near = difflib.get_close_matches(name, extra[:2000], n=1, cutoff=0.6)
        faults.append(f"the checkpoint lacks {what} {name!r}" + (f" (it has {near[0]!r})" if near else ""))
    if len(missing) > _MOST_NAMED:
        faults.append(f"and {len(missing) - _MOST_NAMED} more")
    faults += [f"nothing in the state takes {what} {name!r}" for name in extra[:_MOST_NAMED]]
    if len(extra) > _MOST_NAMED:
        faults.append(f"and {len(extra) - _MOST_NAMED} more")
    return faults


def refuse(path: str, faults: Sequence[str]) -> None:
    """Raise an error if there are faults of names, shapes or dtypes."""
    if faults:
        raise StateError(
            f"{path} does not fit the state: {'; '.join(faults)}. Nothing was loaded. only= loads a part, rename= "
            f"gives other names, strict=False leaves out what one of them lacks"
        )
