"""Comparison of arrays that must be the same on all ranks, by a few numbers of each."""

from __future__ import annotations

import math

import numpy as np

from ferro import ProcessGroup, UsageError, Work

from ..nn.arrays import Array, namespace_of, wide_dtype
from ..nn.module import Module


def summary(x: Array) -> Array:
    """Describe an array by the root of the sum of its squares, its sum, and the relative difference of rounding.

    Numbers that are not finite count as -1.
    """
    wide = x.reshape(x.size).astype(wide_dtype(x.dtype), copy=False)
    squares, total = float(abs(namespace_of(wide).vdot(wide, wide))), float(abs(wide.sum()))
    root = math.sqrt(squares) if math.isfinite(squares) else -1.0
    # Half precision counts as bfloat16, the coarser of the two.
    epsilon = 2.0**-7 if x.dtype.itemsize <= 2 else float(np.finfo(x.dtype).eps)
    return np.array([root, total if math.isfinite(total) else -1.0, math.sqrt(epsilon)])


def differing(summaries: Array, group: ProcessGroup) -> Array:
    """Find the arrays that differ between ranks, given this rank's summaries (n, 3): (n,) booleans, alike on all ranks.

    Ranks on unlike processors may round unlike, so arrays that agree but for rounding count as equal. The difference of
    the sums is measured against the greater of both numbers, because a sum may be zero but for rounding.
    """
    extremes = group.all_reduce(np.stack((summaries[:, :2], -summaries[:, :2])), "max")
    greatest, least = extremes[0], -extremes[1]
    differs = greatest - least > summaries[:, 2:] * np.abs(greatest).max(axis=1, keepdims=True)
    result: Array = differs.any(axis=1)
    return result


def check_same_input(layer: Module, x: Array, group: ProcessGroup) -> None:
    """Check that all ranks call a layer with the same input.

    Raises:
        UsageError: shapes or values differ; raised on every rank.
    """
    size = np.array([x.size, 0.0, 0.0])
    if differing(np.stack((summary(x), size)), group).any():
        raise different_inputs(repr(layer), group)


def begin_comparison(indices: Array, group: ProcessGroup) -> Work[Array]:
    """Begin to compare integers of any shape over the ranks, for `end_comparison`."""
    xp = namespace_of(indices)
    flat = indices.reshape(indices.size).astype(np.int64)
    own = np.array([flat.size, int(flat.sum()), int((flat * xp.arange(1, flat.size + 1)).sum())])
    work: Work[Array] = group.all_reduce(np.stack((own, -own)), "max", async_op=True)
    return work


def end_comparison(begun: Work[Array]) -> bool:
    """Wait for a comparison; say whether all ranks have the same integers."""
    greatest, negative = begun.wait()
    return bool((greatest == -negative).all())


def different_inputs(owner: str, group: ProcessGroup) -> UsageError:
    """Make the error for ranks with other inputs."""
    return UsageError(
        f"{owner}: the ranks of group {group.name!r} gave different inputs. Ranks that share the layers of a model "
        'must run the same batch: read the data by the rank on another axis of the mesh, such as mesh["dp"].',
        group=group.name,
        rank=group.rank,
    )
