"""Redistribute an array: run the steps of a plan with collectives along the axes of the mesh.

Collectives split axis 0, so the dim of a step is moved there as a view. An array that must be contiguous is copied
once, before the collective or by it.
"""

from __future__ import annotations

import math

from ferro.collectives.partition import even_sizes

from ..nn.arrays import Array, namespace_of
from .local_shapes import index_along, shard_slice
from .placed_array import PlacedArray
from .placement import Partial, Placements, Shard
from .redistribute_plan import plan_redistribute
from .redistribute_steps import RedistributeStep, StepKind

# The sum of -0.0 and a floating number has the number's bits, also those of -0.0.
_IDENTITY = {"sum": -0.0, "prod": 1}


def redistribute(x: PlacedArray, placements: Placements, *, copy: bool = True) -> PlacedArray:
    """Change an array's placements; all ranks of the mesh call it.

    Args:
        x: the array; unchanged.
        placements: the new ones, checked.
        copy: make sure that the result shares no memory with `x`, unless the placements are the same.
    """
    if placements == x.placements:
        return x
    plan = plan_redistribute(x.placements, placements, x.shape, x.mesh.shape)
    if _has_several_reductions(x):
        x = x.widened()  # between two reductions, half precision would be rounded
    local = x.local
    for step in plan.steps:
        local = _RUN[step.kind](x, step, local)
    if copy and plan.steps[-1].kind in (StepKind.SLICE, StepKind.RELABEL):
        local = local.copy()  # a view would share and keep alive the array that it was cut from
    return x.with_local(local, placements=placements, dtype=x.dtype)


def moved_itemsize(x: PlacedArray) -> int:
    """Return the bytes of an element as a redistribution sends it."""
    return (x.widened() if _has_several_reductions(x) else x).local.dtype.itemsize


def _has_several_reductions(x: PlacedArray) -> bool:
    return sum(isinstance(one, Partial) for one in x.placements) > 1


def identity_array(like: Array, shape: tuple[int, ...], op: str) -> Array:
    """Return an array of the reduction's identity, such as zeros for a sum."""
    value = complex(-0.0, -0.0) if op == "sum" and like.dtype.kind == "c" else _IDENTITY[op]
    full: Array = namespace_of(like).full(shape, value, dtype=like.dtype)
    return full


def _all_gather(x: PlacedArray, step: RedistributeStep, local: Array) -> Array:
    assert isinstance(step.source, Shard), "an all_gather starts from shards"
    dim = step.source.dim
    rows = x.local_shape(step.after)[dim]
    xp = namespace_of(local)
    sizes = even_sizes(rows, x.mesh.shape[step.axis])
    whole = x.mesh.group(step.axis).all_gather(xp.moveaxis(local, dim, 0), sizes=sizes)
    gathered: Array = xp.moveaxis(whole, 0, dim)
    return gathered


def _all_reduce(x: PlacedArray, step: RedistributeStep, local: Array) -> Array:
    assert isinstance(step.source, Partial), "an all_reduce starts from a Partial"
    reduced: Array = x.mesh.group(step.axis).all_reduce(local, step.source.op)
    return reduced


def _reduce_scatter(x: PlacedArray, step: RedistributeStep, local: Array) -> Array:
    assert isinstance(step.source, Partial), "a reduce_scatter starts from a Partial"
    assert isinstance(step.target, Shard), "a reduce_scatter ends in shards"
    dim = step.target.dim
    xp = namespace_of(local)
    sizes = even_sizes(local.shape[dim], x.mesh.shape[step.axis])
    group = x.mesh.group(step.axis)
    rows = group.reduce_scatter(xp.moveaxis(local, dim, 0), step.source.op, sizes=sizes)
    shard: Array = xp.moveaxis(rows, 0, dim)
    return shard


def _all_to_all(x: PlacedArray, step: RedistributeStep, local: Array) -> Array:
    """Send rank j its columns of this rank's rows; receive this rank's columns of all rows.

    The dim that was sharded is moved to the front. The blocks that arrive are then consecutive
    rows of the result, which needs no further copy. For 3 rows and 2 columns on 2 ranks, with rows
    0 and 1 on the first:

        rank 0 has   00 01      sends it   00 10 | 01 11      ends with      00 10 20
                     10 11
        rank 1 has   20 21      sends it   20    | 21         ends with      01 11 21
    """
    assert isinstance(step.source, Shard), "an all_to_all starts from shards"
    assert isinstance(step.target, Shard), "an all_to_all ends in shards"
    old_dim, new_dim = step.source.dim, step.target.dim
    xp = namespace_of(local)
    ranks, rank = x.mesh.shape[step.axis], x.coordinates[step.axis]
    after = x.local_shape(step.after)
    length, width = after[old_dim], local.shape[new_dim]
    others = math.prod(size for dim, size in enumerate(after) if dim not in (old_dim, new_dim))
    rows, columns = local.shape[old_dim], even_sizes(width, ranks)

    rows_first = xp.moveaxis(local, old_dim, 0)
    column_dim = new_dim + (new_dim < old_dim)  # moveaxis shifts the dims before old_dim by one
    packed = xp.empty(local.size, local.dtype)
    send_sizes = [rows * count * others for count in columns]
    start = 0
    for index, size in enumerate(send_sizes):
        block = rows_first[index_along(column_dim, shard_slice(width, ranks, index))]
        packed[start : start + size].reshape(block.shape)[...] = block
        start += size
    group = x.mesh.group(step.axis)
    if length % ranks == 0 and width % ranks == 0:  # all blocks have one size: no sizes are needed
        arrived = group.all_to_all(packed)
    else:
        recv_sizes = [count * columns[rank] * others for count in even_sizes(length, ranks)]
        arrived = group.all_to_all(packed, send_sizes=send_sizes, recv_sizes=recv_sizes)
    front = (length, *(size for dim, size in enumerate(after) if dim != old_dim))
    exchanged: Array = xp.moveaxis(arrived.reshape(front), 0, old_dim)
    return exchanged


def _slice(x: PlacedArray, step: RedistributeStep, local: Array) -> Array:
    assert isinstance(step.target, Shard), "a slice ends in shards"
    dim = step.target.dim
    ranks, rank = x.mesh.shape[step.axis], x.coordinates[step.axis]
    part: Array = local[index_along(dim, shard_slice(local.shape[dim], ranks, rank))]
    return part


def _contribute(x: PlacedArray, step: RedistributeStep, local: Array) -> Array:
    """Return an array of full size; the reduction of these arrays over the ranks is the value."""
    assert isinstance(step.target, Partial), "a contribution ends in a Partial"
    op, rank = step.target.op, x.coordinates[step.axis]
    if isinstance(step.source, Shard):
        dim = step.source.dim
        whole = identity_array(local, x.local_shape(step.after), op)
        rows = shard_slice(whole.shape[dim], x.mesh.shape[step.axis], rank)
        whole[index_along(dim, rows)] = local
        return whole
    if op in _IDENTITY and rank > 0:
        return identity_array(local, local.shape, op)
    return local.copy()


def _relabel(x: PlacedArray, step: RedistributeStep, local: Array) -> Array:
    return local


_RUN = {
    StepKind.ALL_GATHER: _all_gather,
    StepKind.ALL_REDUCE: _all_reduce,
    StepKind.REDUCE_SCATTER: _reduce_scatter,
    StepKind.ALL_TO_ALL: _all_to_all,
    StepKind.SLICE: _slice,
    StepKind.CONTRIBUTE: _contribute,
    StepKind.RELABEL: _relabel,
}
