"""torch.distributed over gloo, with one thread for arithmetic."""

from __future__ import annotations

import importlib
from collections.abc import Callable, Mapping
from functools import partial
from typing import Any

import numpy as np

from .case import BenchCase
from .library import Operation, RepeatedOperation
from .pattern import Numbers, dtype_of

_OPS = {"sum": "SUM", "prod": "PRODUCT", "min": "MIN", "max": "MAX"}


def connect(task: Mapping[str, str], rank: int, world_size: int) -> Torch:
    """Connect to the other ranks through a file that the driver names."""
    return Torch(f"file://{task['init_file']}", rank, world_size)


class Torch:
    """torch.distributed as a `MeasuredLibrary`."""

    def __init__(self, init_file: str, rank: int, world_size: int) -> None:
        self._torch = importlib.import_module("torch")
        self._dist = importlib.import_module("torch.distributed")
        self._torch.set_num_threads(1)
        self._dist.init_process_group("cpu:gloo", init_method=init_file, rank=rank, world_size=world_size)
        self.rank = rank
        self.world_size = world_size
        self.version = f"torch {self._torch.__version__}"

    def empty(self, count: int, dtype: str, memory: str) -> Numbers:
        """Allocate uninitialised memory; torch's gloo has no memory of its own."""
        assert memory == "private"
        return np.empty(count, dtype_of(dtype))

    def barrier(self) -> None:
        """Wait until all ranks have called it."""
        self._dist.barrier()

    def operation(self, case: BenchCase, source: Numbers, target: Numbers) -> Operation:
        """Prepare a call."""
        call = self._issue(case, self._torch.from_numpy(source), self._torch.from_numpy(target))
        if case.collective == "sendrecv":
            return lambda: [work.wait() for work in call()]
        return (lambda: call().wait()) if case.async_op else call

    def persistent(self, case: BenchCase, source: Numbers, target: Numbers) -> RepeatedOperation:
        """Refuse: torch.distributed has no persistent operations, and the driver asks for none."""
        raise NotImplementedError("torch.distributed has no persistent operations")

    def _issue(self, case: BenchCase, given: Any, result: Any) -> Callable[[], Any]:
        dist, later = self._dist, case.async_op
        op = getattr(dist.ReduceOp, _OPS[case.op])
        root, n = self.rank == 0, self.world_size
        if case.collective == "reduce":  # torch reduces in place, so the time includes a copy of the input
            return lambda: dist.reduce(result.copy_(given), 0, op, async_op=later)
        if case.collective == "gather":
            parts = list(result.chunk(n)) if root else None
            return partial(dist.gather, given, parts, 0, async_op=later)
        if case.collective == "scatter":
            parts = list(given.chunk(n)) if root else None
            return partial(dist.scatter, result, parts, 0, async_op=later)
        if case.collective == "sendrecv":
            to, from_ = (self.rank + 1) % n, (self.rank - 1) % n
            return lambda: (dist.isend(given, to), dist.irecv(result, from_))
        issues: dict[str, Callable[[], Any]] = {
            "all_reduce": partial(dist.all_reduce, result, op, async_op=later),
            "broadcast": partial(dist.broadcast, result, 0, async_op=later),
            "all_gather": partial(dist.all_gather_single, result, given, async_op=later),
            "reduce_scatter": partial(dist.reduce_scatter_single, result, given, op, async_op=later),
            "all_to_all": partial(dist.all_to_all_single, result, given, async_op=later),
            "barrier": partial(dist.barrier, async_op=later),
        }
        return issues[case.collective]

    def close(self) -> None:
        """Leave the other ranks."""
        self._dist.destroy_process_group()
