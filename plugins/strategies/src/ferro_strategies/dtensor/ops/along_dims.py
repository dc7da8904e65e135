"""Call NumPy functions that work along dims which no axis of the mesh cuts; each rank has all that it needs.

    argmax(x, 1)   sort(x, 1)   cumsum(x, 1)     of x placed (Shard(0),): each rank's rows
    argmax(x, 0)   cumsum(x)                     errors that say to redistribute: a dim is cut

A Partial is reduced first. Nothing else is sent.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np

from ferro import UsageError
from ferro.arrays import lost_meaning

from ...nn.arrays import Array, namespace_of
from ..placed_array import PlacedArray, replicated
from ..placement import all_replicated, map_shard_dims
from .elementwise import as_placed_arrays
from .manipulation import reshape
from .reductions import checked_dims
from .sharding_propagation import Operand, broadcast_labels, propagate_sharding

# Functions with an argument `axis`, which remove the dims that it names …
REMOVE_DIMS = frozenset(
    [
        np.argmax, np.argmin, np.nanargmax, np.nanargmin, np.median, np.nanmedian, np.percentile, np.nanpercentile,
        np.quantile, np.nanquantile,
    ]
)  # fmt: skip
# … and those which keep them, perhaps with another size.
KEEP_DIMS = frozenset(
    [
        np.cumsum, np.cumprod, np.nancumsum, np.nancumprod, np.sort, np.argsort, np.partition, np.argpartition, np.flip,
        np.roll, np.diff, np.gradient, np.take, np.repeat, np.delete, np.split, np.array_split, np.unwrap, np.fft.fft,
        np.fft.ifft, np.fft.rfft, np.fft.irfft,
    ]
)  # fmt: skip
_OF_NO_ELEMENTS = frozenset([np.cumsum, np.cumprod, np.nancumsum, np.nancumprod, np.sort, np.argsort, np.flip, np.roll])


def call_along_dims(name: str, function: Callable[..., Any], args: Sequence[Any], options: dict[str, Any]) -> Any:
    """Call one of `REMOVE_DIMS` and `KEEP_DIMS`; the first argument is the array.

    Raises:
        UsageError: a dim of `axis` is cut; for axis=None every dim counts.
    """
    signature = inspect.signature(function)
    bound = signature.bind(*args, **options)
    (first, x), *others = bound.arguments.items()
    if not isinstance(x, PlacedArray):
        (x,) = as_placed_arrays([x], next(one for one in args if isinstance(one, PlacedArray)))
    for other, value in others:
        bound.arguments[other] = whole_local(value, name)
    axis = bound.arguments.get("axis", signature.parameters["axis"].default)
    ndim = len(x.shape)
    dims = checked_dims(axis, ndim, name)
    removes = function in REMOVE_DIMS and not bound.arguments.get("keepdims", False)
    if function not in _OF_NO_ELEMENTS and any(x.shape[dim] == 0 for dim in dims):
        raise UsageError(f"{name}: of no elements, for shape {x.shape} has a size of 0 along axis {axis}", op=name)

    def call(local: Array) -> Any:
        bound.arguments[first] = local
        return function(*bound.args, **bound.kwargs)

    def new_dim(dim: int, result_ndim: int) -> int:
        if removes:  # the quantiles of several levels come first
            kept = [one for one in range(ndim) if one not in dims]
            return result_ndim - len(kept) + kept.index(dim)
        return dim if dim < dims[0] else dim + result_ndim - ndim

    return along_dims(name, call, x, dims, new_dim)


def along_dims(
    name: str,
    function: Callable[[Array], Any],
    x: PlacedArray,
    dims: Sequence[int],
    new_dim: Callable[[int, int], int] = lambda dim, _: dim,
) -> Any:
    """Call a function of this rank's part that needs all of some dims.

    Args:
        name: the function's name, for messages.
        function: the function; its result may be a list or tuple of arrays, which becomes one of PlacedArrays.
        x: the array.
        dims: the dims that must be whole.
        new_dim: gives the result's dim that a dim outside `dims` becomes, from the dim and the result's number of dims.

    Raises:
        UsageError: one of the dims is cut.
    """
    ndim = len(x.shape)
    labels = tuple(None if dim in dims else dim for dim in range(ndim))
    (x,) = propagate_sharding(name, [Operand(array=x, labels=labels)], ndim).redistribute_operands()

    def place(result: Any) -> Any:
        if isinstance(result, list | tuple):
            return [place(one) for one in result]
        local = namespace_of(x.local).asarray(result)
        shape = list(local.shape)
        for dim in range(ndim):
            if dim not in dims:
                shape[new_dim(dim, local.ndim)] = x.shape[dim]
        placements = map_shard_dims(x.placements, lambda dim: new_dim(dim, local.ndim))
        return x.with_local(local, shape=tuple(shape), placements=placements)

    return place(function(x.local))


def whole_local(value: Any, name: str) -> Any:
    """Return an argument with arrays that all ranks have in place of PlacedArrays, also inside a list or tuple.

    Raises:
        UsageError: the ranks have parts of it.
    """
    if isinstance(value, list | tuple):
        return type(value)(whole_local(one, name) for one in value)
    if not isinstance(value, PlacedArray):
        if problem := lost_meaning(value):
            raise UsageError(f"{name}: an argument is {problem}", op=name)
        return value
    if value.placements != all_replicated(value.mesh.ndim):
        raise UsageError(
            f"{name}: an argument of shape {value.shape}, placed {value.placements}, must be whole on every rank. "
            "Redistribute it to Replicate() on every axis first.",
            op=name,
        )
    return value.local


def take_along_axis(arr: PlacedArray | Array, indices: PlacedArray | Array, axis: int | None = -1) -> PlacedArray:
    """Take the elements at `indices` along a dim that is not cut, as argsort gives them."""
    x, at = as_placed_arrays([arr, indices])
    if axis is None:
        x, axis = reshape(x, -1), 0
    ndim = len(x.shape)
    (dim,) = checked_dims(axis, ndim, "take_along_axis")
    if len(at.shape) != ndim:
        raise UsageError(f"take_along_axis: {ndim} dims, and indices of {len(at.shape)}", op="take_along_axis")
    rest = [tuple(1 if one == dim else size for one, size in enumerate(array.shape)) for array in (x, at)]
    shape = list(np.broadcast_shapes(*rest))
    shape[dim] = at.shape[dim]
    operands = [
        Operand(
            array=array,
            labels=tuple(
                None if one == dim else label
                for one, label in enumerate(
                    broadcast_labels(sizes, tuple(1 if d == dim else s for d, s in enumerate(shape)))
                )
            ),
        )
        for array, sizes in zip((x, at), rest, strict=True)
    ]
    sharding = propagate_sharding("take_along_axis", operands, ndim)
    local, local_at = (array.local for array in sharding.redistribute_operands())
    found: Array = namespace_of(local).take_along_axis(local, local_at, dim)
    return x.with_local(found, shape=tuple(shape), placements=sharding.result)


def pad(array: PlacedArray, pad_width: Any, mode: str = "constant", **options: Any) -> PlacedArray:
    """Add elements before and after the dims that are not cut."""
    ndim = len(array.shape)
    widths = np.broadcast_to(pad_width, (ndim, 2))
    dims = [dim for dim in range(ndim) if widths[dim].any()]
    if not dims:
        return array.with_view(array.local.copy())
    return along_dims("pad", lambda local: np.pad(local, widths, mode, **options), array, dims)  # type: ignore[no-any-return, call-overload]


def tile(A: PlacedArray, reps: int | Sequence[int]) -> PlacedArray:  # noqa: N803 - NumPy's name
    """Repeat the array along the dims that are not cut; new dims come first."""
    given = tuple(reps) if isinstance(reps, Sequence) else (reps,)
    ndim = len(A.shape)
    own = ((1,) * ndim + given)[len(given) :][-ndim:] if len(given) < ndim else given[len(given) - ndim :]
    dims = [dim for dim in range(ndim) if own[dim] != 1]
    return along_dims("tile", lambda local: np.tile(local, given), A, dims, lambda dim, new: dim + new - ndim)  # type: ignore[no-any-return]


def broadcast_to(array: PlacedArray, shape: int | Sequence[int]) -> PlacedArray:
    """Return a read-only view in which dims of size 1 are stretched and new dims come first."""
    new = tuple(shape) if isinstance(shape, Sequence) else (shape,)
    ndim, extra = len(array.shape), len(new) - len(array.shape)
    if extra < 0 or any(size not in (1, new[extra + dim]) for dim, size in enumerate(array.shape)):
        raise UsageError(f"broadcast_to: shape {array.shape} cannot become {new}", op="broadcast_to")
    dims = [dim for dim in range(ndim) if array.shape[dim] != new[extra + dim]]

    def stretch(local: Array) -> Array:
        sizes = (new[extra + dim] if dim in dims else size for dim, size in enumerate(local.shape))
        return namespace_of(local).broadcast_to(local, (*new[:extra], *sizes))  # type: ignore[no-any-return]

    return along_dims("broadcast_to", stretch, array, dims, lambda dim, _: dim + extra)  # type: ignore[no-any-return]


def diagonal(a: PlacedArray, offset: int = 0, axis1: int = 0, axis2: int = 1) -> PlacedArray:
    """Return the diagonals of two dims, which are not cut, along a new last dim."""
    ndim = len(a.shape)
    (one,), (other,) = (checked_dims(axis, ndim, "diagonal") for axis in (axis1, axis2))
    kept = [dim for dim in range(ndim) if dim not in (one, other)]

    def take(local: Array) -> Array:
        return local.diagonal(offset, one, other)

    return along_dims("diagonal", take, a, (one, other), lambda dim, _: kept.index(dim))  # type: ignore[no-any-return]


def triangle(name: str) -> Callable[..., PlacedArray]:
    """Return an implementation of numpy.tril or numpy.triu."""

    def cut(m: PlacedArray, k: int = 0) -> PlacedArray:
        ndim = len(m.shape)
        dims = checked_dims((-2, -1), ndim, name)
        return along_dims(name, lambda local: getattr(np, name)(local, k), m, dims)  # type: ignore[no-any-return]

    return cut


def replicate_results(value: Any, like: PlacedArray) -> Any:
    """Place a function's results, which every rank has, on the mesh of `like`."""
    if isinstance(value, np.ndarray | np.generic):
        return replicated(namespace_of(like.local).asarray(value), like.mesh)
    if isinstance(value, list | tuple):
        items = [replicate_results(one, like) for one in value]
        return type(value)(*items) if hasattr(value, "_fields") else type(value)(items)
    return value
