"""PlacedArray: a rank's local array, with the mesh, placements and shape of the global array.

The functions of this package compute on PlacedArrays. DTensor wraps a PlacedArray for users, and adds operators.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

import numpy as np

from ferro import UsageError

from ..mesh import DeviceMesh
from ..nn.arrays import Array, wide_dtype
from .local_shapes import Shape, local_shape
from .placement import Partial, Placements, all_replicated


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class PlacedArray:
    """A global array as one rank sees it.

    Attributes:
        local: this rank's part, a NumPy or CuPy array.
        mesh: the ranks that hold the parts.
        shape: shape of the global array.
        placements: one for each axis of the mesh.
        rounded_to: the half precision dtype to which a sum or product of float32 parts is rounded once it is reduced;
            None for an array of its parts' dtype.
    """

    local: Array
    mesh: DeviceMesh
    shape: Shape
    placements: Placements
    rounded_to: np.dtype | None = None

    @property
    def dtype(self) -> np.dtype:
        """Dtype of the global array."""
        return self.rounded_to or self.local.dtype

    @property
    def coordinates(self) -> tuple[int, ...]:
        """This rank's coordinates in the mesh."""
        return coordinates_in(self.mesh)

    def local_shape(self, placements: Placements, shape: Shape | None = None) -> Shape:
        """Return this rank's local shape under other placements, and of another global shape."""
        whole = self.shape if shape is None else shape
        return local_shape(whole, self.mesh.shape, placements, self.coordinates)

    def with_local(
        self,
        local: Array,
        *,
        shape: Shape | None = None,
        placements: Placements | None = None,
        dtype: np.dtype | None = None,
    ) -> PlacedArray:
        """Return another local array on the same mesh; shape and placements stay unless given.

        Args:
            local: the local array.
            shape: shape of the global array.
            placements: its placements.
            dtype: dtype of the global array, if it is not that of `local`.
        """
        result = self.with_view(local, shape=shape, placements=placements)
        own = local.dtype if dtype is None else dtype
        stored = stored_dtype(own, result.placements)
        if local.dtype != stored:
            with np.errstate(over="ignore"):  # an infinity is the value then, as in NumPy's sums
                local = local.astype(stored)
        return replace(result, local=local, rounded_to=None if stored == own else own)

    def with_view(
        self, local: Array, *, shape: Shape | None = None, placements: Placements | None = None
    ) -> PlacedArray:
        """Return a view of this array; as `with_local`, but the local array stays as it is."""
        return replace(
            self,
            local=local,
            shape=self.shape if shape is None else shape,
            placements=self.placements if placements is None else placements,
        )

    def widened(self) -> PlacedArray:
        """Return this array with a local array of the dtype in which its parts are to be added or multiplied."""
        return self.with_local(self.local, dtype=self.dtype)


def is_half(dtype: np.dtype) -> bool:
    """Return True for float16 and bfloat16."""
    return dtype.name in ("float16", "bfloat16")


def stored_dtype(dtype: np.dtype, placements: Placements) -> np.dtype:
    """Return the dtype of the local array: float32 for the terms of sums and products in half precision.

    A term, unlike the sum, may be beyond the largest float16, and each rounding of a term would add to the error.
    """
    terms = any(isinstance(one, Partial) and one.op in ("sum", "prod") for one in placements)
    return wide_dtype(dtype) if terms and is_half(dtype) else dtype


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
