"""Matrix products: which parts each rank multiplies, and when the result is a sum over ranks.

left            right           result, on an axis of the mesh
cut by rows     Replicate       cut by rows
Replicate       cut by columns  cut by columns
cut along the summed dim, both  Partial("sum")
… one, the other Replicate      Partial("sum"); the other is cut, which sends nothing
cut along a batch dim           cut along it
Partial("sum")  Replicate       Partial("sum"), and the other way round
rows            columns         an error: on one axis only one of them can be
"""

from __future__ import annotations

import numpy as np

from ferro import UsageError

from ..nn.arrays import Array, namespace_of
from .alignment import Operand, align, one_factor
from .layout import Shape
from .piece import Piece


def matmul(left: Piece, right: Piece) -> Piece:
    """Return left @ right, with NumPy's rules for vectors and batches.

    Raises:
        UsageError: shapes or placements do not fit; nothing was sent.
    """
    shape, left_labels, right_labels = _labelled(left.shape, right.shape)
    operands = (
        Operand(piece=left, labels=left_labels),
        Operand(piece=right, labels=right_labels),
    )
    alignment = align("matmul", operands, len(shape), one_factor)
    one, other = (piece.local for piece in alignment.pieces())
    product: Array = namespace_of(one).asarray(one @ other)  # NumPy makes 0-d ones numbers
    return left.with_local(product, shape=shape, placements=alignment.result)


def _labelled(
    left: Shape, right: Shape
) -> tuple[Shape, tuple[int | None, ...], tuple[int | None, ...]]:
    """Return the product's shape, and for each dim of both operands what it becomes.

    The summed dim has the label that follows the product's last dim.
    """
    if not left or not right:
        raise UsageError(f"matmul: shapes {left} and {right}: a number has no rows", op="matmul")
    summed_right = right[0] if len(right) == 1 else right[-2]
    try:
        batch = np.broadcast_shapes(left[:-2], right[:-2])
    except ValueError:
        batch = None
    if batch is None or left[-1] != summed_right:
        raise UsageError(f"matmul: shapes {left} and {right} do not fit together", op="matmul")
    rows, columns = left[-2:-1], right[-1:] if len(right) > 1 else ()
    shape = (*batch, *rows, *columns)
    summed = len(shape)
    row_labels = tuple(range(len(batch), len(batch) + len(rows)))
    column_labels = tuple(range(summed - len(columns), summed))
    return (
        shape,
        (*_batch_labels(left[:-2], batch), *row_labels, summed),
        (*_batch_labels(right[:-2], batch), summed, *column_labels),
    )


def _batch_labels(own: Shape, batch: Shape) -> tuple[int | None, ...]:
    missing = len(batch) - len(own)
    return tuple(
        missing + dim if size == batch[missing + dim] else None for dim, size in enumerate(own)
    )
