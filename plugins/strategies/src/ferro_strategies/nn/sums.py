"""Sums of many numbers, as exact for half precision and float32 as the rounding of the result allows."""

from __future__ import annotations

import numpy as np

from .arrays import Array, namespace_of, wide_dtype

# So many float32 numbers are added one after another: their rounding errors stay near that of the result.
_BLOCK = 128

# einsum keeps several partial sums along a contiguous row, so rows of this length need no blocks yet.
_SHORT_ROW = 1024


def column_sums(rows: Array) -> Array:
    """Sum over the rows: (n, m) -> (m,), in float32 for half precision, otherwise in the dtype of `rows`.

    One float32 number to which a million are added loses a hundredth of the sum. So blocks of rows are summed first,
    and their sums in float64. (CuPy sums pairwise by itself.)
    """
    xp, wide, count = namespace_of(rows), wide_dtype(rows.dtype), rows.shape[0]
    if xp is not np or (count <= _BLOCK and rows.dtype == wide):
        total: Array = rows.sum(axis=0, dtype=wide)
        return total
    exact = np.promote_types(wide, np.float64)
    if rows.dtype == wide:
        # A product with ones is a sum at the speed of BLAS.
        whole = count - count % _BLOCK
        blocks = np.matmul(np.ones((1, _BLOCK), wide), rows[:whole].reshape(-1, _BLOCK, rows.shape[1]))
        total = blocks.sum(axis=(0, 1), dtype=exact) + rows[whole:].sum(axis=0, dtype=exact)
    else:
        total = rows.sum(axis=0, dtype=exact)
    return total.astype(wide, copy=False)


def row_sums(rows: Array) -> Array:
    """Sum over the last dimension: (..., m) -> (...), in float32 for half precision."""
    xp, wide = namespace_of(rows), wide_dtype(rows.dtype)
    # NumPy sums pairwise along contiguous memory only.
    pairwise = xp is not np or (rows.dtype == wide and rows.flags.c_contiguous)
    total: Array = rows.sum(axis=-1, dtype=wide if pairwise else np.promote_types(wide, np.float64))
    return total.astype(wide, copy=False)


def column_dots(a: Array, b: Array) -> Array:
    """Sum a * b over the rows, without making that product: two (n, m) of a wide dtype -> (m,)."""
    xp, count = namespace_of(a), a.shape[0]
    if count <= _BLOCK:
        total: Array = xp.einsum("nd,nd->d", a, b)
        return total
    whole = count - count % _BLOCK
    shape = (-1, _BLOCK, a.shape[1])
    blocks = xp.einsum("bnd,bnd->bd", a[:whole].reshape(shape), b[:whole].reshape(shape))
    exact = np.promote_types(a.dtype, np.float64)
    total = blocks.sum(axis=0, dtype=exact) + xp.einsum("nd,nd->d", a[whole:], b[whole:])
    return total.astype(a.dtype, copy=False)


def row_dots(a: Array, b: Array) -> Array:
    """Sum a * b over the last dimension, without making that product: two (n, m) of a wide dtype -> (n,)."""
    xp, size = namespace_of(a), a.shape[1]
    if size <= _SHORT_ROW:
        total: Array = xp.einsum("nd,nd->n", a, b)
        return total
    whole = size - size % _BLOCK
    shape = (a.shape[0], -1, _BLOCK)
    blocks = xp.einsum("nbd,nbd->nb", a[:, :whole].reshape(shape), b[:, :whole].reshape(shape))
    exact = np.promote_types(a.dtype, np.float64)
    total = blocks.sum(axis=1, dtype=exact) + xp.einsum("nd,nd->n", a[:, whole:], b[:, whole:])
    return total.astype(a.dtype, copy=False)


def channel_sums(a: Array) -> Array:
    """Sum over all but the channels: (N, C, L), contiguous -> (C,)."""
    return column_sums(row_sums(a))


def channel_dots(a: Array, b: Array) -> Array:
    """Sum a * b over all but the channels, without making that product: two (N, C, L), contiguous -> (C,)."""
    n, c, length = a.shape
    if length == 1:
        return column_dots(a.reshape(n, c), b.reshape(n, c))
    by_row = row_dots(a.reshape(n * c, length), b.reshape(n * c, length))
    return column_sums(by_row.reshape(n, c))
