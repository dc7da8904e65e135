"""The reductions for which MPI gives ferro's results, and MPI's transfers for all others.

In the other cases the contributions are gathered, and NumPy reduces them (`GatheredReduction` of core):

- half precision: MPI has no bfloat16, and rounds float16 at every step, where ferro accumulates in float32 and rounds
  once. An MPI operation written in ferro would round at every step as well, because MPI passes it partial results of
  the array's dtype.
- functions of the user: MPI may combine partial results in any grouping, and an MPI operation has no way to fail.
- min and max of floats: in MPI the result for a NaN depends on the rank that has it, and can differ between ranks.
- prod of complex numbers: C has rules for infinities that NumPy does not have.
- deterministic sums of floats: MPI promises no order.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from itertools import accumulate
from typing import TypeAlias

import numpy as np

from ferro import ReduceOp
from ferro.collectives.reduction import Reduction
from ferro.types import Array
from ferro_mpi.mpi import MPI

# Runs a nonblocking collective until it is done: (method, its arguments).
RunNonblocking: TypeAlias = Callable[[Callable[..., MPI.Request], tuple[object, ...]], None]
# A buffer in blocks, as mpi4py takes it: the buffer, (sizes of blocks, offsets of blocks).
BufferSpec: TypeAlias = tuple[Array, tuple[Sequence[int], Sequence[int]]]

_INTEGER = {
    ReduceOp.SUM: MPI.SUM,
    ReduceOp.PROD: MPI.PROD,
    ReduceOp.MIN: MPI.MIN,
    ReduceOp.MAX: MPI.MAX,
    ReduceOp.BAND: MPI.BAND,
    ReduceOp.BOR: MPI.BOR,
    ReduceOp.BXOR: MPI.BXOR,
}
_BOOL = {
    ReduceOp.SUM: MPI.LOR,
    ReduceOp.PROD: MPI.LAND,
    ReduceOp.MIN: MPI.LAND,
    ReduceOp.MAX: MPI.LOR,
    ReduceOp.BAND: MPI.LAND,
    ReduceOp.BOR: MPI.LOR,
    ReduceOp.BXOR: MPI.LXOR,
}
_FLOAT = {ReduceOp.SUM: MPI.SUM, ReduceOp.MEAN: MPI.SUM, ReduceOp.PROD: MPI.PROD}
_COMPLEX = {ReduceOp.SUM: MPI.SUM, ReduceOp.MEAN: MPI.SUM}
_BY_KIND = {"i": _INTEGER, "u": _INTEGER, "b": _BOOL, "f": _FLOAT, "c": _COMPLEX}
_EXACT_KINDS = "iub"  # every order of operands gives the same result

# NumPy's letters of the dtypes for which mpi4py finds MPI's type by itself.
_MPI_TYPES = frozenset("?bhilqBHILQfdgFDG")


def native_op(reduction: Reduction, *, deterministic: bool) -> MPI.Op | None:
    """Find MPI's operation with the same results as a reduction, None where there is none."""
    dtype, op = reduction.dtype, reduction.op
    if reduction.needs_all or op is None or dtype.char not in _MPI_TYPES:
        return None
    if deterministic and dtype.kind not in _EXACT_KINDS:
        return None
    return _BY_KIND[dtype.kind].get(op)


def mpi_view(array: Array) -> Array:
    """View an array as one of a type that mpi4py knows: half precision as its bits."""
    return array if array.dtype.char in _MPI_TYPES else array.view(np.uint16)


def buffer_spec(buffer: Array, counts: Sequence[int]) -> BufferSpec:
    """Describe a buffer of adjacent blocks of `counts` elements to mpi4py."""
    return mpi_view(buffer), (counts, [0, *accumulate(counts)][:-1])


def all_equal(counts: Sequence[int]) -> bool:
    """Return True if all blocks have one size, so that MPI's collective without a v can be used."""
    return counts.count(counts[0]) == len(counts)


class MpiTransfers:
    """MPI's transfers for a `GatheredReduction`; see `ReductionTransfers`.

    They use nonblocking calls: if the arithmetic raises on one rank, `run` ends the waits of the others.
    """

    def __init__(self, comm: MPI.Intracomm, run: RunNonblocking) -> None:
        self._comm = comm
        self._run = run

    def empty(self, count: int, dtype: np.dtype) -> Array:
        """See `ReductionTransfers.empty`."""
        return np.empty(count, dtype)

    def all_gather(self, buffer: Array, counts: Sequence[int]) -> None:
        """See `ReductionTransfers.all_gather`."""
        if all_equal(counts):
            self._run(self._comm.Iallgather, (MPI.IN_PLACE, mpi_view(buffer)))
        else:
            self._run(self._comm.Iallgatherv, (MPI.IN_PLACE, buffer_spec(buffer, counts)))

    def all_to_all(self, source: Array, offsets: Sequence[int], counts: Sequence[int], out: Array) -> None:
        """See `ReductionTransfers.all_to_all`."""
        sent = mpi_view(source), (counts, offsets)
        n = len(counts)
        received = buffer_spec(out, [out.size // n] * n)
        self._run(self._comm.Ialltoallv, (sent, received))
