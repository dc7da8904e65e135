"""Put the items of a batch together: trees of arrays and numbers become trees of arrays with one axis more."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np

from ferro import UsageError
from ferro.arrays import lost_meaning


def collate(items: Sequence[Any]) -> Any:
    """Stack items along a new axis 0, part by part.

    Arrays of one shape and numbers become one array; tuples, lists, dicts and named tuples become the same of arrays;
    strings, bytes and None become a list of them.

    Raises:
        UsageError: the items have not the same parts, or arrays of different shapes, or an array means more than its
            numbers, as a masked array does.
    """
    return _collate(list(items), "item")


def _collate(parts: list[Any], place: str) -> Any:
    first = parts[0]
    if isinstance(first, dict):
        _require(all(isinstance(part, dict) and part.keys() == first.keys() for part in parts), place, "keys", parts)
        return {key: _collate([part[key] for part in parts], f"{place}[{key!r}]") for key in first}
    if isinstance(first, (tuple, list)):
        _require(all(type(part) is type(first) and len(part) == len(first) for part in parts), place, "length", parts)
        columns = [_collate(list(column), f"{place}[{i}]") for i, column in enumerate(zip(*parts, strict=True))]
        if hasattr(first, "_fields"):
            return type(first)(*columns)
        return columns if isinstance(first, list) else tuple(columns)
    if first is None or isinstance(first, (str, bytes)):
        return parts
    if problem := next((found for part in parts if (found := lost_meaning(part))), ""):
        raise UsageError(f"collate: {place} is {problem}, in the data set or in a function of your own, collate=.")
    arrays = [np.asarray(part) for part in parts]
    shapes = {array.shape for array in arrays}
    _require(len(shapes) == 1, place, f"shape ({', '.join(map(str, sorted(shapes)))})", parts)
    if arrays[0].dtype == object:
        raise UsageError(
            f"collate: {place} is a {type(first).__name__}: give DataLoader a function of your own, collate=."
        )
    return np.stack(arrays)


def _require(holds: bool, place: str, what: str, parts: list[Any]) -> None:
    if not holds:
        kinds = ", ".join(sorted({type(part).__name__ for part in parts}))
        raise UsageError(
            f"collate: {place} has not the same {what} in all items of the batch ({kinds}): "
            "make the items alike, or give DataLoader a function of your own, collate=."
        )
