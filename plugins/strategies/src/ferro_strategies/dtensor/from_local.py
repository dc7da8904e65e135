"""Make a PlacedArray of the ranks' local parts, and check that the parts fit together."""

from __future__ import annotations

from collections.abc import Sequence

from ferro import UsageError

from ..mesh import DeviceMesh
from ..nn.arrays import Array
from .agreement import gather_by_coordinates
from .local_shapes import Shape, local_shape
from .placed_array import PlacedArray, coordinates_in
from .placement import Placement, Placements, Shard, as_sequence, checked_placements


def from_local_with_shape(local: Array, mesh: DeviceMesh, placements: Placements, shape: Shape) -> PlacedArray:
    """Make an array of known global shape from this rank's part. Sends nothing.

    Raises:
        UsageError: the part has the wrong shape. Only this rank raises it.
    """
    here = coordinates_in(mesh)
    expected = local_shape(shape, mesh.shape, placements, here)
    if local.shape != expected:
        raise UsageError(
            f"DTensor.from_local: rank {mesh.parent.rank}, at {here} of {mesh.shape}, has a part "
            f"of shape {local.shape}; of an array of shape {shape}, placed {placements}, it must "
            f"be {expected} (cut as by numpy.array_split).",
            op="from_local",
            rank=mesh.parent.rank,
        )
    return PlacedArray(local=local, mesh=mesh, shape=shape, placements=placements)


def from_local_parts(local: Array, mesh: DeviceMesh, placements: Sequence[Placement]) -> PlacedArray:
    """Make an array from the parts of all ranks; the global shape follows from theirs.

    All ranks of the mesh call it and exchange shapes, dtypes and placements. The placements are
    checked after that, because a rank that raised alone would keep the others waiting.

    Raises:
        UsageError: the parts make up no array, or placements do not fit. Every rank raises it,
            and it names one rank at fault.
    """
    names = [str(placement) for placement in as_sequence(placements)]
    dtype = local.dtype.name if local.dtype.isnative else f"{local.dtype.name} of foreign byte order"
    parts = gather_by_coordinates([list(local.shape), dtype, names], mesh)
    first_shape, first_dtype, first_names = parts[(0,) * mesh.ndim]
    for at, (shape, dtype, names) in parts.items():
        if dtype != first_dtype or names != first_names or len(shape) != len(first_shape):
            raise _mismatch(
                mesh, at, f"{dtype} with {len(shape)} dims, placed {', '.join(names)}",
                f"{first_dtype} with {len(first_shape)} dims, placed {', '.join(first_names)}",
            )  # fmt: skip
    checked = checked_placements(placements, mesh.ndim, local.ndim, "from_local")
    whole = _global_shape([parts[at][0] for at in parts], list(parts), checked)
    for at, (shape, _, _) in parts.items():
        expected = local_shape(whole, mesh.shape, checked, at)
        if tuple(shape) != expected:
            raise _mismatch(
                mesh, at, f"a part of shape {tuple(shape)}",
                f"an array of shape {whole} in all, so that it must be {expected} (the dims that "
                "no axis cuts are the same on all ranks, the others cut as by numpy.array_split)",
            )  # fmt: skip
    return PlacedArray(local=local, mesh=mesh, shape=whole, placements=checked)


def _global_shape(shapes: list[list[int]], coordinates: list[tuple[int, ...]], placements: Placements) -> Shape:
    """Return the global shape: a sharded dim's sizes add up along the axes that shard it."""
    whole = list(shapes[0])
    for dim in range(len(whole)):
        sharding = [axis for axis, one in enumerate(placements) if one == Shard(dim)]
        whole[dim] = sum(
            shape[dim]
            for shape, at in zip(shapes, coordinates, strict=True)
            if all(index == 0 for axis, index in enumerate(at) if axis not in sharding)
        )
    return tuple(whole)


def _mismatch(mesh: DeviceMesh, at: tuple[int, ...], has: str, others: str) -> UsageError:
    rank = mesh.rank_of(at)
    return UsageError(
        f"DTensor.from_local: rank {rank}, at {at} of {mesh.shape}, has {has}; the ranks "
        f"together have {others}. Give parts that make up one array, the same placements on all.",
        op="from_local",
        rank=mesh.parent.rank,
        peer=rank,
    )
