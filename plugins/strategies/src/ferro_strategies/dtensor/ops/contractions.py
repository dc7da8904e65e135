"""Contractions: einsum and the functions that are one, such as dot, tensordot and inner.

A letter of einsum is a label of sharding propagation. A cut dim that is summed over gives a Partial; a dim of which an
operand takes the diagonal must not be cut.
"""

from __future__ import annotations

import string
from collections import Counter
from collections.abc import Sequence
from typing import Any

import numpy as np

from ferro import UsageError

from ...nn.arrays import Array, namespace_of, wide_dtype
from ..local_shapes import Shape
from ..placed_array import PlacedArray, is_half
from .along_dims import diagonal
from .elementwise import Input, apply_ufunc, as_placed_arrays
from .manipulation import expand_dims, reshape
from .reductions import checked_dims, reduce
from .sharding_propagation import Operand, multilinear, propagate_sharding


def einsum(subscripts: str, *operands: Input, optimize: Any = False) -> PlacedArray:
    """Evaluate Einstein's summation convention, as numpy.einsum with subscripts as text.

    Raises:
        UsageError: subscripts and shapes do not fit together, or placements do not.
    """
    arrays = as_placed_arrays(operands)
    terms, output = _parse(subscripts, [array.shape for array in arrays])
    sizes = _sizes(subscripts, terms, arrays)
    diagonals = {letter for term in terms for letter, count in Counter(term).items() if count > 1}
    summed = [letter for letter in sizes if letter not in output]
    label = {letter: at for at, letter in enumerate([*output, *summed])}
    placed = [
        Operand(
            array=array,
            labels=tuple(
                None if letter in diagonals or size != sizes[letter] else label[letter]
                for letter, size in zip(term, array.shape, strict=True)
            ),
        )
        for term, array in zip(terms, arrays, strict=True)
    ]
    dtype = np.result_type(*(array.dtype for array in arrays))
    sharding = propagate_sharding("einsum", placed, len(output), multilinear, dtype)
    locals_: list[Array] = [array.local for array in sharding.redistribute_operands()]
    if is_half(dtype):
        locals_ = [local.astype(wide_dtype(dtype), copy=False) for local in locals_]
    text = f"{','.join(terms)}->{output}"
    xp = namespace_of(locals_[0])
    result: Array = xp.asarray(xp.einsum(text, *locals_, optimize=optimize))
    shape = tuple(sizes[letter] for letter in output)
    if any(local is result or xp.shares_memory(local, result) for local in locals_):
        result = result.copy()
    return arrays[0].with_local(result, shape=shape, placements=sharding.result, dtype=dtype)


def _parse(subscripts: str, shapes: Sequence[Shape]) -> tuple[list[str], str]:
    """Return the letters of each operand and of the result, with letters in place of the ellipses."""
    if not isinstance(subscripts, str):
        raise UsageError("einsum: give the subscripts as text, as in 'ij,jk->ik'", op="einsum")
    inputs, arrow, output = subscripts.replace(" ", "").partition("->")
    terms = inputs.split(",")
    if len(terms) != len(shapes):
        raise UsageError(f"einsum: {subscripts!r} names {len(terms)} operands; {len(shapes)} are given", op="einsum")
    unused = [letter for letter in string.ascii_letters if letter not in subscripts]
    longest = ""
    for at, (term, shape) in enumerate(zip(terms, shapes, strict=True)):
        if "..." in term:
            count = len(shape) - len(term) + 3
            dots = "".join(unused[len(unused) - count :]) if count else ""
            longest = max(longest, dots, key=len)
            terms[at] = term.replace("...", dots)
        if len(terms[at]) != len(shape) or not all(letter.isalpha() for letter in terms[at]):
            raise UsageError(f"einsum: {term!r} of {subscripts!r} does not fit shape {shape}", op="einsum")
    if arrow:
        output = output.replace("...", longest)
    else:
        counts = Counter("".join(terms))
        output = longest + "".join(sorted(letter for letter in counts if counts[letter] == 1 and letter not in longest))
    if len(set(output)) != len(output) or not set(output) <= set("".join(terms)):
        raise UsageError(f"einsum: the result of {subscripts!r} names a dim twice, or one of no operand", op="einsum")
    return terms, output


def _sizes(subscripts: str, terms: Sequence[str], arrays: Sequence[PlacedArray]) -> dict[str, int]:
    sizes: dict[str, int] = {}
    for term, array in zip(terms, arrays, strict=True):
        for letter, size in zip(term, array.shape, strict=True):
            known = sizes.get(letter, 1)
            if 1 not in (known, size) and known != size:
                raise UsageError(f"einsum: {subscripts!r}: sizes {known} and {size} for one letter", op="einsum")
            sizes[letter] = size if known == 1 else known
    return sizes


def tensordot(a: Input, b: Input, axes: Any = 2) -> PlacedArray:
    """Sum products over the dims `axes`; a number names the last dims of `a` and the first of `b`."""
    left, right = as_placed_arrays([a, b])
    ndims = len(left.shape), len(right.shape)
    try:
        one, other = axes
    except TypeError:
        one, other = range(ndims[0] - axes, ndims[0]), range(axes)
    summed = [
        checked_dims(tuple(given) if isinstance(given, Sequence | range) else given, ndim, "tensordot")
        for given, ndim in zip((one, other), ndims, strict=True)
    ]
    sizes = [[array.shape[dim] for dim in dims] for array, dims in zip((left, right), summed, strict=True)]
    if sizes[0] != sizes[1]:
        raise UsageError(f"tensordot: shapes {left.shape} and {right.shape} do not fit for axes {axes}", op="tensordot")
    letters = iter(string.ascii_letters)
    names = [[next(letters) for _ in range(ndim)] for ndim in ndims]
    for dim, partner in zip(*summed, strict=True):
        names[1][partner] = names[0][dim]
    kept = [name for own, dims in zip(names, summed, strict=True) for at, name in enumerate(own) if at not in dims]
    return einsum(f"{''.join(names[0])},{''.join(names[1])}->{''.join(kept)}", left, right)


def dot(a: Input, b: Input) -> PlacedArray:
    """Return numpy.dot: the product of matrices, the sum of the products of vectors."""
    left, right = as_placed_arrays([a, b])
    if not left.shape or not right.shape:
        return apply_ufunc(np.multiply, [left, right])[0]
    return tensordot(left, right, ([-1], [max(-2, -len(right.shape))]))


def inner(a: Input, b: Input) -> PlacedArray:
    """Return the sum of products over the last dims."""
    left, right = as_placed_arrays([a, b])
    if not left.shape or not right.shape:
        return apply_ufunc(np.multiply, [left, right])[0]
    return tensordot(left, right, ([-1], [-1]))


def vdot(a: Input, b: Input) -> PlacedArray:
    """Return the sum of the products of all elements, those of `a` conjugated."""
    left, right = as_placed_arrays([a, b])
    if left.shape != right.shape:
        left, right = reshape(left, -1), reshape(right, -1)
    left = _conjugated(left)
    dims = tuple(range(len(left.shape)))
    return tensordot(left, right, (dims, dims))


def _conjugated(x: PlacedArray) -> PlacedArray:
    return apply_ufunc(np.conjugate, [x])[0] if x.dtype.kind == "c" else x


def outer(a: Input, b: Input) -> PlacedArray:
    """Return the products of all pairs of elements."""
    left, right = (reshape(array, -1) for array in as_placed_arrays([a, b]))
    return apply_ufunc(np.multiply, [expand_dims(left, 1), right])[0]


def vecdot(x1: Input, x2: Input, axis: int = -1) -> PlacedArray:
    """Return the sum of products over the last dim, with broadcasting, the first operand conjugated."""
    if axis != -1:
        raise UsageError("vecdot: only the last dim; use moveaxis, or einsum", op="vecdot")
    left, right = as_placed_arrays([x1, x2])
    return einsum("...i,...i->...", _conjugated(left), right)


def matvec(x1: Input, x2: Input) -> PlacedArray:
    """Return matrices times vectors, with broadcasting."""
    return einsum("...ij,...j->...i", x1, x2)


def vecmat(x1: Input, x2: Input) -> PlacedArray:
    """Return vectors, conjugated, times matrices, with broadcasting."""
    left, right = as_placed_arrays([x1, x2])
    return einsum("...i,...ij->...j", _conjugated(left), right)


def trace(a: PlacedArray, offset: int = 0, axis1: int = 0, axis2: int = 1, dtype: Any = None) -> PlacedArray:
    """Sum the diagonal of two dims that are not cut."""
    return reduce(diagonal(a, offset, axis1, axis2), "sum", -1, dtype)
