"""Packed trees: a tree of arrays as one array of bytes, for a message between stages.

    | size of the description | description (JSON) | leaf | leaf | … |      each part begins at a multiple of 64 bytes

The description has the containers, the dtype and shape of each array, and the value of each leaf that is no array. A
namedtuple's class is described by its module and name, and looked up among the modules that are imported already, so
nothing that was received is executed.
"""

from __future__ import annotations

import json
import math
import struct
import sys
from collections import OrderedDict
from typing import Any

import numpy as np

from ferro import CollectiveMismatch, UsageError
from ferro.arrays import dtype_from_name, dtype_name, dtype_problem

from ...nn.arrays import Array, namespace_of
from ...nn.trees import LEAF, Arrays, Structure, structure

_ALIGNMENT = 64
_SIZE = struct.Struct("<Q")
_CONTAINERS: dict[str, type] = {"tuple": tuple, "list": list, "dict": dict, "OrderedDict": OrderedDict}
_PLAIN_LEAVES = (bool, int, float, str, type(None))


def pack_tree(tree: Arrays) -> Array:
    """Copy a tree into one array of bytes.

    Raises:
        UsageError: a leaf or a key cannot be sent.
    """
    whole = structure(tree)
    arrays: list[Array] = []
    leaves = [_describe_leaf(leaf, arrays) for leaf in whole.flatten(tree)]
    description = json.dumps([_describe_containers(whole), leaves]).encode()
    starts = [_aligned(_SIZE.size + len(description))]
    for array in arrays:
        starts.append(_aligned(starts[-1] + array.nbytes))
    packed = np.empty(starts[-1], np.uint8)
    packed[: _SIZE.size] = np.frombuffer(_SIZE.pack(len(description)), np.uint8)
    packed[_SIZE.size : _SIZE.size + len(description)] = np.frombuffer(description, np.uint8)
    for start, array in zip(starts, arrays, strict=False):
        room = packed[start : start + array.nbytes].view(array.dtype).reshape(array.shape)
        room[...] = array if isinstance(array, np.ndarray) else namespace_of(array).asnumpy(array)
    return packed


def unpack_tree(packed: Array) -> Arrays:
    """Build the tree again; its arrays are views of `packed`.

    Raises:
        CollectiveMismatch: these bytes are no packed tree; the sender runs another program.
    """
    try:
        (size,) = _SIZE.unpack(packed[: _SIZE.size].tobytes())
        containers, described = json.loads(packed[_SIZE.size : _SIZE.size + size].tobytes())
        start = _aligned(_SIZE.size + size)
        leaves: list[Any] = []
        for kind, *details in described:
            leaf, start = _read_leaf(kind, details, packed, start)
            leaves.append(leaf)
        return _read_containers(containers).unflatten(leaves)
    except (ValueError, TypeError, KeyError, AttributeError, struct.error) as error:
        raise CollectiveMismatch(
            f"Pipeline: what came is no tree of arrays: {error}. Run the same version of ferro-strategies, and define "
            "the same namedtuples, on every rank.",
            op="recv",
        ) from error


def check_leaf(leaf: object) -> str:
    """Say why a leaf cannot be sent between stages; "" if it can."""
    if type(leaf) in _PLAIN_LEAVES:
        return ""
    if isinstance(leaf, np.generic) or not hasattr(leaf, "dtype"):
        return f"a {type(leaf).__name__}, which is neither an array nor None, a number or a string"
    try:
        namespace_of(leaf)  # type: ignore[arg-type]
    except UsageError as error:
        return str(error).removeprefix("expected a plain array, got ").rstrip(".")
    return dtype_problem(leaf.dtype)


def _describe_leaf(leaf: Any, arrays: list[Array]) -> list[object]:
    if problem := check_leaf(leaf):
        raise UsageError(f"cannot be sent to another stage: {problem}.")
    if isinstance(leaf, _PLAIN_LEAVES):
        return ["value", leaf]
    arrays.append(leaf)
    return ["array" if isinstance(leaf, np.ndarray) else "gpu", dtype_name(leaf.dtype), list(leaf.shape)]


def _read_leaf(kind: str, details: list[Any], packed: Array, start: int) -> tuple[Any, int]:
    if kind == "value":
        return details[0], start
    dtype, shape = dtype_from_name(details[0]), tuple(details[1])
    if problem := dtype_problem(dtype):
        raise ValueError(problem)
    end = start + math.prod(shape) * dtype.itemsize
    leaf: Array = packed[start:end].view(dtype).reshape(shape)
    if kind == "gpu":
        import cupy  # CuPy is installed, because the sender and this rank's stages use it

        leaf = cupy.asarray(leaf)
    return leaf, _aligned(end)


def _describe_containers(whole: Structure) -> object:
    if whole.kind is None:
        return None
    kind: object = whole.kind.__name__
    if hasattr(whole.kind, "_fields"):
        kind = [whole.kind.__module__, whole.kind.__qualname__]
        if _named_class(*kind) is not whole.kind:
            raise UsageError(
                f"the namedtuple {whole.kind.__qualname__} cannot be sent to another stage, because its class is not "
                f"at the top level of module {whole.kind.__module__!r}. Define it there, or use a tuple or dict."
            )
    keys = list(whole.keys) if issubclass(whole.kind, dict) else None
    if keys is not None and not all(type(key) in _PLAIN_LEAVES for key in keys):
        raise UsageError(f"a dict with the keys {keys} cannot be sent to another stage. Use strings or numbers.")
    return [kind, keys, [_describe_containers(part) for part in whole.parts]]


def _read_containers(described: Any) -> Structure:
    if described is None:
        return LEAF
    kind, keys, parts = described
    found = _named_class(*kind) if isinstance(kind, list) else _CONTAINERS[kind]
    if found is None:
        raise ValueError(f"namedtuple {'.'.join(kind)} is not defined on this rank")
    members = tuple(map(_read_containers, parts))
    return Structure(found, tuple(range(len(members)) if keys is None else keys), members)


def _named_class(module: str, name: str) -> type | None:
    """Look up a namedtuple at the top level of an imported module."""
    found = vars(sys.modules[module]).get(name) if module in sys.modules else None
    return found if isinstance(found, type) and issubclass(found, tuple) and hasattr(found, "_fields") else None


def _aligned(position: int) -> int:
    return -(-position // _ALIGNMENT) * _ALIGNMENT
