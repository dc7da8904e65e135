"""The checks of what plugins return: descriptions with names that one can type, observers, availabilities, backends."""

from __future__ import annotations

import re
from collections.abc import Callable
from contextvars import ContextVar
from functools import wraps
from typing import Any

from ferro import hookspecs
from ferro.collectives.label import OPS
from ferro.collectives.schedule import CollectiveInfo
from ferro.types import Availability, Device

_Rule = tuple[Callable[[Any], bool], str]
_ANYTHING: _Rule = (lambda _: True, "")
_TEXT: _Rule = (lambda it: isinstance(it, str), "it is a string")
_TRUTH: _Rule = (lambda it: isinstance(it, bool), "it is True or False")
_FUNCTION: _Rule = (callable, "it is callable")
_OPTIONAL: _Rule = (lambda it: it is None or callable(it), "it is None or callable")
_NAME: _Rule = (
    lambda it: isinstance(it, str) and re.fullmatch(r"\w[\w.+-]*", it) is not None,
    "a name is one word of letters, digits, '_', '.', '+' and '-'",
)
# By field, whichever description has it: whether a value can be, and the rule in words.
_RULES: dict[str, _Rule] = {
    **dict.fromkeys(("name", "algorithm"), _NAME),
    **dict.fromkeys(("summary", "reason", "hint"), _TEXT),
    **dict.fromkeys(("ok", "composes"), _TRUTH),
    **dict.fromkeys(("probe", "create", "load", "build"), _FUNCTION),
    **dict.fromkeys(("show", "launcher", "bootstrap_broadcast"), _OPTIONAL),
    "version": (lambda it: it is None or isinstance(it, str), "it is None or a string"),
    "collective": (lambda it: it in OPS[:-1], f"the collectives are {', '.join(OPS[:-1])}"),  # the last are transfers
    "devices": (
        lambda it: isinstance(it, tuple | list) and len(it) > 0 and set(it) <= set(Device),
        f"it is a tuple of one or more of {', '.join(map(repr, map(str, Device)))}",
    ),
    "default_under": (
        lambda it: isinstance(it, tuple | list) and all(isinstance(name, str) for name in it),
        "it is a tuple of launchers' names, such as ('slurm',)",
    ),
}

# While a plugin is asked that was made for a newer ferro: the unknown fields that it gave to descriptions.
ignored_fields: ContextVar[set[str] | None] = ContextVar("ignored_fields", default=None)


def problem_of(item: object, kind: type) -> str:
    """Describe what is wrong with something that a plugin returned, as the end of "it returned"; "" when nothing is."""
    theirs, ours = type(item).__name__, kind.__name__
    if item is None:
        return f"None, not {_article(ours)}"
    if not isinstance(item, kind):
        if theirs != ours:
            return f"{_article(theirs)}, not {_article(ours)}"
        home = type(item).__module__
        return f"{_article(ours)} that module {home} defines, not ferro's own: import {ours} from {kind.__module__}"
    for field in getattr(item, "__dataclass_fields__", ()):
        holds, rule = _RULES.get(field, _ANYTHING)
        if not holds(value := getattr(item, field)):
            return f"{_article(ours)} with {field}={value!r}: {rule}"
    return "" if ignored_fields.get() is not None else _unknown_launcher(item)


def observer_problem(item: object) -> str:
    """Describe what an observer lacks; "" when it is one."""
    lacking = [name for name in ("started", "finished", "close") if not callable(getattr(item, name, None))]
    return f"{item!r}, which is no observer: it has no {', '.join(lacking)}" if lacking else ""


def _unknown_launcher(item: object) -> str:
    from ferro.runtime.environment.launch_info import LAUNCHERS  # here, since `import ferro` does without

    known = ("*", "ferro", "single", "arguments", *(it.launcher for it in LAUNCHERS))
    unknown = [name for name in getattr(item, "default_under", ()) if name not in known]
    return f"a default under {unknown[0]!r}: the launchers are {', '.join(known)}" if unknown else ""


def _article(noun: str) -> str:
    return f"{'an' if noun[0] in 'aeiouAEIOU' else 'a'} {noun}"


def _ignore_newer_fields(description: Any) -> None:
    """Let a description leave out the fields of a newer ferro, while a plugin is asked that was made for one."""
    init, known = description.__init__, frozenset(description.__dataclass_fields__)

    @wraps(init)
    def filtered(self: object, *values: object, **fields: object) -> None:
        if (ignored := ignored_fields.get()) is not None:
            ignored.update(fields.keys() - known)
            fields = {name: value for name, value in fields.items() if name in known}
        init(self, *values, **fields)

    description.__init__ = filtered


for _kind in (Availability, CollectiveInfo, hookspecs.BackendInfo, hookspecs.StrategyInfo, hookspecs.CommandInfo):
    _ignore_newer_fields(_kind)
