"""numpy functions that work on DTensors: a table from each to what does it on pieces.

Arguments that a function here does not take (out=, where=, …) are not supported.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import numpy as np
import numpy.typing as npt

from ..nn.arrays import Array, namespace_of
from . import products, shaping
from .alignment import never, together
from .elementwise import Scalar, apply, apply_ufunc
from .piece import Piece, replicated
from .placement import Partial, Placements, Replicate
from .reductions import Axis, Name, checked_dims, reduce

Bound = Piece | Array | Scalar | None


def cast_to(x: Piece, dtype: npt.DTypeLike) -> Piece:
    """Return a copy of another dtype; a sum stays Partial where no rounding comes first."""
    target = np.dtype(dtype)
    # Widening commutes with a sum, truncating does not.
    linear = together if np.can_cast(x.local.dtype, target, "safe") else never
    return apply("astype", lambda local: local.astype(target), [x], linear)


def clip(x: Piece, a_min: Bound = None, a_max: Bound = None) -> Piece:
    """Limit values from below and above; None for no limit."""
    if a_min is not None:
        (x,) = apply_ufunc(np.maximum, [x, a_min])
    if a_max is not None:
        (x,) = apply_ufunc(np.minimum, [x, a_max])
    return x if a_min is not None or a_max is not None else copy(x)


def where(condition: Piece | Array, x: Piece | Array | Scalar, y: Piece | Array | Scalar) -> Piece:
    """Choose from x where the condition holds, else from y."""
    inputs = [condition, x, y]
    like = next(one for one in inputs if isinstance(one, Piece))
    return apply("where", namespace_of(like.local).where, inputs)


def copy(x: Piece) -> Piece:
    """Return a copy, placed alike."""
    return x.with_local(x.local.copy())


def full_like(x: Piece, fill_value: Scalar, dtype: npt.DTypeLike | None = None) -> Piece:
    """Return an array of one value, placed alike; Replicate where `x` is Partial."""
    placements: Placements = tuple(
        Replicate() if isinstance(one, Partial) else one for one in x.placements
    )
    local = namespace_of(x.local).full(x.local.shape, fill_value, dtype=dtype or x.local.dtype)
    return x.with_local(local, placements=placements)


def _zeros_like(x: Piece, dtype: npt.DTypeLike | None = None) -> Piece:
    return full_like(x, 0, dtype)


def _ones_like(x: Piece, dtype: npt.DTypeLike | None = None) -> Piece:
    return full_like(x, 1, dtype)


def _concatenate(arrays: Sequence[Piece | Array], axis: int = 0) -> Piece:
    return shaping.concatenate(_all_pieces(arrays), axis)


def _stack(arrays: Sequence[Piece | Array], axis: int = 0) -> Piece:
    return shaping.stack(_all_pieces(arrays), axis)


def _all_pieces(arrays: Sequence[Piece | Array]) -> list[Piece]:
    like = next(one for one in arrays if isinstance(one, Piece))
    xp = namespace_of(like.local)
    return [
        one if isinstance(one, Piece) else replicated(xp.asarray(one), like.mesh) for one in arrays
    ]


def multiply_matrices(left: Piece | Array, right: Piece | Array) -> Piece:
    """Return left @ right, of which one may be an array that all ranks have."""
    return products.matmul(*_all_pieces([left, right]))


def swapaxes(x: Piece, axis1: int, axis2: int) -> Piece:
    """Return a view with two dims exchanged."""
    order = list(range(len(x.shape)))
    (one,), (other,) = (checked_dims(axis, len(order), "swapaxes") for axis in (axis1, axis2))
    order[one], order[other] = other, one
    return shaping.transpose(x, order)


def _summing(name: Name) -> Callable[..., Piece]:
    def reduction(
        a: Piece, axis: Axis = None, dtype: npt.DTypeLike | None = None, *, keepdims: bool = False
    ) -> Piece:
        return reduce(a, name, axis, dtype, keepdims=keepdims)

    return reduction


def _choosing(name: Name) -> Callable[..., Piece]:
    def reduction(a: Piece, axis: Axis = None, *, keepdims: bool = False) -> Piece:
        return reduce(a, name, axis, keepdims=keepdims)

    return reduction


def _shape(a: Piece) -> tuple[int, ...]:
    return a.shape


def _ndim(a: Piece) -> int:
    return len(a.shape)


FUNCTIONS: dict[Callable[..., object], Callable[..., object]] = {
    np.sum: _summing("sum"),
    np.mean: _summing("mean"),
    np.prod: _summing("prod"),
    np.max: _choosing("max"),
    np.min: _choosing("min"),
    np.amax: _choosing("max"),
    np.amin: _choosing("min"),
    np.any: _choosing("any"),
    np.all: _choosing("all"),
    np.transpose: shaping.transpose,
    np.swapaxes: swapaxes,
    np.reshape: shaping.reshape,
    np.expand_dims: shaping.expand_dims,
    np.squeeze: shaping.squeeze,
    np.concatenate: _concatenate,
    np.stack: _stack,
    np.clip: clip,
    np.where: where,
    np.copy: copy,
    np.full_like: full_like,
    np.zeros_like: _zeros_like,
    np.ones_like: _ones_like,
    np.shape: _shape,
    np.ndim: _ndim,
}
REDUCING_UFUNCS: dict[np.ufunc, Name] = {
    np.add: "sum",
    np.multiply: "prod",
    np.maximum: "max",
    np.minimum: "min",
    np.logical_or: "any",
    np.logical_and: "all",
}
