"""An MPI through mpi4py, by the methods that take buffers and copy nothing."""

from __future__ import annotations

import importlib
from collections.abc import Callable, Mapping
from functools import partial
from typing import Any

import numpy as np

from .case import BenchCase
from .library import Operation, RepeatedOperation
from .pattern import Numbers, dtype_of


def connect(_task: Mapping[str, str], _rank: int, _world_size: int) -> MPI:
    """Join the world that mpiexec started."""
    return MPI()


class MPI:
    """An MPI as a `MeasuredLibrary`."""

    def __init__(self) -> None:
        self._mpi = importlib.import_module("mpi4py.MPI")
        self._world = self._mpi.COMM_WORLD
        self.rank: int = self._world.Get_rank()
        self.world_size: int = self._world.Get_size()
        # After the version, Open MPI writes a comma and MPICH a new line.
        version = self._mpi.Get_library_version().splitlines()[0].partition(",")[0]
        self.version = " ".join(version.replace("Version:", "").split())

    def empty(self, count: int, dtype: str, memory: str) -> Numbers:
        """Allocate uninitialised memory; MPI's own memory is not measured."""
        assert memory == "private"
        return np.empty(count, dtype_of(dtype))

    def barrier(self) -> None:
        """Wait until all ranks have called it."""
        self._world.Barrier()

    def operation(self, case: BenchCase, source: Numbers, target: Numbers) -> Operation:
        """Prepare a call."""
        name, arguments = self._method(case, source, target)
        if not case.async_op:
            return partial(getattr(self._world, name), *arguments)
        issue: Callable[[], Any] = partial(getattr(self._world, f"I{name.lower()}"), *arguments)
        return lambda: issue().Wait()

    def persistent(self, case: BenchCase, source: Numbers, target: Numbers) -> RepeatedOperation:
        """Make a persistent operation."""
        name, arguments = self._method(case, source, target)
        request = getattr(self._world, f"{name}_init")(*arguments)
        start, wait = request.Start, request.Wait

        def run() -> None:
            start()
            wait()

        return RepeatedOperation(run, request.Free)

    def _method(self, case: BenchCase, source: Numbers, target: Numbers) -> tuple[str, tuple[object, ...]]:
        """Return the blocking method's name and its arguments."""
        op = getattr(self._mpi, case.op.upper())
        at_root = self.rank == 0
        to, from_ = (self.rank + 1) % self.world_size, (self.rank - 1) % self.world_size
        methods: dict[str, tuple[str, tuple[object, ...]]] = {
            "all_reduce": ("Allreduce", (self._mpi.IN_PLACE, target, op)),
            "broadcast": ("Bcast", (target, 0)),
            "all_gather": ("Allgather", (source, target)),
            "reduce_scatter": ("Reduce_scatter_block", (source, target, op)),
            "all_to_all": ("Alltoall", (source, target)),
            "reduce": ("Reduce", (source, target if at_root else None, op, 0)),
            "gather": ("Gather", (source, target if at_root else None, 0)),
            "scatter": ("Scatter", (source if at_root else None, target, 0)),
            "sendrecv": ("Sendrecv", (source, to, 0, target, from_, 0)),
            "barrier": ("Barrier", ()),
        }
        return methods[case.collective]

    def close(self) -> None:
        """Leave the other ranks."""
        self._mpi.Finalize()
