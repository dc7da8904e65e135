"""What the parity table trains with DTensors: two matrices, by the same lines as with arrays."""

from __future__ import annotations

from typing import TypeVar

import numpy as np
import numpy.typing as npt
from parity_models import LR, ROWS, STEPS, Found

import ferro
from ferro_strategies import DeviceMesh, DTensor, Replicate, Shard, distribute

Matrix = npt.NDArray[np.floating]
T = TypeVar("T", Matrix, DTensor)


def products_alone(dtype: str) -> Found:
    """Fit two matrices in one process."""
    x, target, first, second = _matrices(dtype)
    loss = _fit(x, target, first, second)
    return loss, {"first": first, "second": second}


def dtensor(group: ferro.ProcessGroup, dtype: str) -> Found:
    """Fit two matrices that are spread over a mesh, by the same arithmetic."""
    ranks = group.world_size
    rows = 2 if ranks % 2 == 0 else 1
    mesh = DeviceMesh((rows, ranks // rows), ("dp", "tp"), group)
    whole, by_row, by_column = Replicate(), Shard(0), Shard(1)
    places = ((by_row, whole), (by_row, whole), (whole, by_column), (whole, by_row))
    x, target, first, second = (
        distribute(array, mesh, place)
        for array, place in zip(_matrices(dtype), places, strict=True)
    )
    loss = _fit(x, target, first, second)
    return loss, {"first": first.full_tensor(), "second": second.full_tensor()}


def _matrices(dtype: str) -> list[Matrix]:
    rng = np.random.default_rng(5)
    shapes = ((ROWS, 7), (ROWS, 5), (7, 9), (9, 5))
    return [rng.standard_normal(shape).astype(dtype) for shape in shapes]


def _fit(x: T, target: T, first: T, second: T) -> float:
    """Step downhill on the mean of (tanh(x @ first) @ second - target)^2; return it."""
    loss = 0.0
    for _ in range(STEPS):
        inner = np.tanh(x @ first)
        error = inner @ second - target
        loss = float((error * error).mean())
        grad = error * (2 / target.size)
        grad_inner = (grad @ second.T) * (1 - inner * inner)
        second -= LR * _placed_as(second, inner.T @ grad)
        first -= LR * _placed_as(first, x.T @ grad_inner)
    return loss


def _placed_as(target: T, value: T) -> T:
    return value.redistribute(target.placements) if isinstance(target, DTensor) else value
