"""The results of collectives whose operands all ranks have shared: what each rank makes of the slots' contents.

operation                    a rank shares            its result
all_reduce, reduce           its array                all operands, reduced
broadcast                    the root its array       the root's operand
all_gather, gather           its block                all operands
scatter                      the root all blocks      its block of the root's operand
reduce_scatter               blocks for all ranks     its block of all operands, reduced
all_to_all                   blocks for all ranks     its block of all operands

The operations of blocks share `ranks * count` elements, the others `count`.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextvars import Context
from typing import TypeAlias

import numpy as np

from ferro import ReduceOp
from ferro.collectives.fast_path import EvenCollective
from ferro.collectives.reduction import Reduction
from ferro.types import Array

# Makes the result, given the parity of the call and the array for the result.
MakeResult: TypeAlias = Callable[[int, Array], None]

_OF_BLOCKS = ("scatter", "reduce_scatter", "all_to_all")
_CONTEXTS_OF_ERRORS = np.lib.NumpyVersion(np.__version__) >= "2.0.0"  # errstate is a context variable


def shared_count(op: str, count: int, world_size: int) -> int:
    """Compute how many elements a rank shares in a collective with blocks of `count` elements."""
    return count * world_size if op in _OF_BLOCKS else count


def result_maker(collective: EvenCollective, slots: Sequence[Array], rank: int, shape: tuple[int, ...]) -> MakeResult:
    """Make the function that writes this rank's result.

    Args:
        collective: its kind.
        slots: for each parity, the operands of all ranks, shape (ranks, elements that a rank shares).
        rank: this rank.
        shape: of the array for the result.
    """
    op, count, reduction = collective.op, collective.count, collective.reduction
    own = slice(rank * count, (rank + 1) * count) if op in _OF_BLOCKS else slice(None)
    if op in ("broadcast", "scatter"):
        return _copied([operands[collective.root, own].reshape(shape) for operands in slots])
    blocks = [operands[:, own] for operands in slots]
    if reduction is None:
        return _copied_side_by_side(blocks)
    if len(blocks[0]) == 2 and (ufunc := _single_ufunc(reduction)) is not None:
        first, second = ([operands[index].reshape(shape) for operands in blocks] for index in (0, 1))
        make_result = _combined(ufunc, first, second, reduction.dtype.kind in "iub")
        return _mean(make_result, reduction) if reduction.op is ReduceOp.MEAN else make_result
    return _reduced(reduction, [list(operands) for operands in blocks])


def result_copier(collective: EvenCollective, slots: Sequence[Array], rank: int, target: Array) -> MakeResult:
    """Make the function that writes this rank's result to `target`, for a collective that reduces nothing.

    It copies bytes, which takes Python a third of the time of a copy of arrays.
    """
    op, n, flat = collective.op, len(slots[0]), target.reshape(-1)
    own = slice(rank * collective.count, (rank + 1) * collective.count) if op in _OF_BLOCKS else slice(None)
    roots = (collective.root,) if op in ("broadcast", "scatter") else range(n)
    copies = [
        (as_bytes(part), [as_bytes(operands[root, own]) for operands in slots])
        for part, root in zip(np.split(flat, len(roots)), roots, strict=True)
    ]
    if len(copies) == 1:
        to, operands = copies[0]

        def copy_one(parity: int, target: Array) -> None:
            to[:] = operands[parity]

        return copy_one

    def copy_all(parity: int, target: Array) -> None:
        for to, operands in copies:
            to[:] = operands[parity]

    return copy_all


def as_bytes(array: Array) -> memoryview:
    """View a contiguous array as bytes."""
    return array.reshape(-1).view(np.uint8).data


def _single_ufunc(reduction: Reduction) -> np.ufunc | None:
    """Find the ufunc that reduces two operands as `reduction.into` does, None where one does not."""
    kind = reduction.dtype.kind
    if reduction.op is None or reduction.needs_all or (reduction.op is ReduceOp.PROD and kind == "c"):
        return None
    return reduction.ufunc if _CONTEXTS_OF_ERRORS or kind in "iub" else None


def _combined(ufunc: np.ufunc, first: list[Array], second: list[Array], integers: bool) -> MakeResult:
    def combine_integers(parity: int, target: Array) -> None:
        ufunc(first[parity], second[parity], target)

    def combine_quietly(parity: int, target: Array) -> None:
        run(ufunc, first[parity], second[parity], target)

    if integers:  # they never warn
        return combine_integers
    # A context of its own, which one thread at a time enters, as all of a group's collectives run one by one.
    run = Context().run
    run(np.seterr, all="ignore")
    return combine_quietly


def _mean(make_sum: MakeResult, reduction: Reduction) -> MakeResult:
    def make_mean(parity: int, target: Array) -> None:
        make_sum(parity, target)
        reduction.finish(target)

    return make_mean


def _reduced(reduction: Reduction, operands: list[list[Array]]) -> MakeResult:
    def reduce(parity: int, target: Array) -> None:
        reduction.into(target.reshape(-1), operands[parity], at_once=True)

    return reduce


def _copied(operands: list[Array]) -> MakeResult:
    def copy(parity: int, target: Array) -> None:
        target[...] = operands[parity]

    return copy


def _copied_side_by_side(operands: list[Array]) -> MakeResult:
    shape = operands[0].shape

    def copy(parity: int, target: Array) -> None:
        target.reshape(shape)[...] = operands[parity]

    return copy
