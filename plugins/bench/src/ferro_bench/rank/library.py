"""What a library must offer to be measured, and which there are."""

from __future__ import annotations

import importlib
from collections.abc import Callable
from typing import Protocol, TypeAlias

from .case import Case
from .pattern import Numbers

Operation: TypeAlias = Callable[[], object]


class Library(Protocol):
    """A communication library with its ranks connected."""

    rank: int
    world_size: int
    version: str

    def empty(self, count: int, dtype: str, memory: str) -> Numbers:
        """Return uninitialised memory; "private" is NumPy's, "group" the library's own."""

    def barrier(self) -> None:
        """Return when all ranks have called it."""

    def operation(self, case: Case, source: Numbers, target: Numbers) -> Operation:
        """Return a call that does what `Buffers` says; preparing it is not timed."""

    def close(self) -> None:
        """Leave the other ranks; all ranks call it."""


def open_library(name: str, task: dict[str, str], rank: int, world_size: int) -> Library:
    """Connect this rank of a library.

    Args:
        name: module of this package that has a function `connect`.
        task: what the driver wrote down for this world.
        rank: this process's rank, where the launcher does not tell it.
        world_size: number of ranks, where the launcher does not tell it.
    """
    module = importlib.import_module(f".on_{name}", __package__)
    library: Library = module.connect(task, rank, world_size)
    return library
