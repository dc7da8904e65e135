"""Collectives in which each rank combines one block of every rank's array: prefix reductions, extrema with their ranks.

    all_to_all            each rank combines           all_to_all (prefixes) or all_gather (extrema)
    | a0 | a1 | a2 |
    | b0 | b1 | b2 |      rank 1: a1 · b1 · c1         every rank gets its part of the results
    | c0 | c1 | c2 |

So they run on the transfers of any backend, in order of rank, and take memory for two or three arrays.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import TYPE_CHECKING, Any, TypeAlias

import numpy as np

from ferro.arrays import Input
from ferro.backend import Backend
from ferro.collectives.label import Call
from ferro.collectives.partition import near_equal
from ferro.collectives.reduction import Reduction, reduction_for
from ferro.errors import UsageError
from ferro.group.arguments import OutputBuffer, Reads, reads_when
from ferro.group.array_collectives import ArrayCollectives, ResultOrWork, Timeout
from ferro.group.array_operations import Op, Operation, Source
from ferro.types import Array, ReduceOp

if TYPE_CHECKING:
    import numpy.typing as npt


class BlockwiseCollectives(ArrayCollectives):
    """The prefix reductions, and minimum and maximum with the ranks that have them."""

    def scan(
        self, x: Input, op: Op = ReduceOp.SUM, *, out: object = None, async_op: bool = False, timeout_s: Timeout = None
    ) -> ResultOrWork:
        """Reduce `x` over this rank and those before it: rank r gets op(x_0, …, x_r), in order of rank.

        The arguments are those of `all_reduce`; a mean is not defined. Half precision is accumulated in float32.
        Source: MPI standard, MPI_Scan.
        """
        operation = self._prefixes("scan", x, op, out, reads_when(async_op))
        return self._dispatcher.collective(*operation, async_op, timeout_s)

    def exscan(
        self, x: Input, op: Op = ReduceOp.SUM, *, out: object = None, async_op: bool = False, timeout_s: Timeout = None
    ) -> ResultOrWork:
        """Reduce `x` over the ranks before this one: rank r gets op(x_0, …, x_{r-1}), in order of rank.

        Rank 0 gets the value that changes nothing: 0 for a sum, 1 for a product, infinity or the greatest integer for
        a minimum. A function has no such value, so `op` must be a named reduction. Otherwise see `scan`.
        Source: MPI standard, MPI_Exscan, which leaves rank 0's result undefined.
        """
        operation = self._prefixes("exscan", x, op, out, reads_when(async_op))
        return self._dispatcher.collective(*operation, async_op, timeout_s)

    def min_loc(
        self, x: Input, *, out: tuple[object, object] | None = None, async_op: bool = False, timeout_s: Timeout = None
    ) -> ResultOrWork:
        """Find the elementwise minimum over all ranks, and the rank that has it.

        Args:
            x: any shape, the same on every rank.
            out: arrays for both results, the second one of int64.

        Returns:
            (values, ranks), both of the shape of `x`, on every rank, or a Work of them. Where several ranks have the
            minimum, the lowest counts. NaN is less than any number, as for `numpy.argmin`.
        Source: MPI standard, MPI_MINLOC.
        """
        operation = self._extremum("min_loc", x, out, reads_when(async_op))
        return self._dispatcher.collective(*operation, async_op, timeout_s)

    def max_loc(
        self, x: Input, *, out: tuple[object, object] | None = None, async_op: bool = False, timeout_s: Timeout = None
    ) -> ResultOrWork:
        """Find the elementwise maximum over all ranks, and the rank that has it; see `min_loc`."""
        operation = self._extremum("max_loc", x, out, reads_when(async_op))
        return self._dispatcher.collective(*operation, async_op, timeout_s)

    def _prefixes(self, name: str, x: Input, op: Op, out: object, reads: Reads) -> Operation:
        input_array = self._check_input(x)
        array = input_array.array
        reduction = reduction_for(op, array.dtype, self.world_size)
        if reduction.op is ReduceOp.MEAN:
            raise UsageError(f"{name}: a mean is not defined: divide the sum by the number of ranks", op=name)
        first = None
        if name == "exscan":
            if reduction.op is None:
                raise UsageError("exscan needs a named reduction: a function gives rank 0 no value; use scan", op=name)
            first = _identity(reduction.op, array.dtype)
        result = OutputBuffer(input_array, out, array.shape)
        source = Source(array, reads)
        if result.overlaps(source.flat):
            source.copy()
        action = partial(_scan, self._backend, source.flat, result.flat, reduction, first, input_array.empty)
        call = Call(name, 0, array.dtype.name, 0, reduction.name, detail=f"shape {array.shape}")
        return call, source.before(action), result, array.nbytes, result.device

    def _extremum(self, name: str, x: Input, out: tuple[object, object] | None, reads: Reads) -> Operation:
        op, search = (ReduceOp.MIN, np.argmin) if name == "min_loc" else (ReduceOp.MAX, np.argmax)
        input_array = self._check_input(x)
        array = input_array.array
        reduction_for(op, array.dtype, self.world_size)  # refuses dtypes without order
        if out is not None and not (isinstance(out, tuple | list) and len(out) == 2):
            raise UsageError(f"{name}: out must be two arrays, for the values and for the ranks", op=name)
        out_values, out_ranks = out or (None, None)
        values = OutputBuffer(input_array, out_values, array.shape)
        ranks = OutputBuffer(input_array.with_dtype(np.dtype(np.int64)), out_ranks, array.shape)
        source = Source(array, reads)
        if values.overlaps(source.flat):
            source.copy()
        places: npt.NDArray[np.int64] = ranks.flat  # type: ignore[assignment]
        action = partial(_search, self._backend, source.flat, values.flat, places, search, input_array.empty)
        call = Call(name, 0, array.dtype.name, 0, detail=f"shape {array.shape}")
        return call, source.before(action), lambda: (values(), ranks()), array.nbytes, values.device


Allocate: TypeAlias = Callable[[tuple[int, ...]], Array]


def _contributions(backend: Backend, source: Array, allocate: Allocate, deadline: float) -> tuple[Array, list[int]]:
    """Gather all ranks' contributions to this rank's block, one in each row; return them and all blocks' sizes."""
    n = backend.world_size
    counts = [block.size for block in near_equal(source, n)]
    own = counts[backend.rank]
    received = allocate((n * own,))
    backend.all_to_all(source, received, counts, (own,) * n, deadline=deadline)
    return received.reshape(n, own), counts


def _scan(
    backend: Backend,
    source: Array,
    out: Array,
    reduction: Reduction,
    first: Any,
    allocate: Allocate,
    *,
    deadline: float,
) -> None:
    """Reduce every prefix of the ranks; the prefixes are exclusive if rank 0's result, `first`, is given."""
    n = backend.world_size
    rows, counts = _contributions(backend, source, allocate, deadline)
    own = rows.shape[1]
    results = allocate((n * own,)).reshape(n, own)  # row r is the block of rank r's result
    skipped = 0 if first is None else 1
    if skipped:
        results[0] = first
    for rank in range(skipped, n):
        end = rank - skipped
        # Half precision must not be rounded between the steps.
        operands = list(rows[: end + 1]) if reduction.needs_all or not end else [results[rank - 1], rows[end]]
        reduction.into(results[rank], operands, at_once=False)
    backend.all_to_all(results.reshape(-1), out, (own,) * n, counts, deadline=deadline)


def _search(
    backend: Backend,
    source: Array,
    values: Array,
    ranks: npt.NDArray[np.int64],
    search: Callable[..., Array],
    allocate: Allocate,
    *,
    deadline: float,
) -> None:
    """Find this rank's block of the extrema and of the ranks that have them; gather all blocks."""
    rows, counts = _contributions(backend, source, allocate, deadline)
    start = sum(counts[: backend.rank])
    own = slice(start, start + rows.shape[1])
    ranks[own] = search(rows, axis=0)
    values[own] = np.take_along_axis(rows, ranks[own][None], axis=0)[0]
    backend.all_gather(values, counts, deadline=deadline)
    backend.all_gather(ranks, counts, deadline=deadline)


def _identity(op: ReduceOp, dtype: np.dtype) -> Any:
    """Return the value that changes no other value in a reduction."""
    if op in (ReduceOp.SUM, ReduceOp.BOR, ReduceOp.BXOR, ReduceOp.PROD):
        return op is ReduceOp.PROD
    if op is ReduceOp.BAND:
        return True if dtype.kind == "b" else ~np.zeros((), dtype)
    least = op is ReduceOp.MAX
    if dtype.kind == "b":
        return not least
    if dtype.kind in "iu":
        return np.iinfo(dtype).min if least else np.iinfo(dtype).max
    return -np.inf if least else np.inf
