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
from .library import Operation
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
        call = self._issue(case, source, target)
        return (lambda: call().wait()) if case.async_op else call

    def _issue(self, case: BenchCase, source: Numbers, target: Numbers) -> Callable[[], Any]:
        group, op, later = self._group, case.op, case.async_op
        root = self.rank == 0
        issues: dict[str, Callable[[], Any]] = {
            "all_reduce": partial(group.all_reduce, source, op, out=target, async_op=later),
            "broadcast": partial(group.broadcast, source, out=target, async_op=later),
            "all_gather": partial(group.all_gather, source, out=target, async_op=later),
            "reduce_scatter": partial(group.reduce_scatter, source, op, out=target, async_op=later),
            "all_to_all": partial(group.all_to_all, source, out=target, async_op=later),
            "reduce": partial(group.reduce, source, op=op, out=target if root else None, async_op=later),
            "gather": partial(group.gather, source, out=target if root else None, async_op=later),
            "scatter": partial(group.scatter, source if root else None, out=target, async_op=later),
            "sendrecv": partial(
                group.sendrecv,
                source,
                target,
                (self.rank + 1) % self.world_size,
                (self.rank - 1) % self.world_size,
                async_op=later,
            ),
            "barrier": partial(group.barrier, async_op=later),
        }
        return issues[case.collective]

    def close(self) -> None:
        """Leave the other ranks."""
        self._group.close()
