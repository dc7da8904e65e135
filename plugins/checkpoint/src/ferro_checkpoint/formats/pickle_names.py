"""What the names in a pickle stand for: makers of stand-ins, and constants; never the classes themselves."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, TypeAlias


class Built:
    """An instance of a listed class: what it was made of, and the state that was set afterwards.

    Attributes:
        kind: the name of the class.
        args: what it was made with.
        state: its attributes, or whatever its class's __getstate__ gives.
    """

    __slots__ = ("args", "kind", "state")

    def __init__(self, kind: str, args: tuple[Any, ...]) -> None:
        self.kind = kind
        self.args = args
        self.state: Any = None


@dataclass(frozen=True, slots=True)
class Maker:
    """A listed class or function: calling it is calling `make`, which must do nothing but make a small object."""

    make: Callable[[tuple[Any, ...]], Any]


def built_by(kind: str) -> Maker:
    """Return a maker of `Built` of this kind."""
    return Maker(lambda args: Built(kind, args))


Names: TypeAlias = "Mapping[tuple[str, str], Any]"
"""What a name (module, qualified name) stands for: a `Maker`, or a constant."""


def is_plain_key(key: Any) -> bool:
    """Say whether a key hashes at once, and no others can be chosen to have its hash, as large integers can be."""
    return -(1 << 63) <= key < 1 << 63 if type(key) is int else type(key) in (str, float, bool, type(None), Built)
