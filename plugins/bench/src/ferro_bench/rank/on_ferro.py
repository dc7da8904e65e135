"""ferro, over the backend that the driver names."""

from __future__ import annotations

import sys
from collections.abc import Callable, Mapping
from functools import partial
from importlib import metadata
from typing import Any

import numpy as np

import ferro

from .case import BenchCase
from .library import Operation, RepeatedOperation
from .pattern import Numbers, dtype_of


def connect(task: Mapping[str, Any], _rank: int, _world_size: int) -> Ferro:
    """Join the world that a launcher started."""
    try:
        return Ferro(ferro.init(task["backend"] or None, algorithms=task["algorithms"]))
    except ferro.BackendUnavailable as error:
        sys.exit(f"ferro: {error}")


class Ferro:
    """ferro as a `MeasuredLibrary`."""

    def __init__(self, group: ferro.ProcessGroup) -> None:
        self.rank = group.rank
        self.world_size = group.world_size
        self.version = f"ferro {metadata.version('ferro')}, {group.backend_name}"
        self._group = group

    def empty(self, count: int, dtype: str, memory: str) -> Numbers:
        """Allocate uninitialised memory."""
        if memory == "group":
            return self._group.empty(count, dtype_of(dtype))
        return np.empty(count, dtype_of(dtype))

    def barrier(self) -> None:
        """Wait until all ranks have called it."""
        self._group.barrier()

    def operation(self, case: BenchCase, source: Numbers, target: Numbers) -> Operation:
        """Prepare a call."""
        arguments, named = self._arguments(case, source, target)
        method = getattr(self._group, case.collective)
        if not case.async_op:
            return _written_out(method, arguments, named)
        issue: Callable[[], Any] = partial(method, *arguments, **named, async_op=True)
        return lambda: issue().wait()

    def persistent(self, case: BenchCase, source: Numbers, target: Numbers) -> RepeatedOperation:
        """Make a persistent operation."""
        arguments, named = self._arguments(case, source, target)
        step = self._group.persistent(case.collective, *arguments, **named)
        if not case.async_op:
            return RepeatedOperation(step, step.close)
        start, wait = step.start, step.wait

        def run() -> None:
            start()
            wait()

        return RepeatedOperation(run, step.close)

    def _arguments(self, case: BenchCase, source: Numbers, target: Numbers) -> tuple[tuple[Any, ...], dict[str, Any]]:
        """Return the positional and the named arguments of the group's method."""
        at_root, op = self.rank == 0, case.op
        to, from_ = (self.rank + 1) % self.world_size, (self.rank - 1) % self.world_size
        methods: dict[str, tuple[tuple[Any, ...], dict[str, Any]]] = {
            "all_reduce": ((source, op), {"out": target}),
            "broadcast": ((source, 0), {"out": target}),
            "all_gather": ((source,), {"out": target}),
            "reduce_scatter": ((source, op), {"out": target}),
            "all_to_all": ((source,), {"out": target}),
            "reduce": ((source, 0, op), {"out": target if at_root else None}),
            "gather": ((source, 0), {"out": target if at_root else None}),
            "scatter": ((source if at_root else None, 0), {"out": target}),
            "sendrecv": ((source, target, to, from_), {}),
            "barrier": ((), {}),
        }
        return methods[case.collective]

    def close(self) -> None:
        """Leave the other ranks."""
        self._group.close()


def _written_out(method: Callable[..., object], arguments: tuple[Any, ...], named: dict[str, Any]) -> Operation:
    """Return a call as a program writes it: a partial with named arguments takes longer than the call itself adds."""
    if not named:
        return partial(method, *arguments)
    out = named["out"]
    if len(arguments) == 1:
        (x,) = arguments
        return lambda: method(x, out=out)
    if len(arguments) == 2:
        x, more = arguments
        return lambda: method(x, more, out=out)
    x, root, op = arguments
    return lambda: method(x, root, op, out=out)
