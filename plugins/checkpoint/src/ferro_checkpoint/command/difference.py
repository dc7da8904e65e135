"""How two tensors of the same shape and dtype differ, found a few MiB at a time."""

from __future__ import annotations

import math
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray


@dataclass(slots=True)
class Difference:
    """What differs between two tensors.

    Attributes:
        elements: of each tensor.
        differing: how many have other bits.
        largest: the largest absolute difference of two numbers.
        largest_relative: the largest quotient of a difference and the larger magnitude of the two.
        not_finite: differing elements of which one or both are infinite or no number; they count in neither.
    """

    elements: int = 0
    differing: int = 0
    largest: float = 0.0
    largest_relative: float = 0.0
    not_finite: int = 0


def difference(a: Iterable[NDArray[np.uint8]], b: Iterable[NDArray[np.uint8]], dtype: np.dtype[Any]) -> Difference:
    """Compare the bytes of two tensors of one dtype, which come in pieces of the same sizes."""
    found = Difference()
    for one, other in zip(a, b, strict=True):
        found.elements += len(one) // dtype.itemsize
        if not np.array_equal(one, other):
            rows = (one != other).reshape(-1, dtype.itemsize).any(axis=1)
            _add(found, one.view(dtype)[rows], other.view(dtype)[rows])
    return found


def _add(found: Difference, a: NDArray[Any], b: NDArray[Any]) -> None:
    """Take elements into account that differ."""
    found.differing += len(a)
    if a.dtype.kind in "iu":
        # Signed numbers wrap when they are subtracted, and as unsigned ones their differences are right again.
        unsigned = np.dtype(f"u{a.dtype.itemsize}")
        distance = (np.maximum(a, b).view(unsigned) - np.minimum(a, b).view(unsigned)).astype(np.float64)
        magnitude = np.maximum(np.abs(a.astype(np.float64)), np.abs(b.astype(np.float64)))
    else:
        wide = np.complex128 if a.dtype.kind == "c" else np.float64
        # Bits that only differ in the sign of a zero, or in what kind of NaN it is, give a distance of 0 or none.
        with np.errstate(all="ignore"):
            x, y = a.astype(wide), b.astype(wide)
            distance, magnitude = np.abs(x - y), np.maximum(np.abs(x), np.abs(y))
        finite = np.isfinite(distance)
        found.not_finite += int((~finite).sum())
        distance, magnitude = distance[finite], magnitude[finite]
    if len(distance):
        found.largest = max(found.largest, float(distance.max()))
        with np.errstate(all="ignore"):
            relative = float(np.where(magnitude > 0, distance / magnitude, 0).max())
        found.largest_relative = max(found.largest_relative, relative if math.isfinite(relative) else 0.0)
