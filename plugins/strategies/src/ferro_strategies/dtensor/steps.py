"""Steps: how the placement on one axis of a mesh can change, and what that moves.

    from         to           how                each rank …
    Shard(a)     Replicate    all_gather
    Shard(a)     Shard(b)     all_to_all
    Partial      Replicate    all_reduce
    Partial      Shard(b)     reduce_scatter
    Replicate    Shard(b)     slice              keeps its part; nothing is sent
    Replicate    Partial      contribute         but the first holds zeros (for a sum), ones (prod)
    Shard(a)     Partial      contribute         puts its part among zeros (sum) or ones (prod)
    any, on an axis of one rank                  relabel: it is the same array

Where several axes shard one dim, the last of them cut the pieces of the others: only the last
may change, or a rank would have to give away its rows to ranks that are not along the axis.
"""

from __future__ import annotations

import enum
import math
from collections.abc import Iterator
from dataclasses import dataclass

from ..parts import even_sizes
from .layout import Shape, local_shape
from .placement import Partial, Placement, Placements, Replicate, Shard


class How(enum.StrEnum):
    """What carries out a step; those of the first four are collectives of the same name."""

    ALL_GATHER = "all_gather"
    ALL_TO_ALL = "all_to_all"
    ALL_REDUCE = "all_reduce"
    REDUCE_SCATTER = "reduce_scatter"
    SLICE = "slice"
    CONTRIBUTE = "contribute"
    RELABEL = "relabel"

    @property
    def is_collective(self) -> bool:
        """Say whether ranks communicate."""
        return self in _COLLECTIVES


_COLLECTIVES = (How.ALL_GATHER, How.ALL_TO_ALL, How.ALL_REDUCE, How.REDUCE_SCATTER)


@dataclass(frozen=True, slots=True, kw_only=True)
class Step:
    """A change of the placement on one axis.

    Attributes:
        axis: which axis of the mesh.
        how: what carries it out.
        before: all placements before.
        after: all placements after; they differ on `axis` only.
    """

    axis: int
    how: How
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


def steps_from(before: Placements, mesh_shape: Shape, choices: list[list[Placement]]) -> list[Step]:
    """Return every step that is possible from `before` to one of the `choices` per axis."""
    return [
        Step(axis=axis, how=how, before=before, after=after)
        for axis, placements in enumerate(choices)
        for target in placements
        if (how := _how(before[axis], target, mesh_shape[axis])) is not None
        for after in ((*before[:axis], target, *before[axis + 1 :]),)
        if _is_last(before, axis, mesh_shape)
        and _is_last(after, axis, mesh_shape)
        and len(set(_reductions(after))) < 2
    ]


def elements_moved(step: Step, shape: Shape, mesh_shape: Shape) -> int:
    """Return how many elements the busiest rank must send, or receive where that is more.

    Of all coordinates the first has the largest pieces. An all_reduce counts as a
    reduce_scatter and an all_gather of flat pieces, with which it is best done.
    """
    if not step.how.is_collective:
        return 0
    ranks = mesh_shape[step.axis]
    first = (0,) * len(mesh_shape)
    if step.how is How.ALL_REDUCE:
        held = math.prod(local_shape(shape, mesh_shape, step.before, first))
        return 2 * (held - held // ranks)
    if step.how is How.ALL_TO_ALL:
        return _exchanged(step, shape, mesh_shape)
    cut, whole = step.before, step.after
    if step.how is How.REDUCE_SCATTER:
        cut, whole = whole, cut
    last = tuple(ranks - 1 if axis == step.axis else 0 for axis in range(len(mesh_shape)))
    least = math.prod(local_shape(shape, mesh_shape, cut, last))
    return math.prod(local_shape(shape, mesh_shape, whole, first)) - least


def _exchanged(step: Step, shape: Shape, mesh_shape: Shape) -> int:
    """Return what the busiest rank sends or receives in an all_to_all between two dims."""
    source, target = step.source, step.target
    assert isinstance(source, Shard), "an all_to_all starts from shards"
    assert isinstance(target, Shard), "an all_to_all ends in shards"
    ranks, first = mesh_shape[step.axis], (0,) * len(mesh_shape)
    here = local_shape(shape, mesh_shape, step.before, first)
    there = local_shape(shape, mesh_shape, step.after, first)
    length, width = there[source.dim], here[target.dim]
    others = math.prod(size for dim, size in enumerate(here) if dim not in (source.dim, target.dim))
    rows, columns = even_sizes(length, ranks), even_sizes(width, ranks)
    busiest = 0
    # Sizes of parts change in two places only: the ranks there, and the first, stand for all.
    for rank in {0, length % ranks, width % ranks}:
        sent = rows[rank] * (width - columns[rank])
        received = columns[rank] * (length - rows[rank])
        busiest = max(busiest, sent, received)
    return busiest * others


def _how(source: Placement, target: Placement, ranks: int) -> How | None:
    """Return what changes one placement to another; None where nothing does in one step."""
    if source == target:
        return None
    if ranks == 1:
        return How.RELABEL
    match source, target:
        case Shard(), Replicate():
            return How.ALL_GATHER
        case Shard(), Shard():
            return How.ALL_TO_ALL
        case Partial(), Replicate():
            return How.ALL_REDUCE
        case Partial(), Shard():
            return How.REDUCE_SCATTER
        case Replicate(), Shard():
            return How.SLICE
        case Replicate(), Partial():
            return How.CONTRIBUTE
        case Shard(), Partial(op) if op in ("sum", "prod"):
            return How.CONTRIBUTE
    return None


def _is_last(state: Placements, axis: int, mesh_shape: Shape) -> bool:
    """Say whether no later axis cuts the dim that `axis` shards, if it does."""
    placement = state[axis]
    if not isinstance(placement, Shard) or mesh_shape[axis] == 1:
        return True
    later = zip(state[axis + 1 :], mesh_shape[axis + 1 :], strict=True)
    return not any(ranks > 1 and other == placement for other, ranks in later)


def _reductions(state: Placements) -> Iterator[str]:
    return (placement.op for placement in state if isinstance(placement, Partial))
