"""The interface of a library that is measured, and the loading of one by name."""

from __future__ import annotations

import importlib
from collections.abc import Callable
from typing import Any, NamedTuple, Protocol, TypeAlias

from .case import BenchCase
from .pattern import Numbers

Operation: TypeAlias = Callable[[], object]


class RepeatedOperation(NamedTuple):
    """An operation that is made once, and repeated.

    Attributes:
        run: start it and wait for its end; what is timed.
        free: give it up; all ranks call it in the same order.
    """

    run: Operation
    free: Operation


class MeasuredLibrary(Protocol):
    """A communication library with its ranks connected."""

    rank: int
    world_size: int
    version: str

    def empty(self, count: int, dtype: str, memory: str) -> Numbers:
        """Return uninitialised memory; "private" is NumPy's, "group" the library's own."""

    def barrier(self) -> None:
        """Wait until all ranks have called it."""

    def operation(self, case: BenchCase, source: Numbers, target: Numbers) -> Operation:
        """Prepare a call that fills `target` as `Buffers` expects; preparing it is not timed."""

    def persistent(self, case: BenchCase, source: Numbers, target: Numbers) -> RepeatedOperation:
        """Make the same call once as a persistent operation; all ranks call this in the same order."""

    def close(self) -> None:
        """Leave the other ranks; all ranks call it."""


def open_library(name: str, task: dict[str, Any], rank: int, world_size: int) -> MeasuredLibrary:
    """Connect this rank of a library.

    Args:
        name: module of this package that has a function `connect`.
        task: the driver's description of this world.
        rank: this process's rank, where the launcher does not tell it.
        world_size: number of ranks, where the launcher does not tell it.
    """
    module = importlib.import_module(f".on_{name}", __package__)
    library: MeasuredLibrary = module.connect(task, rank, world_size)
    return library
