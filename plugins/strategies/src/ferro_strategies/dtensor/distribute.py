"""distribute: make a DTensor of an array that every rank has, or that one rank has."""

from __future__ import annotations

from collections.abc import Sequence
from types import ModuleType
from typing import Any

import numpy as np

from ferro import UnsupportedError, UsageError
from ferro.arrays import dtype_from_name, dtype_problem
from ferro.collectives.partition import even_sizes

from ..mesh import DeviceMesh
from ..nn.arrays import Array, namespace_of
from .local_shapes import Shape, local_shape
from .placed_array import PlacedArray, coordinates_in, replicated
from .placement import Partial, Placement, Placements, Shard, checked_placements
from .redistribute import identity_array, redistribute
from .tensor import DTensor


def distribute(
    array: Array | None, mesh: DeviceMesh, placements: Sequence[Placement], *, source: int | None = None
) -> DTensor:
    """Spread an array over a mesh; the result has memory of its own.

    Args:
        array: the global array. With `source`, only that rank's array is used: the other ranks
            give None, or any array of the library (CuPy) that is to hold the result.
        mesh: the ranks, all of which call this.
        placements: one for each axis of the mesh.
        source: a rank of the mesh's parent group, which sends each rank only its part. None: every
            rank gives the same array and keeps its part; nothing is sent or compared.

    Raises:
        UsageError: placements do not fit the mesh or the array, or the source gives no array.
            Every rank raises it, and only the array's shape and dtype were sent.
        UnsupportedError: an array of text or of Python's objects.
    """
    if source is None:
        if array is None:
            raise UsageError(
                "distribute: no array. Give it on every rank, or on one and say which (source=).", op="distribute"
            )
        namespace_of(array)  # raises UsageError for an object that is no array
        if array.dtype.kind in "OSU":
            raise UnsupportedError(f"distribute: the array has {dtype_problem(array.dtype)}", op="distribute")
        checked = checked_placements(placements, mesh.ndim, array.ndim, "distribute")
        return DTensor(_keep_own_part(array, mesh, checked))
    return DTensor(_send_from_source(array, mesh, placements, source))


def _keep_own_part(array: Array, mesh: DeviceMesh, placements: Placements) -> PlacedArray:
    coordinates_in(mesh)  # raises UsageError on a rank outside the mesh
    whole = replicated(array, mesh)
    placed = redistribute(whole, placements)
    return placed.with_local(array.copy()) if placed is whole else placed


def _send_from_source(
    array: Array | None, mesh: DeviceMesh, placements: Sequence[Placement], source: int
) -> PlacedArray:
    """Send each rank its part of the array that rank `source` of the mesh's parent group has.

    One axis after the other, the ranks that have data send it along the axis: by a scatter if the axis shards,
    otherwise by a broadcast. For two sharding axes of size 2, from rank 0: first 0 sends half of the array to 2, then 0
    and 2 send half of their halves to 1 and 3.

    Args:
        array: the whole array at the source; elsewhere a CuPy array if the result is to be one, or anything else.
        mesh: the ranks.
        placements: not checked yet, because only the source knows the number of dims.
        source: the rank that has the array.

    Raises:
        UsageError: the source has no array, or placements do not fit; raised on every rank.
    """
    here, there = coordinates_in(mesh), mesh.coordinates_of(source)
    whole, dtype = _broadcast_shape_and_dtype(array, mesh, source)
    checked = checked_placements(placements, mesh.ndim, len(whole), "distribute")
    xp = _namespace_or_numpy(array)
    given = array if here == there else None
    local = xp.empty(0, dtype) if given is None else given
    for axis, placement in enumerate(checked):
        if here[axis + 1 :] != there[axis + 1 :]:
            continue  # this rank gets its part along a later axis
        root, group = there[axis], mesh.group(axis)
        shape = local_shape(whole, mesh.shape[: axis + 1], checked[: axis + 1], here[: axis + 1])
        is_root = here[axis] == root
        if isinstance(placement, Shard):
            dim = placement.dim
            front = (shape[dim], *shape[:dim], *shape[dim + 1 :])
            rows = xp.moveaxis(local, dim, 0) if is_root else None
            sizes = even_sizes(local.shape[dim], mesh.shape[axis]) if is_root else None
            out = xp.empty(front, dtype)
            local = xp.moveaxis(group.scatter(rows, root, sizes=sizes, out=out), 0, dim)
        elif isinstance(placement, Partial) and placement.op in ("sum", "prod"):
            local = local if is_root else identity_array(local, shape, placement.op)
        else:
            out = xp.empty(shape, dtype)
            local = group.broadcast(local if is_root else out, root, out=out)
    own = local.copy() if local is given else local
    return PlacedArray(local=own, mesh=mesh, shape=whole, placements=checked)


def _namespace_or_numpy(array: object) -> ModuleType:
    """Return the library of the result on a rank that is not the source, which may give anything."""
    try:
        return namespace_of(array)  # type: ignore[arg-type]
    except UsageError:
        return np


def _broadcast_shape_and_dtype(array: Array | None, mesh: DeviceMesh, source: int) -> tuple[Shape, np.dtype]:
    """Broadcast the shape and dtype of the source's array, along one axis after the other."""
    here, there = coordinates_in(mesh), mesh.coordinates_of(source)
    message: Any = _shape_and_dtype_or_error(array) if here == there else None
    for axis in range(mesh.ndim):
        if here[axis + 1 :] == there[axis + 1 :]:
            message = mesh.group(axis).broadcast_object(message, there[axis])
    if isinstance(message, str):
        raise UsageError(
            f"distribute: rank {source} is the source and must give the array: {message}", op="distribute", peer=source
        )
    shape, dtype = message
    return tuple(shape), dtype_from_name(dtype)


def _shape_and_dtype_or_error(array: Array | None) -> list[object] | str:
    """Return an array's shape and dtype, or the error that all ranks are to raise."""
    if array is None:
        return "it gave None"
    try:
        namespace_of(array)
    except UsageError as error:
        return str(error)
    wrong = dtype_problem(array.dtype)
    return f"it has {wrong}" if wrong else [list(array.shape), array.dtype.name]
