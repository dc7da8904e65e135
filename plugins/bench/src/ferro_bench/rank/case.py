"""A case: one collective at one size, as the driver tells it to the ranks."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

# nccl-tests' factors from algorithm bandwidth to bus bandwidth for n ranks: the bytes that pass the
# busiest link, relative to the array's size. For `copy`, which is no collective, the factor counts
# the bytes that all n ranks together read and write in memory.
BUS_FACTORS: dict[str, Callable[[int], float]] = {
    "all_reduce": lambda n: 2 * (n - 1) / n,
    "all_gather": lambda n: (n - 1) / n,
    "reduce_scatter": lambda n: (n - 1) / n,
    "broadcast": lambda n: 1.0,
    "all_to_all": lambda n: (n - 1) / n,
    "reduce": lambda n: 1.0,
    "gather": lambda n: (n - 1) / n,
    "scatter": lambda n: (n - 1) / n,
    "sendrecv": lambda n: 1.0,
    "barrier": lambda n: 0.0,
    "copy": lambda n: 2.0 * n,
}
COLLECTIVES = tuple(BUS_FACTORS)
IN_BLOCKS = frozenset({"all_gather", "reduce_scatter", "all_to_all", "gather", "scatter"})
REDUCING = frozenset({"all_reduce", "reduce_scatter", "reduce"})
PERSISTENT = frozenset(COLLECTIVES) - {"sendrecv", "copy"}  # what is measured as persistent operations, too
OPS = ("sum", "prod", "min", "max")


@dataclass(frozen=True, slots=True, kw_only=True)
class BenchCase:
    """One collective at one size.

    Attributes:
        collective: its name, one of `COLLECTIVES`.
        count: elements of the whole buffer: the result of all_gather and gather, the input of
            the others; a multiple of the number of ranks where it is cut into blocks.
        dtype: name of the elements' dtype.
        op: the reduction's name; not used where nothing is reduced.
        calls: timed calls in a turn.
        check: compare every result.
        async_op: start each call asynchronously, then wait for it.
        apart: enter a barrier before each timed call, so that no rank runs ahead of the others through several.
    """

    collective: str
    count: int
    dtype: str
    op: str
    calls: int
    check: bool
    async_op: bool
    apart: bool = False

    @property
    def settles(self) -> int:
        """The number of warm-up calls: none where a turn is a single long call."""
        return 1 if self.calls > 1 else 0
