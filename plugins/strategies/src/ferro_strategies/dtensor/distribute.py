"""distribute: an array that all ranks have, or one of them, as a DTensor."""

from __future__ import annotations

from collections.abc import Sequence

from ferro import UsageError

from ..mesh import DeviceMesh
from ..nn.arrays import Array, namespace_of
from .placement import Placement, checked_placements
from .spreading import cut_copy, send_out
from .tensor import DTensor


def distribute(
    array: Array | None,
    mesh: DeviceMesh,
    placements: Sequence[Placement],
    *,
    source: int | None = None,
) -> DTensor:
    """Spread an array over a mesh; the result has memory of its own.

    Args:
        array: the global array. With `source`, only that rank's counts: others give None, or an
            array of the library (CuPy) whose kind the result shall be.
        mesh: the ranks, all of which call this.
        placements: how it shall lie, one placement for each axis.
        source: rank in the mesh's parent group that sends each rank its part, and no more. None:
            every rank gives the same array and keeps its part; nothing is sent or compared.

    Raises:
        UsageError: placements do not fit the mesh or the array, or the source gives none; raised
            on every rank, and nothing but the shape was sent.
    """
    if source is None:
        if array is None:
            raise UsageError(
                "distribute: no array. Give it on every rank, or on one and say which (source=).",
                op="distribute",
            )
        namespace_of(array)
        found = checked_placements(placements, mesh.ndim, array.ndim, "distribute")
        return DTensor(cut_copy(array, mesh, found))
    return DTensor(send_out(array, mesh, placements, source))
