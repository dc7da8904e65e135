"""distribute: an array that all ranks have, or one of them, as a DTensor."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

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
        UsageError: placements do not fit the mesh or the array; nothing but its shape was sent.
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
    if array is None and mesh.parent.rank == source:
        raise UsageError(
            f"distribute: rank {source} is the source and must give the array",
            op="distribute",
            rank=source,
        )
    given = np.empty(0) if array is None else array
    namespace_of(given)
    return DTensor(send_out(given, mesh, placements, source))
