"""A state dict without its arrays: {"$tensor": full name} stands in the place of each, which has become a tensor."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import numpy as np

from ferro.types import Array
from ferro_checkpoint.errors import StateError

TENSOR_KEY = "$tensor"
_MOST_DEPTH = 64


def take_arrays(value: Any, name: str, take: Callable[[str, Array], None], depth: int = 0) -> Any:
    """Copy a state dict, with names in the place of its arrays.

    Args:
        value: the state dict.
        name: of the state dict in the state; those of arrays begin with it.
        take: is given the full name of each array, and the array.
        depth: how deep `value` is nested.

    Raises:
        StateError: it is nested too deeply, or has the key that stands for an array.
    """
    if depth > _MOST_DEPTH:
        raise StateError(f"{name!r} is nested more than {_MOST_DEPTH} deep; does it contain itself?")
    if isinstance(value, np.ndarray):
        take(name, value)
        return {TENSOR_KEY: name}
    if isinstance(value, Mapping):
        if TENSOR_KEY in value:
            raise StateError(f"{name!r} cannot have the key {TENSOR_KEY!r}, which stands for an array")
        return {key: take_arrays(item, f"{name}.{key}", take, depth + 1) for key, item in value.items()}
    if isinstance(value, list | tuple):
        items = [take_arrays(item, f"{name}.{place}", take, depth + 1) for place, item in enumerate(value)]
        return items if isinstance(value, list) else tuple(items)
    return value


def put_arrays(value: Any, array_of: Callable[[str], Array | None]) -> Any:
    """Copy what `take_arrays` returned, with arrays in the place of names, where `array_of` has one."""
    if isinstance(value, dict):
        if len(value) == 1 and isinstance(name := value.get(TENSOR_KEY), str):
            array = array_of(name)
            return value if array is None else array
        return {key: put_arrays(item, array_of) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return type(value)(put_arrays(item, array_of) for item in value)
    return value


def rename_arrays(value: Any, renamed: Callable[[str], str]) -> Any:
    """Copy what `take_arrays` returned, with other names for its arrays."""
    if isinstance(value, dict):
        if len(value) == 1 and isinstance(name := value.get(TENSOR_KEY), str):
            return {TENSOR_KEY: renamed(name)}
        return {key: rename_arrays(item, renamed) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return type(value)(rename_arrays(item, renamed) for item in value)
    return value
