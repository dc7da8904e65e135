"""Sharding propagation: find the placements that an operation needs, and those of its result.

With these placements each rank computes its part of the result from its parts of the operands.

Every dim of an operand has a label, as in einsum: the number of the dim of the result that it
becomes, or a higher number if the operation sums over it. Dims of one label are sharded alike.
Rules, for each axis of the mesh:

    operands on the axis                                   each is taken as      result
    all Replicate                                          as it is              Replicate
    Shard of label a; Replicate                            sharded by a, if      Shard of a
                                                           it has the label
    … where a is summed over                               sharded by a          Partial("sum")
    Shard of label a; Shard of another label               an error that says so
    Partial("sum"), the operation is linear in it, and     as it is              Partial("sum")
    exact on the parts (see `keeps_sum`)
    Partial, otherwise; Shard of label a                   reduced to shards     as without Partial
    Partial, otherwise                                     reduced, replicated   as without Partial

Sharding a replicated operand sends nothing. The only communication is the reduction of a Partial.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import TypeAlias

import numpy as np

from ferro import UsageError

from ...nn.arrays import namespace_of
from ..local_shapes import Shape
from ..placed_array import PlacedArray, is_half, same_mesh
from ..placement import PARTIAL_SUM, Placement, Placements, Replicate, Shard
from ..redistribute import redistribute
from ..redistribute_plan import plan_redistribute

# Takes the operands' placements on one axis; returns True if the sum of the ranks' results is the result.
Linearity: TypeAlias = Callable[[Sequence[Placement]], bool]


@dataclass(frozen=True, slots=True, kw_only=True)
class Operand:
    """An operand, with a label for each dim.

    Attributes:
        array: the array.
        labels: one for each dim; None for a dim that must not be sharded, because the operation
            stretches it or joins arrays along it.
    """

    array: PlacedArray
    labels: tuple[int | None, ...]


def not_linear(on_axis: Sequence[Placement]) -> bool:
    """Return False: the operation is not linear."""
    return False


def jointly_linear(on_axis: Sequence[Placement]) -> bool:
    """Return True if a sum, which is linear in all operands together, may be computed per rank."""
    return all(placement == PARTIAL_SUM for placement in on_axis)


def multilinear(on_axis: Sequence[Placement]) -> bool:
    """Return True if a product, which is linear in each operand, may be computed per rank."""
    rest = [placement for placement in on_axis if placement != PARTIAL_SUM]
    return len(rest) == len(on_axis) - 1 and all(other == Replicate() for other in rest)


def linear_in_first(on_axis: Sequence[Placement]) -> bool:
    """Return True if a quotient, which is linear in the first operand, may be computed per rank."""
    return on_axis[0] == PARTIAL_SUM and multilinear(on_axis)


def keeps_sum(dtype: np.dtype, result: np.dtype) -> bool:
    """Return True if an operation on the parts of a sum, with results of another dtype, may be added up afterwards.

    Integer parts may overflow where their sum does not, which does no harm as long as no wider dtype sees it; floating
    ones may be converted to a wider dtype, but not rounded to integers. Boolean parts add up to "or". A sum in half
    precision is rounded before it becomes anything wider.
    """
    if dtype.kind in "iu" or is_half(dtype):
        return dtype == result
    return dtype.kind in "fc" and np.can_cast(dtype, result, "safe")


@dataclass(frozen=True, slots=True)
class OpSharding:
    """The placements that an operation needs, and those of its result.

    Attributes:
        operands: the operands, with their present placements.
        targets: for each operand, the placements that it must have.
        result: placements of the result.
        sum_dtype: the dtype of the result if it is a Partial sum of Partial operands, which its parts need not have.
    """

    operands: tuple[Operand, ...]
    targets: tuple[Placements, ...]
    result: Placements
    sum_dtype: np.dtype | None = None

    def redistribute_operands(self) -> list[PlacedArray]:
        """Redistribute the operands to `targets`: reduce Partials, and slice replicated operands."""
        return [
            redistribute(operand.array, target, copy=False).widened()
            for operand, target in zip(self.operands, self.targets, strict=True)
        ]


def propagate_sharding(
    op: str,
    operands: Sequence[Operand],
    result_ndim: int,
    linear: Linearity = not_linear,
    result_dtype: np.dtype | None = None,
) -> OpSharding:
    """Find the placements of operands and result. Communicates nothing.

    Args:
        op: the operation's name, for messages.
        operands: arrays on one mesh.
        result_ndim: number of dims of the result; higher labels are summed over.
        linear: the operation's linearity.
        result_dtype: the result's dtype, needed if an operand is a Partial sum and the operation is linear.

    Raises:
        UsageError: the operands are sharded in ways that do not fit, are on different meshes, or would have to be
            moved. Every rank raises it, because all ranks know the same placements.
    """
    mesh = operands[0].array.mesh
    if not all(same_mesh(mesh, operand.array.mesh) for operand in operands):
        raise UsageError(
            f"{op}: the operands are on different meshes. Move one with full_tensor() and distribute().", op=op
        )
    if linear is not not_linear and has_partial_sum(operand.array for operand in operands):
        assert result_dtype is not None, "a linear operation on a Partial needs the dtype of its result"
        if not _exact_per_rank(operands, linear, result_dtype):
            linear = not_linear
    columns = [
        _propagate_on_axis(op, mesh.names[axis], operands, axis, result_ndim, linear) for axis in range(mesh.ndim)
    ]
    targets = tuple(tuple(targets[index] for targets, _ in columns) for index in range(len(operands)))
    for index, (operand, target) in enumerate(zip(operands, targets, strict=True)):
        _check_not_moved(op, index, operand.array, target)
    return OpSharding(tuple(operands), targets, tuple(result for _, result in columns), result_dtype)


def whole_operand(array: PlacedArray) -> Operand:
    """Return an operand of the result's shape."""
    return Operand(array=array, labels=tuple(range(len(array.shape))))


def broadcast_labels(shape: Shape, result: Shape) -> tuple[int | None, ...]:
    """Return the labels of an operand of `shape` that is broadcast to the shape `result`."""
    missing = len(result) - len(shape)
    return tuple(missing + dim if size == result[missing + dim] else None for dim, size in enumerate(shape))


def _propagate_on_axis(
    op: str, axis_name: str, operands: Sequence[Operand], axis: int, ndim: int, linear: Linearity
) -> tuple[list[Placement], Placement]:
    """Return the placement on one axis that each operand must have, and that of the result."""
    on_axis = [operand.array.placements[axis] for operand in operands]
    if PARTIAL_SUM in on_axis and linear(on_axis):
        return on_axis, PARTIAL_SUM
    label = _sharded_label(op, axis_name, operands, on_axis)
    if label is None:
        return [Replicate()] * len(operands), Replicate()
    targets: list[Placement] = [
        Shard(operand.labels.index(label)) if label in operand.labels else Replicate() for operand in operands
    ]
    return targets, Shard(label) if label < ndim else PARTIAL_SUM


def _sharded_label(op: str, axis_name: str, operands: Sequence[Operand], on_axis: Sequence[Placement]) -> int | None:
    """Return the label that is sharded on an axis; None if no operand is sharded on it."""
    operand_of_label: dict[int, int] = {}
    for index, (operand, placement) in enumerate(zip(operands, on_axis, strict=True)):
        if not isinstance(placement, Shard):
            continue
        label = operand.labels[placement.dim]
        if label is None:
            raise UsageError(
                f"{op}: operand {index}, of shape {operand.array.shape}, is {placement} on mesh "
                f"axis {axis_name!r}, along a dim that must be whole here (it is stretched or joined, or "
                "worked along). Redistribute it first, for instance to Replicate() on that axis.",
                op=op,
            )
        operand_of_label.setdefault(label, index)
    if len(operand_of_label) > 1:
        first, second = list(operand_of_label.values())[:2]
        raise UsageError(
            f"{op}: on mesh axis {axis_name!r}, operand {first} of shape "
            f"{operands[first].array.shape} is {on_axis[first]} and operand {second} of shape "
            f"{operands[second].array.shape} is {on_axis[second]}, which cut different dims of "
            "the result. Redistribute one of them first.",
            op=op,
        )
    return next(iter(operand_of_label), None)


def _check_not_moved(op: str, index: int, array: PlacedArray, target: Placements) -> None:
    """Refuse an operand that could get its target only by moving parts between ranks.

    If a later axis shards a dim already, an earlier axis can shard it only by moving the parts.
    """
    source, ranks = array.placements, array.mesh.shape
    for axis, (now, then) in enumerate(zip(source, target, strict=True)):
        if now == then or ranks[axis] == 1:
            continue
        sharded_by_later_axis = any(
            other == then and isinstance(then, Shard) and ranks[later] > 1
            for later, other in enumerate(source)
            if later > axis
        )
        if sharded_by_later_axis or isinstance(now, Shard):
            plan = plan_redistribute(source, target, array.shape, ranks)
            raise UsageError(
                f"{op}: operand {index} is {source} and would have to be {target}, which moves "
                f"{plan.cost(array.local.dtype.itemsize):,} bytes per rank. Ask for it with "
                "redistribute(), or place the other operand otherwise.",
                op=op,
            )


def has_partial_sum(arrays: Iterable[PlacedArray]) -> bool:
    """Return True if one of the arrays is a sum that is not reduced yet."""
    return any(PARTIAL_SUM in array.placements for array in arrays)


def _exact_per_rank(operands: Sequence[Operand], linear: Linearity, result_dtype: np.dtype) -> bool:
    """Return True if arithmetic on the parts of sums is arithmetic on the sums.

    Factors must be finite and divisors not zero: 2 * inf + -1 * inf is not (2 - 1) * inf. All ranks must find the same
    answer, so only factors that all ranks have are looked at, and others do not count as finite.
    """
    sums = [operand.array for operand in operands if PARTIAL_SUM in operand.array.placements]
    if not all(keeps_sum(array.dtype, result_dtype) for array in sums):
        return False
    if linear is jointly_linear:
        return True
    factors = [operand.array for operand in operands if PARTIAL_SUM not in operand.array.placements]
    replicated = all(one == Replicate() for array in factors for one in array.placements)
    return len(sums) == 1 and replicated and all(_usable(array, linear) for array in factors)


def _usable(factor: PlacedArray, linear: Linearity) -> bool:
    xp = namespace_of(factor.local)
    finite = factor.dtype.kind in "biu" or bool(xp.isfinite(factor.local).all())
    return finite and (linear is multilinear or bool((factor.local != 0).all()))
