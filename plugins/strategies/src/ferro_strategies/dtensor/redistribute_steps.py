"""The steps of a redistribution, and the number of elements that each step moves.

A step changes the placement on one axis of the mesh:

    from         to           kind               each rank …
    Shard(a)     Replicate    all_gather
    Shard(a)     Shard(b)     all_to_all
    Partial      Replicate    all_reduce
    Partial      Shard(b)     reduce_scatter
    Replicate    Shard(b)     slice              keeps its part; nothing is sent
    Replicate    Partial      contribute         but the first holds zeros (for a sum), ones (prod)
    Shard(a)     Partial      contribute         puts its part among zeros (sum) or ones (prod)
    any          any          relabel            on an axis of one rank the array stays the same

Where several axes shard one dim, the later axes split the shards of the earlier ones. Only the last
of these axes may change: otherwise a rank would have to send rows to ranks outside the axis.
"""

from __future__ import annotations

import enum
import math
from collections.abc import Iterator
from dataclasses import dataclass

from ferro.collectives.partition import even_sizes

from .local_shapes import Shape, local_shape
from .placement import Partial, Placement, Placements, Replicate, Shard


class StepKind(enum.StrEnum):
    """The kinds of steps; the first four are the collectives of the same names."""

    ALL_GATHER = "all_gather"
    ALL_TO_ALL = "all_to_all"
    ALL_REDUCE = "all_reduce"
    REDUCE_SCATTER = "reduce_scatter"
    SLICE = "slice"
    CONTRIBUTE = "contribute"
    RELABEL = "relabel"

    @property
    def is_collective(self) -> bool:
        """True if ranks communicate."""
        return self not in (StepKind.SLICE, StepKind.CONTRIBUTE, StepKind.RELABEL)


@dataclass(frozen=True, slots=True, kw_only=True)
class RedistributeStep:
    """A change of the placement on one axis.

    Attributes:
        axis: number of the mesh axis.
        kind: the collective or local operation that makes the change.
        before: all placements before.
        after: all placements after; they differ on `axis` only.
    """

    axis: int
    kind: StepKind
    before: Placements
    after: Placements

    @property
    def source(self) -> Placement:
        """The placement on the axis before."""
        return self.before[self.axis]

    @property
    def target(self) -> Placement:
        """The placement on the axis after."""
        return self.after[self.axis]


def steps_from(before: Placements, mesh_shape: Shape, choices: list[list[Placement]]) -> list[RedistributeStep]:
    """Return every possible step from `before` to one of each axis's `choices`."""
    return [
        RedistributeStep(axis=axis, kind=kind, before=before, after=after)
        for axis, placements in enumerate(choices)
        for target in placements
        if (kind := _step_kind(before[axis], target, mesh_shape[axis])) is not None
        for after in ((*before[:axis], target, *before[axis + 1 :]),)
        if _is_last_of_its_dim(before, axis, mesh_shape)
        and _is_last_of_its_dim(after, axis, mesh_shape)
        and len(set(_partial_ops(after))) < 2
    ]


def elements_moved(step: RedistributeStep, shape: Shape, mesh_shape: Shape) -> int:
    """Return the number of elements that the busiest rank sends, or receives if that is more.

    The rank at coordinates 0 has the largest shards. An all_reduce counts as a reduce_scatter and
    an all_gather of flat chunks, which is the best algorithm for it.
    """
    if not step.kind.is_collective:
        return 0
    ranks = mesh_shape[step.axis]
    first = (0,) * len(mesh_shape)
    if step.kind is StepKind.ALL_REDUCE:
        size = math.prod(local_shape(shape, mesh_shape, step.before, first))
        return 2 * (size - size // ranks)
    if step.kind is StepKind.ALL_TO_ALL:
        return _elements_exchanged(step, shape, mesh_shape)
    sharded, whole = step.before, step.after
    if step.kind is StepKind.REDUCE_SCATTER:
        sharded, whole = whole, sharded
    last = tuple(ranks - 1 if axis == step.axis else 0 for axis in range(len(mesh_shape)))
    least = math.prod(local_shape(shape, mesh_shape, sharded, last))
    return math.prod(local_shape(shape, mesh_shape, whole, first)) - least


def _elements_exchanged(step: RedistributeStep, shape: Shape, mesh_shape: Shape) -> int:
    """Return the number of elements that the busiest rank exchanges in an all_to_all."""
    source, target = step.source, step.target
    assert isinstance(source, Shard), "an all_to_all starts from shards"
    assert isinstance(target, Shard), "an all_to_all ends in shards"
    ranks, first = mesh_shape[step.axis], (0,) * len(mesh_shape)
    before = local_shape(shape, mesh_shape, step.before, first)
    after = local_shape(shape, mesh_shape, step.after, first)
    length, width = after[source.dim], before[target.dim]
    others = math.prod(size for dim, size in enumerate(before) if dim not in (source.dim, target.dim))
    rows, columns = even_sizes(length, ranks), even_sizes(width, ranks)
    busiest = 0
    # Shard sizes have at most two jumps along the ranks. The first rank and the ranks of the jumps cover all cases.
    for rank in {0, length % ranks, width % ranks}:
        sent = rows[rank] * (width - columns[rank])
        received = columns[rank] * (length - rows[rank])
        busiest = max(busiest, sent, received)
    return busiest * others


def _step_kind(source: Placement, target: Placement, ranks: int) -> StepKind | None:
    """Return the kind of the step between two placements; None where no single step does it."""
    if source == target:
        return None
    if ranks == 1:
        return StepKind.RELABEL
    match source, target:
        case Shard(), Replicate():
            return StepKind.ALL_GATHER
        case Shard(), Shard():
            return StepKind.ALL_TO_ALL
        case Partial(), Replicate():
            return StepKind.ALL_REDUCE
        case Partial(), Shard():
            return StepKind.REDUCE_SCATTER
        case Replicate(), Shard():
            return StepKind.SLICE
        case Replicate(), Partial():
            return StepKind.CONTRIBUTE
        case Shard(), Partial(op) if op in ("sum", "prod"):
            return StepKind.CONTRIBUTE
    return None


def _is_last_of_its_dim(placements: Placements, axis: int, mesh_shape: Shape) -> bool:
    """Return True if no later axis shards the same dim as `axis`, or if `axis` shards none."""
    placement = placements[axis]
    if not isinstance(placement, Shard) or mesh_shape[axis] == 1:
        return True
    later = zip(placements[axis + 1 :], mesh_shape[axis + 1 :], strict=True)
    return not any(ranks > 1 and other == placement for other, ranks in later)


def _partial_ops(placements: Placements) -> Iterator[str]:
    return (placement.op for placement in placements if isinstance(placement, Partial))
