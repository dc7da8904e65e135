"""Rotary positions: turn queries and keys by angles that grow with the position."""

from __future__ import annotations

import numpy as np

from .arrays import Array, namespace_of, wide_dtype


def rotate(x: Array, num_heads: int, *, base: float, first: int = 0, backwards: bool = False) -> Array:
    """Turn each pair of columns of each head by position * base**(-2 * i / size): scores see distances alone.

    Pair i of a head of `size` columns is columns i and i + size / 2, as in GPT-NeoX and LLaMA; a checkpoint of a model
    that pairs neighbouring columns needs its columns in another order.

    Args:
        x: (B, T, columns), heads side by side, each of an even number of columns.
        num_heads: number of heads.
        base: the slowest pair turns once in about 2 * pi * base positions.
        first: position of the first row.
        backwards: turn back; this is the gradient's function.

    Returns:
        An array like `x`, float32 for half precision.

    Source: Su et al., "RoFormer: Enhanced Transformer with Rotary Position Embedding", 2021, section 3.2.
    """
    xp, wide = namespace_of(x), wide_dtype(x.dtype)
    batch, length, columns = x.shape
    half = columns // num_heads // 2
    rates = base ** (-xp.arange(half, dtype=np.float64) / half)
    angles = xp.arange(first, first + length, dtype=np.float64)[:, None] * (-rates if backwards else rates)
    # (T, 1, half), for all heads alike
    cos, sin = xp.cos(angles).astype(wide)[:, None], xp.sin(angles).astype(wide)[:, None]
    pairs = x.reshape(batch, length, num_heads, 2, half)
    one, other = pairs[..., 0, :], pairs[..., 1, :]
    turned: Array = xp.empty(pairs.shape, wide)
    turned[..., 0, :] = one * cos - other * sin
    turned[..., 1, :] = other * cos + one * sin
    return turned.reshape(x.shape)
