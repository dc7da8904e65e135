"""Placements: Replicate, Shard and Partial, which describe the parts of the ranks along a mesh axis."""

from __future__ import annotations

import operator
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TypeAlias

from ferro import UsageError

PARTIAL_OPS = ("sum", "prod", "min", "max")


@dataclass(frozen=True, slots=True)
class Replicate:
    """Every rank along the axis holds the same values."""

    def __repr__(self) -> str:
        return "Replicate()"


@dataclass(frozen=True, slots=True)
class Shard:
    """Each rank along the axis holds a contiguous run of indices of one dim, in order of rank.

    The dim is split as numpy.array_split does it: the first ranks have one index more where the
    size does not divide, and the last ranks may have none. Where several axes shard one dim, the
    first axis splits the dim, and the next axis splits each of those shards:

        7 rows on axes of 2 and 3, both Shard(0)     0 1 | 2 | 3 || 4 | 5 | 6

    Attributes:
        dim: number of the dim. A negative number counts from the end; a DTensor stores it
            counted from the front.
    """

    dim: int

    def __post_init__(self) -> None:
        try:
            object.__setattr__(self, "dim", operator.index(self.dim))
        except TypeError:
            raise UsageError(f"Shard takes the number of a dim, not {self.dim!r}", op="Shard") from None

    def __repr__(self) -> str:
        return f"Shard({self.dim})"


@dataclass(frozen=True, slots=True)
class Partial:
    """Each rank along the axis holds an array of full size; the value is the reduction of these arrays.

    Attributes:
        op: "sum", "prod", "min" or "max".
    """

    op: str = "sum"

    def __post_init__(self) -> None:
        if self.op not in PARTIAL_OPS:
            raise UsageError(
                f"Partial({self.op!r}): the reduction is one of {', '.join(PARTIAL_OPS)}. "
                "For a mean, divide by the number of ranks and use 'sum'.",
                op="Partial",
            )
        object.__setattr__(self, "op", str(self.op))

    def __repr__(self) -> str:
        return f"Partial({self.op!r})"


Placement: TypeAlias = Replicate | Shard | Partial
Placements: TypeAlias = tuple[Placement, ...]

PARTIAL_SUM = Partial("sum")


def all_replicated(mesh_ndim: int) -> Placements:
    """Return the placements of an array of which every rank has the whole."""
    return (Replicate(),) * mesh_ndim


def as_sequence(placements: Placement | Sequence[Placement]) -> Sequence[Placement]:
    """Return placements as a sequence; a single placement may be given by itself."""
    return (placements,) if isinstance(placements, Replicate | Shard | Partial) else placements


def map_shard_dims(placements: Placements, new_dim: Callable[[int], int]) -> Placements:
    """Return the placements with `new_dim` applied to the dim of each Shard."""
    return tuple(Shard(new_dim(one.dim)) if isinstance(one, Shard) else one for one in placements)


def checked_placements(placements: Sequence[Placement], mesh_ndim: int, ndim: int, op: str) -> Placements:
    """Check placements and return them, with every dim counted from the front.

    Args:
        placements: one for each axis of the mesh.
        mesh_ndim: number of axes.
        ndim: number of dims of the array.
        op: name of the call that takes the placements, for messages.

    Raises:
        UsageError: the number of placements is not the number of axes, a value is no placement,
            a dim does not exist, or two axes have different reductions (a sum of maxima is not
            a maximum of sums).
    """
    placements = as_sequence(placements)
    if len(placements) != mesh_ndim:
        raise UsageError(
            f"{op}: {len(placements)} placements for a mesh of {mesh_ndim} axes. Give one for "
            "each axis, in their order.",
            op=op,
        )
    found = tuple(_checked(placement, ndim, op) for placement in placements)
    if len({placement.op for placement in found if isinstance(placement, Partial)}) > 1:
        raise UsageError(
            f"{op}: {found} mixes reductions, whose order would matter. Reduce over one of the axes first.", op=op
        )
    return found


def _checked(placement: Placement, ndim: int, op: str) -> Placement:
    if not isinstance(placement, Replicate | Shard | Partial):
        raise UsageError(f"{op}: a placement is Shard(dim), Replicate() or Partial(op), not {placement!r}", op=op)
    if not isinstance(placement, Shard):
        return placement
    if not -ndim <= placement.dim < ndim:
        raise UsageError(
            f"{op}: {placement} of an array of {ndim} dims. Dims go from 0 to {ndim - 1}."
            if ndim
            else f"{op}: {placement} of an array without dims, which cannot be cut.",
            op=op,
        )
    return Shard(placement.dim % ndim)
