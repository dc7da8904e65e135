"""Multiply matrices: each rank multiplies its local arrays. Summing over a sharded dim gives a Partial.

left               right              result, on an axis of the mesh
sharded by rows    Replicate          sharded by rows
Replicate          sharded by columns sharded by columns
both sharded along the summed dim     Partial("sum")
one sharded so, the other Replicate   Partial("sum"); the other is sliced, which sends nothing
sharded along a batch dim             sharded along it
Partial("sum")     Replicate          Partial("sum"), and the other way round
rows               columns            an error: on one axis only one of them can be sharded
"""

from __future__ import annotations

import numpy as np

from ferro import UsageError

from ...nn.arrays import Array, namespace_of, wide_dtype
from ..local_shapes import Shape
from ..placed_array import PlacedArray, is_half
from .sharding_propagation import Operand, broadcast_labels, multilinear, propagate_sharding


def matmul(left: PlacedArray, right: PlacedArray) -> PlacedArray:
    """Return left @ right, with NumPy's rules for vectors and batches.

    Raises:
        UsageError: shapes or placements do not fit; nothing was sent.
    """
    shape, left_labels, right_labels = _shape_and_labels(left.shape, right.shape)
    operands = (Operand(array=left, labels=left_labels), Operand(array=right, labels=right_labels))
    dtype = np.result_type(left.dtype, right.dtype)
    sharding = propagate_sharding("matmul", operands, len(shape), multilinear, dtype)
    left_local, right_local = (array.local for array in sharding.redistribute_operands())
    if is_half(dtype):  # products of half precision are added up in float32
        left_local, right_local = (one.astype(wide_dtype(dtype), copy=False) for one in (left_local, right_local))
    product: Array = namespace_of(left_local).asarray(left_local @ right_local)  # NumPy returns 0-d results as numbers
    return left.with_local(product, shape=shape, placements=sharding.result, dtype=dtype)


def _shape_and_labels(left: Shape, right: Shape) -> tuple[Shape, tuple[int | None, ...], tuple[int | None, ...]]:
    """Return the product's shape, and the labels of both operands.

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
        (*broadcast_labels(left[:-2], batch), *row_labels, summed),
        (*broadcast_labels(right[:-2], batch), summed, *column_labels),
    )
