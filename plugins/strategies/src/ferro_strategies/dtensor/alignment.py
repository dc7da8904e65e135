"""Alignment: where operands must lie for an operation to work on each rank's parts alone.

Every dim of an operand has a label, the dim of the result that it becomes, or one beyond them
when it is summed over; dims of one label are cut alike. Rules, for each axis of the mesh:

    operands on the axis                                   each is taken as      result
    all Replicate                                          as it is              Replicate
    Shard of label a; Replicate                            cut by a, if it has a Shard of a
    … where a is summed over                               cut by a              Partial("sum")
    Shard of label a; Shard of another label               an error that says so
    Partial("sum"), the operation is linear in it          as it is              Partial("sum")
    Partial, otherwise; Shard of label a                   reduced to shards     as without Partial
    Partial, otherwise                                     reduced, replicated   as without Partial

Cutting what is replicated sends nothing. A Partial that is reduced is the only communication.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TypeAlias

from ferro import UsageError

from .piece import Piece, same_mesh
from .placement import SUM, Placement, Placements, Replicate, Shard
from .planner import plan
from .transfer import redistributed

# Says of operands' placements on one axis whether the result is the sum of the ranks' results.
Linear: TypeAlias = Callable[[Sequence[Placement]], bool]


@dataclass(frozen=True, slots=True, kw_only=True)
class Operand:
    """What takes part in an operation.

    Attributes:
        piece: the array.
        labels: of its dims; None for one that is not cut with others (it is stretched, or joined).
    """

    piece: Piece
    labels: tuple[int | None, ...]


def never(on_axis: Sequence[Placement]) -> bool:
    """An operation that is not linear."""
    return False


def together(on_axis: Sequence[Placement]) -> bool:
    """One like addition: linear in all its operands together."""
    return all(placement == SUM for placement in on_axis)


def one_factor(on_axis: Sequence[Placement]) -> bool:
    """One like multiplication: linear in each operand while the others are fixed."""
    rest = [placement for placement in on_axis if placement != SUM]
    return len(rest) == len(on_axis) - 1 and all(other == Replicate() for other in rest)


def numerator(on_axis: Sequence[Placement]) -> bool:
    """One like division: linear in the first operand."""
    return on_axis[0] == SUM and one_factor(on_axis)


@dataclass(frozen=True, slots=True)
class Alignment:
    """Where operands are to lie, and where the result then lies."""

    op: str
    operands: tuple[Operand, ...]
    targets: tuple[Placements, ...]
    result: Placements

    def pieces(self) -> list[Piece]:
        """Return the operands where they are to lie; reduces Partials, cuts what is replicated."""
        return [
            redistributed(operand.piece, target, copy=False)
            for operand, target in zip(self.operands, self.targets, strict=True)
        ]


def align(
    op: str, operands: Sequence[Operand], result_ndim: int, linear: Linear = never
) -> Alignment:
    """Find where operands are to lie. Communicates nothing.

    Args:
        op: the operation's name, for messages.
        operands: all on one mesh.
        result_ndim: labels from 0 to below it are the result's dims, others are summed over.
        linear: see the table.

    Raises:
        UsageError: they are cut in ways that do not fit, on different meshes, or would have to
            be moved; raised on every rank, for it follows from what all know.
    """
    mesh = operands[0].piece.mesh
    if not all(same_mesh(mesh, operand.piece.mesh) for operand in operands):
        raise UsageError(
            f"{op}: the operands are on different meshes. Move one with full_tensor() and "
            "distribute().",
            op=op,
        )
    if any(_is_delicate_sum(operand.piece) for operand in operands):
        linear = never
    columns = [
        _align_axis(op, mesh.names[axis], operands, axis, result_ndim, linear)
        for axis in range(mesh.ndim)
    ]
    targets = tuple(
        tuple(targets[index] for targets, _ in columns) for index in range(len(operands))
    )
    found = Alignment(op, tuple(operands), targets, tuple(result for _, result in columns))
    for index, (operand, target) in enumerate(zip(operands, targets, strict=True)):
        _check_still(op, index, operand.piece, target)
    return found


def _align_axis(
    op: str, axis_name: str, operands: Sequence[Operand], axis: int, ndim: int, linear: Linear
) -> tuple[list[Placement], Placement]:
    """Return what each operand shall be on an axis, and what the result then is."""
    on_axis = [operand.piece.placements[axis] for operand in operands]
    if SUM in on_axis and linear(on_axis):
        return on_axis, SUM
    label = _cut_label(op, axis_name, operands, on_axis)
    if label is None:
        return [Replicate()] * len(operands), Replicate()
    targets: list[Placement] = [
        Shard(operand.labels.index(label)) if label in operand.labels else Replicate()
        for operand in operands
    ]
    return targets, Shard(label) if label < ndim else SUM


def _cut_label(
    op: str, axis_name: str, operands: Sequence[Operand], on_axis: Sequence[Placement]
) -> int | None:
    """Return the label by which an axis cuts the operands; None where it cuts none."""
    found: dict[int, int] = {}  # label -> operand
    for index, (operand, placement) in enumerate(zip(operands, on_axis, strict=True)):
        if not isinstance(placement, Shard):
            continue
        label = operand.labels[placement.dim]
        if label is None:
            raise UsageError(
                f"{op}: operand {index}, of shape {operand.piece.shape}, is {placement} on mesh "
                f"axis {axis_name!r}, along a dim that must be whole here (it is stretched or "
                "joined). Redistribute it first, for instance to Replicate() on that axis.",
                op=op,
            )
        found.setdefault(label, index)
    if len(found) > 1:
        first, second = list(found.values())[:2]
        raise UsageError(
            f"{op}: on mesh axis {axis_name!r}, operand {first} of shape "
            f"{operands[first].piece.shape} is {on_axis[first]} and operand {second} of shape "
            f"{operands[second].piece.shape} is {on_axis[second]}, which cut different dims of "
            "the result. Redistribute one of them first.",
            op=op,
        )
    return next(iter(found), None)


def _check_still(op: str, index: int, piece: Piece, target: Placements) -> None:
    """Refuse what takes more than reducing Partials and cutting what is replicated.

    A dim that a later axis cuts already can be cut by an earlier one only by moving its parts.
    """
    source, ranks = piece.placements, piece.mesh.shape
    for axis, (now, then) in enumerate(zip(source, target, strict=True)):
        if now == then or ranks[axis] == 1:
            continue
        late = any(
            other == then and isinstance(then, Shard) and ranks[later] > 1
            for later, other in enumerate(source)
            if later > axis
        )
        if late or isinstance(now, Shard):
            way = plan(source, target, piece.shape, ranks)
            raise UsageError(
                f"{op}: operand {index} is {source} and would have to be {target}, which moves "
                f"{way.cost(piece.local.dtype.itemsize):,} bytes per rank. Ask for it with "
                "redistribute(), or place the other operand otherwise.",
                op=op,
            )


def _is_delicate_sum(piece: Piece) -> bool:
    """Say whether arithmetic on the parts of a sum may not be arithmetic on the sum.

    Booleans add up to "or", and unsigned parts wrap around where their sum does not.
    """
    return piece.local.dtype.kind in "bu" and SUM in piece.placements
