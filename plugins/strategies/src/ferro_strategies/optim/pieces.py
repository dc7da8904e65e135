"""Pieces of parameters that are split over ranks: whole arrays from them, and sums over them.

Most optimizers update every element by itself, so each rank updates its piece. Those that look at a matrix as a whole
gather it, compute on every rank, and keep their own piece of the result.
"""

from __future__ import annotations

from collections.abc import Callable

import numpy as np

from ferro import ProcessGroup, UsageError

from ..nn.arrays import Array, namespace_of
from ..nn.parameter import Parameter, Split


def whole_shape(parameter: Parameter) -> tuple[int, ...]:
    """Find the shape of the whole array of which a parameter holds a piece.

    Raises:
        UsageError: the strategy that has split it does not say (`Split.shape`).
    """
    if not parameter.splits:
        shape: tuple[int, ...] = parameter.data.shape
        return shape
    return _shape_before(parameter.splits[0])


def gather_whole(piece: Array, splits: tuple[Split, ...]) -> tuple[Array, Callable[[Array], Array]]:
    """Gather an array of a parameter's shape from the ranks that hold pieces; they all call it.

    Returns:
        The whole array, and the function from an array of its shape to this rank's piece.
    """
    cuts: list[Callable[[Array], Array]] = []
    whole = piece
    for split in reversed(splits):
        whole, cut = _gather(whole, split)
        cuts.insert(0, cut)

    def own_piece(array: Array) -> Array:
        for cut in cuts:
            array = cut(array)
        return array.reshape(piece.shape)

    return whole, own_piece


def sum_over_pieces(value: float, splits: tuple[Split, ...]) -> float:
    """Add up a number over the ranks that hold pieces; they all call it."""
    for split in splits:
        value = float(split.group.all_reduce(np.float64(value)))
    return value


def _gather(piece: Array, split: Split) -> tuple[Array, Callable[[Array], Array]]:
    """Undo one split."""
    dim = split.dim
    rows = piece.reshape(piece.size) if dim is None else piece.swapaxes(0, dim)
    own = _own_rows(rows, split.group)
    gathered = split.group.all_gather(rows, sizes=own[1])

    def cut(array: Array) -> Array:
        flat: Array = (
            array.reshape(array.size)[own[0]] if dim is None else array.swapaxes(0, dim)[own[0]].swapaxes(0, dim)
        )
        return flat

    if dim is None:
        return gathered.reshape(_shape_before(split)), cut
    return gathered.swapaxes(0, dim), cut


def _own_rows(rows: Array, group: ProcessGroup) -> tuple[slice, list[int]]:
    """Find this rank's rows in those of all ranks, and the numbers of all ranks' rows."""
    counts: list[int] = group.all_gather(namespace_of(rows).array([rows.shape[0]])).tolist()
    start = sum(counts[: group.rank])
    return slice(start, start + rows.shape[0]), counts


def _shape_before(split: Split) -> tuple[int, ...]:
    if split.shape is None:
        raise UsageError(f"a piece over group {split.group.name!r} does not say of what shape: give Split(shape=...).")
    return split.shape
