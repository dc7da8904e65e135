"""PlacedArray: a rank's local array, with the mesh, placements and shape of the global array.

The functions of this package compute on PlacedArrays. DTensor wraps a PlacedArray for users, and adds operators.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

from ferro import UsageError

from ..mesh import DeviceMesh
from ..nn.arrays import Array
from .local_shapes import Shape, local_shape
from .placement import Placements, all_replicated


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class PlacedArray:
    """A global array as one rank sees it.

    Attributes:
        local: this rank's part, a NumPy or CuPy array.
        mesh: the ranks that hold the parts.
        shape: shape of the global array.
        placements: one for each axis of the mesh.
    """

    local: Array
    mesh: DeviceMesh
    shape: Shape
    placements: Placements

    @property
    def coordinates(self) -> tuple[int, ...]:
        """This rank's coordinates in the mesh."""
        return coordinates_in(self.mesh)

    def local_shape(self, placements: Placements, shape: Shape | None = None) -> Shape:
        """Return this rank's local shape under other placements, and of another global shape."""
        whole = self.shape if shape is None else shape
        return local_shape(whole, self.mesh.shape, placements, self.coordinates)

    def with_local(
        self, local: Array, *, shape: Shape | None = None, placements: Placements | None = None
    ) -> PlacedArray:
        """Return another local array on the same mesh; shape and placements stay unless given."""
        return replace(
            self,
            local=local,
            shape=self.shape if shape is None else shape,
            placements=self.placements if placements is None else placements,
        )


def coordinates_in(mesh: DeviceMesh) -> tuple[int, ...]:
    """Return this rank's coordinates in a mesh.

    Raises:
        UsageError: this rank is not in the mesh.
    """
    if mesh.coordinates is None:
        raise UsageError(
            f"DTensor: rank {mesh.parent.rank} of group {mesh.parent.name!r} is not in {mesh!r}. "
            "Only ranks of the mesh may call this.",
            rank=mesh.parent.rank,
        )
    return mesh.coordinates


def same_mesh(one: DeviceMesh, other: DeviceMesh) -> bool:
    """Return True if two meshes have the same axes; the same submesh may be two objects."""
    return one is other or (
        one.names == other.names
        and one.shape == other.shape
        and all(one.group(name) is other.group(name) for name in one.names)
    )


def replicated(array: Array, mesh: DeviceMesh) -> PlacedArray:
    """Place an array that every rank of the mesh has."""
    return PlacedArray(local=array, mesh=mesh, shape=array.shape, placements=all_replicated(mesh.ndim))
