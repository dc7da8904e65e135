"""Cuts: arrays in one piece per rank, along any dimension.

Collectives cut and concatenate along axis 0. Another dimension is brought to the front as a
view, so that the collective's own copy of its operand is the only one; what comes back is a view
with the dimensions in their order again.
"""

from __future__ import annotations

from itertools import accumulate

from ferro import ProcessGroup

from ..nn.arrays import Array, namespace_of


def own_piece(sizes: tuple[int, ...], rank: int) -> slice:
    """Return where a rank's piece lies."""
    ends = (0, *accumulate(sizes))
    return slice(ends[rank], ends[rank + 1])


def take_piece(x: Array, group: ProcessGroup, dim: int, sizes: tuple[int, ...]) -> Array:
    """View this rank's piece of `x`, which is cut along `dim`."""
    piece: Array = x.swapaxes(0, dim)[own_piece(sizes, group.rank)].swapaxes(0, dim)
    return piece


def everyones_sizes(size: int, group: ProcessGroup, like: Array) -> tuple[int, ...]:
    """Tell the ranks each other's `size`, on the device of `like`; all call it."""
    mine = namespace_of(like).array([size])
    return tuple(int(count) for count in group.all_gather(mine).tolist())


def gather_along(x: Array, group: ProcessGroup, dim: int, sizes: tuple[int, ...]) -> Array:
    """Concatenate the ranks' pieces, of these sizes along `dim`; all call it."""
    whole: Array = group.all_gather(x.swapaxes(0, dim), sizes=sizes).swapaxes(0, dim)
    return whole


def reduce_scatter_along(x: Array, group: ProcessGroup, dim: int, sizes: tuple[int, ...]) -> Array:
    """Sum `x` over the ranks and keep this rank's piece of `dim`; all call it."""
    piece: Array = group.reduce_scatter(x.swapaxes(0, dim), sizes=sizes).swapaxes(0, dim)
    return piece
