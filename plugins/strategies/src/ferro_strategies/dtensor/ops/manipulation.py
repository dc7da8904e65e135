"""Manipulate shapes by transpose, reshape, concatenate and the like; nothing is sent."""

from __future__ import annotations

import itertools
import math
import operator
from collections.abc import Sequence

import numpy as np

from ferro import UsageError
from ferro.collectives.partition import even_sizes

from ...nn.arrays import Array, namespace_of
from ..local_shapes import Shape
from ..placed_array import PlacedArray
from ..placement import Shard, map_shard_dims
from .reductions import checked_dims
from .sharding_propagation import Operand, jointly_linear, propagate_sharding


def transpose(x: PlacedArray, axes: Sequence[int] | None = None) -> PlacedArray:
    """Return a view with dims in the order `axes`; None reverses them."""
    ndim = len(x.shape)
    order = tuple(reversed(range(ndim))) if axes is None else checked_dims(axes, ndim, "transpose")
    if len(order) != ndim:
        raise UsageError(f"transpose: axes {axes} for an array of {ndim} dims", op="transpose")
    local = namespace_of(x.local).transpose(x.local, order)
    shape = tuple(x.shape[dim] for dim in order)
    return x.with_view(local, shape=shape, placements=map_shard_dims(x.placements, order.index))


def expand_dims(x: PlacedArray, axis: int | Sequence[int]) -> PlacedArray:
    """Return a view with new dims of size 1; `axis` numbers them in the result."""
    count = len(axis) if isinstance(axis, Sequence) else 1
    ndim = len(x.shape) + count
    new = checked_dims(axis, ndim, "expand_dims")
    old = [dim for dim in range(ndim) if dim not in new]
    sizes = iter(x.shape)
    shape = tuple(1 if dim in new else next(sizes) for dim in range(ndim))
    local = namespace_of(x.local).expand_dims(x.local, new)
    return x.with_view(local, shape=shape, placements=map_shard_dims(x.placements, old.__getitem__))


def squeeze(x: PlacedArray, axis: int | Sequence[int] | None = None) -> PlacedArray:
    """Return a view without the dims `axis` of size 1; None removes all dims of size 1.

    Raises:
        UsageError: such a dim has another size, or is sharded, so that some ranks have none of it.
    """
    ones = [dim for dim, size in enumerate(x.shape) if size == 1]
    removed = ones if axis is None else list(checked_dims(axis, len(x.shape), "squeeze"))
    sharded = [one.dim for one in x.placements if isinstance(one, Shard)]
    for dim in removed:
        if x.shape[dim] != 1 or dim in sharded:
            raise UsageError(
                f"squeeze: dim {dim} of shape {x.shape}, placed {x.placements}. Only dims of "
                "size 1 that no axis cuts can go; redistribute the dim to Replicate() first.",
                op="squeeze",
            )
    kept = [dim for dim in range(len(x.shape)) if dim not in removed]
    local = namespace_of(x.local).squeeze(x.local, tuple(removed))
    shape = tuple(x.shape[dim] for dim in kept)
    return x.with_view(local, shape=shape, placements=map_shard_dims(x.placements, kept.index))


def concatenate(arrays: Sequence[PlacedArray], axis: int | None = 0, dtype: np.dtype | None = None) -> PlacedArray:
    """Join arrays along a dim that no axis of the mesh shards; None joins the arrays' elements in one dim.

    Raises:
        UsageError: shapes do not fit, or data would have to move to other ranks, because the
            placements differ or the dim is sharded.
    """
    if not arrays:
        raise UsageError("concatenate: no arrays", op="concatenate")
    if axis is None:
        arrays, axis = [reshape(array, -1) for array in arrays], 0
    first = arrays[0].shape
    (dim,) = checked_dims(axis, len(first), "concatenate")
    rests = {(*array.shape[:dim], *array.shape[dim + 1 :]) for array in arrays}
    if len(rests) > 1 or any(len(array.shape) != len(first) for array in arrays):
        shapes = ", ".join(str(array.shape) for array in arrays)
        raise UsageError(f"concatenate: shapes {shapes} differ in more than axis {dim}", op="concatenate")
    labels = tuple(None if at == dim else at for at in range(len(first)))
    operands = [Operand(array=array, labels=labels) for array in arrays]
    if dtype is None:
        dtype = np.result_type(*(array.dtype for array in arrays))
    sharding = propagate_sharding("concatenate", operands, len(first), jointly_linear, dtype)
    locals_ = [array.local for array in sharding.redistribute_operands()]
    local = namespace_of(locals_[0]).concatenate(locals_, axis=dim)
    total = sum(array.shape[dim] for array in arrays)
    shape = (*first[:dim], total, *first[dim + 1 :])
    return arrays[0].with_local(local, shape=shape, placements=sharding.result, dtype=dtype)


def stack(arrays: Sequence[PlacedArray], axis: int = 0, dtype: np.dtype | None = None) -> PlacedArray:
    """Join arrays of one shape along a new dim."""
    if not arrays or any(array.shape != arrays[0].shape for array in arrays):
        shapes = ", ".join(str(array.shape) for array in arrays)
        raise UsageError(f"stack: shapes {shapes} are not one shape", op="stack")
    (dim,) = checked_dims(axis, len(arrays[0].shape) + 1, "stack")
    return concatenate([expand_dims(array, dim) for array in arrays], dim, dtype)


def reshape(x: PlacedArray, shape: int | Sequence[int]) -> PlacedArray:
    """Return the same elements in another shape, if each rank keeps the elements that it has.

    A sharded dim must stay as it is, or be the first of the dims that are joined or split. In the second case the
    shards of the new dim must hold the same elements: (8, 6) sharded by rows on 2 ranks may become (48,) or (4, 2, 6),
    sharded by rows; sharded by columns it may not become (48,).

    Raises:
        UsageError: sizes do not fit, or parts would have to move.
    """
    new = _checked_shape(x.shape, shape)
    groups = _matching_dims(x.shape, new)
    new_dim: dict[int, int] = {}
    for dim in {one.dim for one in x.placements if isinstance(one, Shard)}:
        found = next((_matching_shard_dim(x, dim, old, after, new) for old, after in groups if dim in old), None)
        if found is None:
            raise UsageError(
                f"reshape: from {x.shape}, placed {x.placements}, to {new}: dim {dim} is cut, and "
                "the new shape's parts are on other ranks. Redistribute that dim to Replicate(), "
                "or another dim to Shard, first.",
                op="reshape",
            )
        new_dim[dim] = found
    placements = map_shard_dims(x.placements, new_dim.__getitem__)
    local: Array = x.local.reshape(x.local_shape(placements, new))
    return x.with_view(local, shape=new, placements=placements)


def _checked_shape(old: Shape, shape: int | Sequence[int]) -> Shape:
    new = [operator.index(size) for size in (shape if isinstance(shape, Sequence | np.ndarray) else (shape,))]
    size = math.prod(old)
    known = math.prod(one for one in new if one != -1)
    if new.count(-1) == 1 and known and size % known == 0:
        new[new.index(-1)] = size // known
    if min(new, default=0) < 0 or math.prod(new) != size:
        raise UsageError(f"reshape: {old} has {size} elements, which do not fill {shape}", op="reshape")
    return tuple(new)


def _matching_dims(old: Shape, new: Shape) -> list[tuple[list[int], list[int]]]:
    """Pair consecutive old dims with the consecutive new dims that hold the same elements.

    From (2, 3, 4) to (6, 2, 2) the pairs are ([0, 1], [0]) and ([2], [1, 2]). Each of the equal dims at the start makes
    a pair. If the array has no elements, all other dims make one pair.
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


def _matching_shard_dim(x: PlacedArray, dim: int, old: list[int], after: list[int], new: Shape) -> int | None:
    """Return the new dim whose shards hold the same elements as those of `dim`, or None."""
    if [x.shape[at] for at in old] == [new[at] for at in after]:
        return after[old.index(dim)]
    if 0 in x.shape or any(x.shape[at] > 1 for at in old[: old.index(dim)]):
        return None
    lead = next((at for at in after if new[at] > 1), None)
    if lead is None:
        return None
    axis_sizes = [
        ranks
        for one, ranks in zip(x.placements, x.mesh.shape, strict=True)
        if isinstance(one, Shard) and one.dim == dim
    ]
    row = math.prod(x.shape[at] for at in old[old.index(dim) + 1 :])
    new_row = math.prod(new[at] for at in after[after.index(lead) + 1 :])
    old_ends = [end * row for end in _shard_ends(x.shape[dim], axis_sizes)]
    return lead if old_ends == [end * new_row for end in _shard_ends(new[lead], axis_sizes)] else None


def _shard_ends(size: int, axis_sizes: Sequence[int]) -> list[int]:
    """Return the end of each shard when one axis after the other shards `size` rows."""
    sizes = [size]
    for ranks in axis_sizes:
        sizes = [part for one in sizes for part in even_sizes(one, ranks)]
    return list(itertools.accumulate(sizes))
