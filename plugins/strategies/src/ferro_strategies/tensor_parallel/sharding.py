"""Arrays and batches of sequences sharded over ranks: sizes, slices, gathering and scattering.

Collectives divide and concatenate along axis 0. Another dimension is moved to the front as a view, so that only the
collective copies its operand; the result is a view with the dimensions in their old order.

Matrix products do not depend on the order of rows. With time first, the rows of one rank's positions are contiguous, so
gathering and scattering sequences needs no further copy.
"""

from __future__ import annotations

from dataclasses import dataclass
from itertools import accumulate

from ferro import ProcessGroup
from ferro.collectives.partition import even_sizes

from ..nn.arrays import Array, namespace_of


def shard_slice(sizes: tuple[int, ...], rank: int) -> slice:
    """Locate a rank's shard, given the sizes of all."""
    ends = (0, *accumulate(sizes))
    return slice(ends[rank], ends[rank + 1])


def local_shard(x: Array, group: ProcessGroup, dim: int, sizes: tuple[int, ...]) -> Array:
    """View this rank's shard of `x` along `dim`."""
    shard: Array = x.swapaxes(0, dim)[shard_slice(sizes, group.rank)].swapaxes(0, dim)
    return shard


def all_gather_sizes(size: int, group: ProcessGroup, like: Array) -> tuple[int, ...]:
    """All-gather the ranks' `size`, through an array on the device of `like`; all call it."""
    own = namespace_of(like).array([size])
    return tuple(int(count) for count in group.all_gather(own).tolist())


def all_gather_along(x: Array, group: ProcessGroup, dim: int, sizes: tuple[int, ...]) -> Array:
    """Concatenate the ranks' shards, of these sizes along `dim`; all call it."""
    whole: Array = group.all_gather(x.swapaxes(0, dim), sizes=sizes).swapaxes(0, dim)
    return whole


def reduce_scatter_along(x: Array, group: ProcessGroup, dim: int, sizes: tuple[int, ...]) -> Array:
    """Sum `x` over the ranks and keep this rank's shard along `dim`; all call it."""
    shard: Array = group.reduce_scatter(x.swapaxes(0, dim), sizes=sizes).swapaxes(0, dim)
    return shard


@dataclass(frozen=True, slots=True)
class SequenceSharding:
    """The division of sequences (B, T, D), of which each rank has some positions.

    Attributes:
        batch: number of sequences, B.
        lengths: positions of each rank; their sum is T.
    """

    batch: int
    lengths: tuple[int, ...]

    @classmethod
    def of_shard(cls, x: Array, group: ProcessGroup) -> SequenceSharding:
        """All-gather the lengths of the ranks' shards; `x` is this rank's shard, (B, t, D)."""
        return cls(x.shape[0], all_gather_sizes(x.shape[1], group, x))

    @classmethod
    def of_whole(cls, x: Array, group: ProcessGroup) -> SequenceSharding:
        """Divide sequences (B, T, ...), which all ranks have, as numpy.array_split does."""
        return cls(x.shape[0], even_sizes(x.shape[1], group.world_size))

    @property
    def rows(self) -> tuple[int, ...]:
        """The number of matrix rows of each rank."""
        return tuple(length * self.batch for length in self.lengths)

    @property
    def whole(self) -> tuple[int, int]:
        """The shape (B, T) of the whole."""
        return self.batch, sum(self.lengths)


def to_rows(x: Array, sharding: SequenceSharding | None) -> Array:
    """Reshape (..., D) to rows (N, D), time first for sharded sequences; a view if possible."""
    if sharding is not None:
        x = x.swapaxes(0, 1)
    return x.reshape(x.size // x.shape[-1], x.shape[-1])


def from_rows(rows: Array, lead: tuple[int, ...], sharding: SequenceSharding | None) -> Array:
    """View rows (N, D) as (*lead, D): the inverse of `to_rows`."""
    if sharding is None:
        return rows.reshape(*lead, rows.shape[1])
    batch, length = lead
    return rows.reshape(length, batch, rows.shape[1]).swapaxes(0, 1)
