"""Piece: what one rank holds of a global array, and where the rest is."""

from __future__ import annotations

from dataclasses import dataclass, replace

from ferro import UsageError

from ..mesh import DeviceMesh
from ..nn.arrays import Array
from .layout import Shape, local_shape
from .placement import Placements, everywhere


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class Piece:
    """One rank's part of an array that is spread over a mesh.

    Attributes:
        local: this rank's part, NumPy or CuPy.
        mesh: the ranks.
        shape: of the global array.
        placements: one for each axis of the mesh.
    """

    local: Array
    mesh: DeviceMesh
    shape: Shape
    placements: Placements

    @property
    def coordinate(self) -> tuple[int, ...]:
        """This rank's place in the mesh."""
        return coordinate_in(self.mesh)

    def local_shape(self, placements: Placements, shape: Shape | None = None) -> Shape:
        """Return the shape of this rank's part of an array so placed, of this piece's shape."""
        whole = self.shape if shape is None else shape
        return local_shape(whole, self.mesh.shape, placements, self.coordinate)

    def with_local(
        self, local: Array, *, shape: Shape | None = None, placements: Placements | None = None
    ) -> Piece:
        """Return a piece on the same mesh with another array, shape and placements."""
        return replace(
            self,
            local=local,
            shape=self.shape if shape is None else shape,
            placements=self.placements if placements is None else placements,
        )


def coordinate_in(mesh: DeviceMesh) -> tuple[int, ...]:
    """Return this rank's place in a mesh.

    Raises:
        UsageError: it is not in the mesh.
    """
    if mesh.coordinates is None:
        raise UsageError(
            f"DTensor: rank {mesh.parent.rank} of group {mesh.parent.name!r} is not in {mesh!r}. "
            "Only ranks of the mesh may call this.",
            rank=mesh.parent.rank,
        )
    return mesh.coordinates


def same_mesh(one: DeviceMesh, other: DeviceMesh) -> bool:
    """Say whether two meshes have the same axes; slicing a mesh twice gives two objects."""
    return one is other or (
        one.names == other.names
        and one.shape == other.shape
        and all(one.group(name) is other.group(name) for name in one.names)
    )


def replicated(array: Array, mesh: DeviceMesh) -> Piece:
    """Return an array of which every rank has the same."""
    return Piece(local=array, mesh=mesh, shape=array.shape, placements=everywhere(mesh.ndim))
