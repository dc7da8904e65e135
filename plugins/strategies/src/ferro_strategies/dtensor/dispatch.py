"""Dispatch: call the implementation of a NumPy ufunc or function whose operands are DTensors.

DTensor's `__array_ufunc__` and `__array_function__` come here, with PlacedArrays for DTensors.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any, cast

import numpy as np
import numpy.typing as npt

from .ops.along_dims import KEEP_DIMS, REMOVE_DIMS, along_dims, call_along_dims, replicate_results, whole_local
from .ops.elementwise import apply_ufunc, as_placed_arrays, unsupported
from .ops.functions import CONTRACTING_UFUNCS, FUNCTIONS, REDUCING_UFUNCS
from .ops.manipulation import expand_dims
from .ops.reductions import checked_dims
from .placed_array import PlacedArray
from .placement import all_replicated

_OUT = "Give a DTensor of the result's placements, or write into full_tensor() of the result."
# On every rank these would write the same file.
_WRITERS = frozenset([np.save, np.savez, np.savez_compressed, np.savetxt])


def call_ufunc(
    ufunc: np.ufunc, method: str, inputs: Sequence[Any], options: Mapping[str, Any]
) -> tuple[PlacedArray, ...]:
    """Call a ufunc, or its `reduce`, `accumulate` or `outer`, on PlacedArrays, numbers and arrays.

    Raises:
        UnsupportedError: DTensors do not support this ufunc, method or option.
    """
    name = f"numpy.{ufunc.__name__}"
    given = {key: value for key, value in options.items() if value is not None}
    if given.get("where") is True:
        del given["where"]
    if method == "reduce":
        return (_reduce(ufunc, inputs, given, options.get("axis", 0)),)
    if method == "accumulate" and not given.keys() - {"axis", "dtype"}:
        return (_accumulate(ufunc, inputs[0], given),)
    if method == "outer" and not given:
        left, right = as_placed_arrays(inputs)
        left = expand_dims(left, tuple(range(len(left.shape), len(left.shape) + len(right.shape))))
        return apply_ufunc(ufunc, [left, right])
    if method != "__call__":
        raise unsupported(f"{name}.{method}")
    if ufunc in CONTRACTING_UFUNCS and not given:
        return (CONTRACTING_UFUNCS[ufunc](*inputs),)
    if ufunc.signature is not None or given.keys() - {"out", "dtype", "where"}:
        text = ", ".join(f"{key}=" for key in given)
        raise unsupported(f"{name} with {text}" if text else name)
    out = cast("tuple[PlacedArray | None, ...]", given.get("out", ()))
    if not all(one is None or isinstance(one, PlacedArray) for one in out):
        raise unsupported(f"{name} with an array as out=", _OUT)
    if "where" in given and not any(isinstance(one, PlacedArray) for one in out):
        raise unsupported(f"{name} with where= and without out=, whose other elements have no values,")
    dtype = cast("npt.DTypeLike | None", given.get("dtype"))
    return apply_ufunc(ufunc, inputs, out=out, dtype=dtype, where=given.get("where", True))


def call_function(function: Callable[..., Any], args: Sequence[Any], options: Mapping[str, Any]) -> Any:
    """Call a NumPy function on PlacedArrays, numbers and arrays.

    Raises:
        UnsupportedError: DTensors do not support this function, or one of these arguments.
    """
    module = getattr(function, "__module__", None) or "numpy"
    name = f"{module}.{getattr(function, '__name__', function)}"
    given = dict(options)
    arrays = list(_placed_arrays([args, list(given.values())]))
    implementation = FUNCTIONS.get(function)
    if function in KEEP_DIMS or function in REMOVE_DIMS:
        if given.get("out") is not None:
            raise unsupported(f"{name} with out=", _OUT)
        return call_along_dims(name, function, args, given)
    whole = all(array.placements == all_replicated(array.mesh.ndim) for array in arrays)
    if function in _WRITERS:
        raise unsupported(name, "Call it on one rank, with full_tensor() of all ranks.")
    if function is np.copyto and not isinstance(args[0], PlacedArray):
        raise unsupported(f"{name} into an array", "Copy full_tensor() of all ranks.")
    if implementation is not None:
        if args and isinstance(args[0], np.ndarray):
            args = [*as_placed_arrays(args[:1], arrays[0]), *args[1:]]
        try:
            inspect.signature(implementation).bind(*args, **given)
        except TypeError as error:
            if not whole:
                raise unsupported(f"{name} so called ({error})") from None
        else:
            return implementation(*args, **given)
    if not whole:
        raise unsupported(name)
    # Every rank has all of every array, and computes the same.
    local_args = [whole_local(one, name) for one in args]
    return replicate_results(function(*local_args, **{key: whole_local(value, name) for key, value in given.items()}),
                             arrays[0])  # fmt: skip


def _placed_arrays(value: object) -> Iterator[PlacedArray]:
    if isinstance(value, PlacedArray):
        yield value
    elif isinstance(value, list | tuple):
        for one in value:
            yield from _placed_arrays(one)


def _reduce(ufunc: np.ufunc, inputs: Sequence[Any], given: dict[str, Any], axis: Any) -> PlacedArray:
    """Call `ufunc.reduce`; NumPy's default axis is 0 here, and None reduces over all dims."""
    name = f"numpy.{ufunc.__name__}.reduce"
    (operand,) = as_placed_arrays(inputs)
    out = given.pop("out", (None,))[0]
    reducing = REDUCING_UFUNCS.get(ufunc)
    given.pop("axis", None)
    if reducing is not None:
        if reducing in ("max", "min", "any", "all") and "dtype" in given:
            raise unsupported(f"{name} with dtype=")
        function = FUNCTIONS[getattr(np, reducing)]
        return cast("PlacedArray", function(operand, axis, out=out, **given))
    if out is not None or given.keys() - {"keepdims", "dtype"}:
        raise unsupported(f"{name} with {', '.join(sorted([*given, *(['out'] if out is not None else [])]))}")
    dims = checked_dims(axis, len(operand.shape), name)
    kept = [dim for dim in range(len(operand.shape)) if dim not in dims or given.get("keepdims")]
    return cast("PlacedArray", along_dims(
        name, lambda local: ufunc.reduce(local, axis=dims if len(dims) != 1 else dims[0], **given), operand, dims,
        lambda dim, _: kept.index(dim),
    ))  # fmt: skip


def _accumulate(ufunc: np.ufunc, operand: Any, given: dict[str, Any]) -> PlacedArray:
    name = f"numpy.{ufunc.__name__}.accumulate"
    (x,) = as_placed_arrays([operand])
    dims = checked_dims(given.pop("axis", 0), len(x.shape), name)
    return cast("PlacedArray", along_dims(name, lambda local: ufunc.accumulate(local, axis=dims[0], **given), x, dims))
