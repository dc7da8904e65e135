"""Redistribution: carrying out a plan's steps, each with one collective of the group along an axis.

Collectives cut along axis 0, so the dim at hand is moved there, as a view; what has to be
contiguous is copied once, on its way into the collective or by it.
"""

from __future__ import annotations

import math

from ..nn.arrays import Array, namespace_of
from ..parts import even_sizes
from .layout import along, part
from .piece import Piece
from .placement import Partial, Placements, Shard
from .planner import plan
from .steps import How, Step

_IDENTITY = {"sum": 0, "prod": 1}


def redistributed(piece: Piece, placements: Placements, *, copy: bool = True) -> Piece:
    """Return the same array, placed otherwise; all ranks of the mesh call it.

    Args:
        piece: what this rank holds; unchanged.
        placements: the new ones, checked.
        copy: the result shares no memory with `piece`, unless nothing is to be done.
    """
    if placements == piece.placements:
        return piece
    way = plan(piece.placements, placements, piece.shape, piece.mesh.shape)
    local = piece.local
    for step in way.steps:
        local = _DO[step.how](piece, step, local)
    if copy and way.steps[-1].how in (How.SLICE, How.RELABEL):
        local = local.copy()  # or all of what it was cut from would be kept, and shared
    return piece.with_local(local, placements=placements)


def filled(like: Array, shape: tuple[int, ...], op: str) -> Array:
    """Return an array that changes nothing when it is reduced with others: zeros for a sum."""
    full: Array = namespace_of(like).full(shape, _IDENTITY[op], dtype=like.dtype)
    return full


def _all_gather(piece: Piece, step: Step, local: Array) -> Array:
    assert isinstance(step.source, Shard), "what is gathered is cut"
    dim = step.source.dim
    rows = piece.local_shape(step.after)[dim]
    xp = namespace_of(local)
    sizes = even_sizes(rows, piece.mesh.shape[step.axis])
    whole = piece.mesh.group(step.axis).all_gather(xp.moveaxis(local, dim, 0), sizes=sizes)
    gathered: Array = xp.moveaxis(whole, 0, dim)
    return gathered


def _all_reduce(piece: Piece, step: Step, local: Array) -> Array:
    assert isinstance(step.source, Partial), "what is reduced is partial"
    reduced: Array = piece.mesh.group(step.axis).all_reduce(local, step.source.op)
    return reduced


def _reduce_scatter(piece: Piece, step: Step, local: Array) -> Array:
    assert isinstance(step.source, Partial), "what is reduced is partial"
    assert isinstance(step.target, Shard), "what is scattered becomes cut"
    dim = step.target.dim
    xp = namespace_of(local)
    sizes = even_sizes(local.shape[dim], piece.mesh.shape[step.axis])
    group = piece.mesh.group(step.axis)
    rows = group.reduce_scatter(xp.moveaxis(local, dim, 0), step.source.op, sizes=sizes)
    own: Array = xp.moveaxis(rows, 0, dim)
    return own


def _all_to_all(piece: Piece, step: Step, local: Array) -> Array:
    """Give rank j the columns it is to have of this rank's rows; get the other ranks' rows.

    With the dim that was cut in front, blocks follow each other as rows of the result, which
    needs no further copy. For 3 rows and 2 columns on 2 ranks, rows 0 and 1 on the first:

        rank 0 has   00 01      sends it   00 10 | 01 11      is left with   00 10 20
                     10 11
        rank 1 has   20 21      sends it   20    | 21         is left with   01 11 21
    """
    assert isinstance(step.source, Shard), "what is exchanged is cut"
    assert isinstance(step.target, Shard), "what is exchanged stays cut"
    cut, to_cut = step.source.dim, step.target.dim
    xp = namespace_of(local)
    ranks, rank = piece.mesh.shape[step.axis], piece.coordinate[step.axis]
    after = piece.local_shape(step.after)
    length, width = after[cut], local.shape[to_cut]
    others = math.prod(size for dim, size in enumerate(after) if dim not in (cut, to_cut))
    mine, columns = local.shape[cut], even_sizes(width, ranks)

    rows_first = xp.moveaxis(local, cut, 0)
    column_dim = to_cut + (to_cut < cut)  # where the other dim is now
    packed = xp.empty(local.size, local.dtype)
    sends = [mine * count * others for count in columns]
    start = 0
    for index, size in enumerate(sends):
        block = rows_first[along(column_dim, part(width, ranks, index))]
        packed[start : start + size].reshape(block.shape)[...] = block
        start += size
    group = piece.mesh.group(step.axis)
    if length % ranks == 0 and width % ranks == 0:  # the same on all: no sizes need be told
        arrived = group.all_to_all(packed)
    else:
        receives = [count * columns[rank] * others for count in even_sizes(length, ranks)]
        arrived = group.all_to_all(packed, send_sizes=sends, recv_sizes=receives)
    front = (length, *(size for dim, size in enumerate(after) if dim != cut))
    exchanged: Array = xp.moveaxis(arrived.reshape(front), 0, cut)
    return exchanged


def _slice(piece: Piece, step: Step, local: Array) -> Array:
    assert isinstance(step.target, Shard), "what is sliced becomes cut"
    dim = step.target.dim
    ranks, rank = piece.mesh.shape[step.axis], piece.coordinate[step.axis]
    return local[along(dim, part(local.shape[dim], ranks, rank))]


def _contribute(piece: Piece, step: Step, local: Array) -> Array:
    """Return an array of full size, of which the sum (or other reduction) is the value."""
    assert isinstance(step.target, Partial), "what is contributed becomes partial"
    op, rank = step.target.op, piece.coordinate[step.axis]
    if isinstance(step.source, Shard):
        dim = step.source.dim
        whole = filled(local, piece.local_shape(step.after), op)
        whole[along(dim, part(whole.shape[dim], piece.mesh.shape[step.axis], rank))] = local
        return whole
    if op in _IDENTITY and rank > 0:
        return filled(local, local.shape, op)
    return local.copy()


def _relabel(piece: Piece, step: Step, local: Array) -> Array:
    return local


_DO = {
    How.ALL_GATHER: _all_gather,
    How.ALL_REDUCE: _all_reduce,
    How.REDUCE_SCATTER: _reduce_scatter,
    How.ALL_TO_ALL: _all_to_all,
    How.SLICE: _slice,
    How.CONTRIBUTE: _contribute,
    How.RELABEL: _relabel,
}
