"""Shapes: dims put in another order, joined, split, and arrays joined. Nothing is sent."""

from __future__ import annotations

import math
import operator
from collections.abc import Sequence

from ferro import UsageError

from ..nn.arrays import Array, namespace_of
from ..parts import even_sizes
from .alignment import Operand, align, together
from .layout import Shape
from .piece import Piece
from .placement import Shard, renamed
from .reductions import checked_dims


def transpose(x: Piece, axes: Sequence[int] | None = None) -> Piece:
    """Return a view with dims in another order, reversed when None."""
    ndim = len(x.shape)
    order = tuple(reversed(range(ndim))) if axes is None else checked_dims(axes, ndim, "transpose")
    if len(order) != ndim:
        raise UsageError(f"transpose: axes {axes} for an array of {ndim} dims", op="transpose")
    local = namespace_of(x.local).transpose(x.local, order)
    shape = tuple(x.shape[dim] for dim in order)
    return x.with_local(local, shape=shape, placements=renamed(x.placements, order.index))


def expand_dims(x: Piece, axis: int | Sequence[int]) -> Piece:
    """Return a view with new dims of size 1, at the places `axis` of the result."""
    given = (axis,) if isinstance(axis, int) else tuple(axis)
    ndim = len(x.shape) + len(given)
    new = checked_dims(given, ndim, "expand_dims")
    old = [dim for dim in range(ndim) if dim not in new]
    sizes = iter(x.shape)
    shape = tuple(1 if dim in new else next(sizes) for dim in range(ndim))
    local = namespace_of(x.local).expand_dims(x.local, new)
    return x.with_local(local, shape=shape, placements=renamed(x.placements, old.__getitem__))


def squeeze(x: Piece, axis: int | Sequence[int] | None = None) -> Piece:
    """Return a view without dims of size 1: those of `axis`, or all.

    Raises:
        UsageError: such a dim has another size, or is cut, so that some ranks have nothing of it.
    """
    ones = [dim for dim, size in enumerate(x.shape) if size == 1]
    gone = ones if axis is None else list(checked_dims(axis, len(x.shape), "squeeze"))
    cut = [one.dim for one in x.placements if isinstance(one, Shard)]
    for dim in gone:
        if x.shape[dim] != 1 or dim in cut:
            raise UsageError(
                f"squeeze: dim {dim} of shape {x.shape}, placed {x.placements}. Only dims of "
                "size 1 that no axis cuts can go; redistribute the dim to Replicate() first.",
                op="squeeze",
            )
    kept = [dim for dim in range(len(x.shape)) if dim not in gone]
    local = namespace_of(x.local).squeeze(x.local, tuple(gone))
    shape = tuple(x.shape[dim] for dim in kept)
    return x.with_local(local, shape=shape, placements=renamed(x.placements, kept.index))


def concatenate(arrays: Sequence[Piece], axis: int = 0) -> Piece:
    """Join arrays along a dim that no axis of the mesh cuts.

    Raises:
        UsageError: shapes do not fit, placements differ so that data would have to move, or the
            dim is cut: parts would have to go to other ranks.
    """
    if not arrays:
        raise UsageError("concatenate: no arrays", op="concatenate")
    first = arrays[0].shape
    (dim,) = checked_dims(axis, len(first), "concatenate")
    rests = {(*array.shape[:dim], *array.shape[dim + 1 :]) for array in arrays}
    if len(rests) > 1 or any(len(array.shape) != len(first) for array in arrays):
        shapes = ", ".join(str(array.shape) for array in arrays)
        raise UsageError(
            f"concatenate: shapes {shapes} differ in more than axis {dim}", op="concatenate"
        )
    labels = tuple(None if at == dim else at for at in range(len(first)))
    operands = [Operand(piece=array, labels=labels) for array in arrays]
    alignment = align("concatenate", operands, len(first), together)
    pieces = alignment.pieces()
    local = namespace_of(pieces[0].local).concatenate([piece.local for piece in pieces], axis=dim)
    total = sum(array.shape[dim] for array in arrays)
    shape = (*first[:dim], total, *first[dim + 1 :])
    return arrays[0].with_local(local, shape=shape, placements=alignment.result)


def stack(arrays: Sequence[Piece], axis: int = 0) -> Piece:
    """Join arrays of one shape along a new dim."""
    if not arrays or any(array.shape != arrays[0].shape for array in arrays):
        shapes = ", ".join(str(array.shape) for array in arrays)
        raise UsageError(f"stack: shapes {shapes} are not one shape", op="stack")
    (dim,) = checked_dims(axis, len(arrays[0].shape) + 1, "stack")
    return concatenate([expand_dims(array, dim) for array in arrays], dim)


def reshape(x: Piece, shape: int | Sequence[int]) -> Piece:
    """Return the same elements in another shape, where each rank keeps those that it has.

    That is so when a cut dim stays as it is, or is the first of those that are joined or split
    and cuts fall on the same elements: (8, 6) cut by rows on 2 ranks may become (48,) or
    (4, 2, 6), cut by rows, but cut by columns it may not become (48,).

    Raises:
        UsageError: sizes do not fit, or parts would have to move.
    """
    new = _checked_shape(x.shape, shape)
    groups = _matched(x.shape, new)
    becomes: dict[int, int] = {}
    for dim in {one.dim for one in x.placements if isinstance(one, Shard)}:
        found = next(
            (_successor(x, dim, old, after, new) for old, after in groups if dim in old), None
        )
        if found is None:
            raise UsageError(
                f"reshape: from {x.shape}, placed {x.placements}, to {new}: dim {dim} is cut, and "
                "the new shape's parts are on other ranks. Redistribute that dim to Replicate(), "
                "or another dim to Shard, first.",
                op="reshape",
            )
        becomes[dim] = found
    placements = renamed(x.placements, becomes.__getitem__)
    local: Array = x.local.reshape(x.local_shape(placements, new))
    return x.with_local(local, shape=new, placements=placements)


def _checked_shape(old: Shape, shape: int | Sequence[int]) -> Shape:
    new = [
        operator.index(size) for size in ((shape,) if not isinstance(shape, Sequence) else shape)
    ]
    size = math.prod(old)
    known = math.prod(one for one in new if one != -1)
    if new.count(-1) == 1 and known and size % known == 0:
        new[new.index(-1)] = size // known
    if min(new, default=0) < 0 or math.prod(new) != size:
        raise UsageError(
            f"reshape: {old} has {size} elements, which do not fill {shape}", op="reshape"
        )
    return tuple(new)


def _matched(old: Shape, new: Shape) -> list[tuple[list[int], list[int]]]:
    """Return runs of old dims and the runs of new ones that hold the same elements.

    From (2, 3, 4) to (6, 2, 2): ([0, 1], [0]) and ([2], [1, 2]). Equal dims at the start stand
    alone; of an array without elements all others are one run.
    """
    same = 0
    while same < min(len(old), len(new)) and old[same] == new[same]:
        same += 1
    groups = [([dim], [dim]) for dim in range(same)]
    before, after = list(range(same, len(old))), list(range(same, len(new)))
    if 0 in old:
        return [*groups, (before, after)]
    while before or after:
        left, right = before[:1], after[:1]
        del before[:1], after[:1]
        while math.prod(old[dim] for dim in left) != math.prod(new[dim] for dim in right):
            if math.prod(old[dim] for dim in left) < math.prod(new[dim] for dim in right):
                left.append(before.pop(0))
            else:
                right.append(after.pop(0))
        groups.append((left, right))
    return groups


def _successor(x: Piece, dim: int, old: list[int], after: list[int], new: Shape) -> int | None:
    """Return the new dim that is cut where `dim` was, if there is one; each rank asks for all."""
    if [x.shape[at] for at in old] == [new[at] for at in after]:
        return after[old.index(dim)]
    if 0 in x.shape or any(x.shape[at] > 1 for at in old[: old.index(dim)]):
        return None
    lead = next((at for at in after if new[at] > 1), None)
    if lead is None:
        return None
    cuts = [
        ranks
        for one, ranks in zip(x.placements, x.mesh.shape, strict=True)
        if isinstance(one, Shard) and one.dim == dim
    ]
    row = math.prod(x.shape[at] for at in old[old.index(dim) + 1 :])
    new_row = math.prod(new[at] for at in after[after.index(lead) + 1 :])
    old_ends = [end * row for end in _ends(x.shape[dim], cuts)]
    return lead if old_ends == [end * new_row for end in _ends(new[lead], cuts)] else None


def _ends(size: int, cuts: Sequence[int]) -> list[int]:
    """Return where parts end when `size` rows are cut by one axis after the other."""
    sizes = [size]
    for ranks in cuts:
        sizes = [piece for one in sizes for piece in even_sizes(one, ranks)]
    return [sum(sizes[: index + 1]) for index in range(len(sizes))]
