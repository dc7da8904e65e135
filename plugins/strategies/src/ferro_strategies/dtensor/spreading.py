"""Spreading: how arrays become pieces, from every rank's copy, one rank's array, or given parts."""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from typing import Any

import numpy as np

from ferro import UsageError
from ferro.arrays import dtype_named, objection

from ..mesh import DeviceMesh
from ..nn.arrays import Array, namespace_of
from ..parts import even_sizes
from .layout import Shape, local_shape
from .piece import Piece, coordinate_in, replicated
from .placement import Partial, Placement, Placements, Shard, checked_placements, listed
from .transfer import filled, redistributed


def cut_copy(array: Array, mesh: DeviceMesh, placements: Placements) -> Piece:
    """Return this rank's piece of an array of which all ranks have the same. Sends nothing."""
    coordinate_in(mesh)  # refuses ranks that are not in it
    whole = replicated(array, mesh)
    piece = redistributed(whole, placements)
    return piece.with_local(array.copy()) if piece is whole else piece


def send_out(
    array: Array | None, mesh: DeviceMesh, placements: Sequence[Placement], source: int
) -> Piece:
    """Return this rank's piece of an array that only rank `source` of the mesh's parent has.

    Axis by axis, from the ranks that have something to those along the axis: a scatter where
    the axis shards, a broadcast where it does not. For axes of 2 and 2, both sharding, from
    rank 0: first 0 gives half to 2, then 0 and 2 give halves of those to 1 and 3.

    Args:
        array: at the source, the whole; elsewhere any, which says of which kind the result is,
            NumPy's when None.
        mesh: the ranks.
        placements: not checked yet, for only the source knows how many dims there are.
        source: the rank that has it.

    Raises:
        UsageError: the source has no array, or placements do not fit; raised on every rank.
    """
    here, there = coordinate_in(mesh), mesh.coordinates_of(source)
    given = np.empty(0) if array is None else array
    if here != there:
        namespace_of(given)  # refuses what is no array before anything is sent
    whole, dtype = _told(array, mesh, source)
    wanted = checked_placements(placements, mesh.ndim, len(whole), "distribute")
    xp = namespace_of(given)
    local = given if here == there else xp.empty(0, dtype)
    for axis, placement in enumerate(wanted):
        if here[axis + 1 :] != there[axis + 1 :]:
            continue  # this rank gets its part along a later axis
        root, group = there[axis], mesh.group(axis)
        shape = local_shape(whole, mesh.shape[: axis + 1], wanted[: axis + 1], here[: axis + 1])
        has_it = here[axis] == root
        if isinstance(placement, Shard):
            dim = placement.dim
            front = (shape[dim], *shape[:dim], *shape[dim + 1 :])
            rows = xp.moveaxis(local, dim, 0) if has_it else None
            sizes = even_sizes(local.shape[dim], mesh.shape[axis]) if has_it else None
            into = xp.empty(front, dtype)
            local = xp.moveaxis(group.scatter(rows, root, sizes=sizes, out=into), 0, dim)
        elif isinstance(placement, Partial) and placement.op in ("sum", "prod"):
            local = local if has_it else filled(local, shape, placement.op)
        else:
            into = xp.empty(shape, dtype)
            local = group.broadcast(local if has_it else into, root, out=into)
    own = local.copy() if local is given else local
    return Piece(local=own, mesh=mesh, shape=whole, placements=wanted)


def _told(array: Array | None, mesh: DeviceMesh, source: int) -> tuple[Shape, np.dtype]:
    """Return the shape and dtype of the source's array, told along one axis after the other."""
    here, there = coordinate_in(mesh), mesh.coordinates_of(source)
    said: Any = _described(array) if here == there else None
    for axis in range(mesh.ndim):
        if here[axis + 1 :] == there[axis + 1 :]:
            said = mesh.group(axis).broadcast_object(said, there[axis])
    if isinstance(said, str):
        raise UsageError(
            f"distribute: rank {source} is the source and must give the array: {said}",
            op="distribute",
            peer=source,
        )
    shape, dtype = said
    return tuple(shape), dtype_named(dtype)


def _described(array: Array | None) -> list[object] | str:
    """Return an array's shape and dtype, or what is wrong with it, for all ranks to hear of."""
    if array is None:
        return "it gave None"
    try:
        namespace_of(array)
    except UsageError as error:
        return str(error)
    wrong = objection(array.dtype)
    return f"it has {wrong}" if wrong else [list(array.shape), array.dtype.name]


def checked_part(local: Array, mesh: DeviceMesh, placements: Placements, shape: Shape) -> Piece:
    """Return this rank's part as a piece of an array whose shape is known. Sends nothing.

    Raises:
        UsageError: the part has another shape than it must; on this rank only.
    """
    here = coordinate_in(mesh)
    expected = local_shape(shape, mesh.shape, placements, here)
    if local.shape != expected:
        raise UsageError(
            f"DTensor.from_local: rank {mesh.parent.rank}, at {here} of {mesh.shape}, has a part "
            f"of shape {local.shape}; of an array of shape {shape}, placed {placements}, it must "
            f"be {expected} (cut as by numpy.array_split).",
            op="from_local",
            rank=mesh.parent.rank,
        )
    return Piece(local=local, mesh=mesh, shape=shape, placements=placements)


def part_of_unknown(local: Array, mesh: DeviceMesh, placements: Sequence[Placement]) -> Piece:
    """Return this rank's part as a piece of the array that all ranks' parts make up.

    All ranks of the mesh call it, and tell each other their parts' shapes and dtypes, and the
    placements, which are not checked before: a rank that stops alone keeps the others waiting.

    Raises:
        UsageError: the parts make up no array, or placements do not fit; raised on every rank,
            naming one at fault.
    """
    parts = _everyones(
        [list(local.shape), local.dtype.name, [str(one) for one in listed(placements)]], mesh
    )
    first_shape, dtype, asked = parts[(0,) * mesh.ndim]
    for place, (found, kind, wanted) in parts.items():
        if kind != dtype or wanted != asked or len(found) != len(first_shape):
            raise _odd_one(
                mesh, place, f"{kind} with {len(found)} dims, placed {', '.join(wanted)}",
                f"{dtype} with {len(first_shape)} dims, placed {', '.join(asked)}",
            )  # fmt: skip
    checked = checked_placements(placements, mesh.ndim, local.ndim, "from_local")
    shape = _added_up([parts[place][0] for place in parts], list(parts), checked)
    for place, (found, _, _) in parts.items():
        expected = local_shape(shape, mesh.shape, checked, place)
        if tuple(found) != expected:
            raise _odd_one(
                mesh, place, f"a part of shape {tuple(found)}",
                f"an array of shape {shape} in all, so that it must be {expected} (the dims that "
                "no axis cuts are the same on all ranks, the others cut as by numpy.array_split)",
            )  # fmt: skip
    return Piece(local=local, mesh=mesh, shape=shape, placements=checked)


def _everyones(mine: list[object], mesh: DeviceMesh) -> dict[tuple[int, ...], Any]:
    """Return what every rank of the mesh says, by its coordinate."""
    said: list[Any] = [mine]
    for axis in reversed(range(mesh.ndim)):  # so that later axes run fastest
        said = list(itertools.chain.from_iterable(mesh.group(axis).all_gather_object(said)))
    places = itertools.product(*(range(size) for size in mesh.shape))
    return dict(zip(places, said, strict=True))


def _added_up(
    shapes: list[list[int]], places: list[tuple[int, ...]], placements: Placements
) -> Shape:
    """Return the global shape: sizes along the axes that cut a dim add up, others are the first."""
    total = list(shapes[0])
    for dim in range(len(total)):
        cutting = [axis for axis, one in enumerate(placements) if one == Shard(dim)]
        total[dim] = sum(
            shape[dim]
            for shape, place in zip(shapes, places, strict=True)
            if all(index == 0 for axis, index in enumerate(place) if axis not in cutting)
        )
    return tuple(total)


def _odd_one(mesh: DeviceMesh, place: tuple[int, ...], has: str, others: str) -> UsageError:
    rank = mesh.rank_of(place)
    return UsageError(
        f"DTensor.from_local: rank {rank}, at {place} of {mesh.shape}, has {has}; the ranks "
        f"together have {others}. Give parts that make up one array, the same placements on all.",
        op="from_local",
        rank=mesh.parent.rank,
        peer=rank,
    )
