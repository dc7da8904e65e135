"""The place of a rank's part in the global array, for a checkpoint."""

from __future__ import annotations

from ferro import UsageError

from ..nn.checkpoint_piece import CheckpointPiece
from .local_shapes import local_slices
from .placed_array import PlacedArray
from .placement import Partial


def checkpoint_piece(placed: PlacedArray) -> CheckpointPiece:
    """Describe this rank's part as a box of the global array.

    Shards are contiguous, also where several axes shard one dim, because each axis splits the shards of the axes before
    it. So a part is always one box.

    Raises:
        UsageError: the array is a Partial; or this rank is not in the mesh.
    """
    mesh = placed.mesh
    if any(isinstance(placement, Partial) for placement in placed.placements):
        raise UsageError(
            f"checkpoint_arrays: a DTensor of shape {placed.shape} with placements {placed.placements} is not "
            "reduced yet, so no rank has its values. Save what redistribute() makes of it, with Replicate() or "
            "Shard(dim) in the place of each Partial.",
            op="checkpoint_arrays",
        )
    rows = local_slices(placed.shape, mesh.shape, placed.placements, placed.coordinates)
    return CheckpointPiece(
        shape=placed.shape,
        data=placed.local,
        start=tuple(one.start for one in rows),
        extent=tuple(one.stop - one.start for one in rows),
        on_all_ranks=mesh.size == mesh.parent.world_size,
    )
