"""share_out: give every rank its piece of the first rank's values, with one unit's memory more."""

from __future__ import annotations

from collections.abc import Sequence

from ..nn.arrays import Array, namespace_of
from ..nn.parameter import Parameter
from .layout import Layout
from .memory import put
from .plan import Plan


def share_out(members: Sequence[Parameter], layout: Layout, shard: Array, plan: Plan) -> None:
    """Fill `shard` on all ranks, which call it together.

    Args:
        members: whole parameters; their values count on the plan's first rank only.
        layout: where they lie.
        shard: (layout.shard_size,), of any device.
        plan: see there.
    """
    xp = namespace_of(members[0].data)
    # Of a mesh, the first row shares out; the others get from it what their column has.
    in_first_row = plan.shards is None or plan.replicas is None or plan.replicas.rank == 0
    flat = None
    if plan.rank == 0 and in_first_row:
        flat = plan.pool.take(xp, layout.size, shard.dtype)
        flat.array[layout.used :] = 0
        for place, parameter in zip(layout.places, members, strict=True):
            flat.array[place.start : place.stop] = parameter.data.reshape(-1)
    landed: Array = shard if namespace_of(shard) is xp else xp.empty(shard.shape, shard.dtype)
    if plan.shards is None:
        assert flat is not None
        landed[...] = flat.array
    elif in_first_row:
        plan.shards.scatter(None if flat is None else flat.array, out=landed)
    if plan.replicas is not None:
        plan.replicas.broadcast(landed, out=landed)
    if landed is not shard:
        put(shard, landed)
