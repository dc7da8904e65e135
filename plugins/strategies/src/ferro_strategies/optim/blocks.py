"""Updates block by block: blocks of matching arrays, in single precision for parameters in half precision."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from functools import cache

import numpy as np

from ferro.errors import UsageError

from ..nn.arrays import Array, namespace_of, wide_dtype

# An update works on blocks of this many elements. On a CPU a block of each array stays in the cache from one operation
# to the next, and the scratch memory is small; a GPU needs large operations.
_CPU_BLOCK = 1 << 15
_GPU_BLOCK = 1 << 24


# `wide_dtype`, which takes long to compute, from a table.
cached_wide_dtype = cache(wide_dtype)


def blocks(data: Array, *others: Array) -> Iterator[tuple[Array, ...]]:
    """Cut C-contiguous arrays of one size into matching blocks, and add a scratch block.

    A complex number is cut into two real ones, its real and its imaginary part.

    Yields:
        (scratch, block of data, block of each other array), one-dimensional. The scratch block is
        the same memory each time, of the dtype of `data`, with arbitrary content.
    """
    xp = namespace_of(data)
    flat = [array.reshape(array.size) for array in (data, *others)]
    if data.dtype.kind == "c":
        flat = [array.view(array.real.dtype) for array in flat]
    count, limit = flat[0].size, _CPU_BLOCK if xp is np else _GPU_BLOCK
    for array in flat:
        if array.size != count:
            raise UsageError(f"blocks: the arrays have shapes {[array.shape for array in (data, *others)]}, not one.")
    scratch = xp.empty(min(count, limit), flat[0].dtype)
    if count <= limit:
        if count:
            yield (scratch, *flat)
        return
    for start in range(0, count, limit):
        parts = [array[start : start + limit] for array in flat]
        yield (scratch[: parts[0].size], *parts)


def update_blocks(
    data: Array, grad: Array, states: Sequence[Array], master: Array | None = None
) -> Iterator[tuple[Array, ...]]:
    """Cut a parameter's value, gradient and state into blocks for an update that changes value and state in place.

    Where the value is in half precision, the blocks of value and gradient are float32, and the value is rounded once,
    after the update of its block.

    Args:
        data: the value.
        grad: the gradient, which stays as it is.
        states: arrays of the optimizer's state, in single precision where the value is in half.
        master: the value in float32, which is updated instead of `data` and then rounded to it. An element of `data`
            that is not the rounded one of `master` was changed by somebody else since, and counts.

    Yields:
        (scratch, block of the value, block of the gradient, block of each state).
    """
    wide = cached_wide_dtype(data.dtype)
    if data.dtype == wide:
        return blocks(data, grad if grad.dtype == wide else grad.astype(wide), *states)
    return _half_blocks(data, grad, states, master)


def _half_blocks(
    data: Array, grad: Array, states: Sequence[Array], master: Array | None
) -> Iterator[tuple[Array, ...]]:
    xp, wide = namespace_of(data), cached_wide_dtype(data.dtype)
    for _, half, g, *rest in blocks(data, grad, *([] if master is None else [master]), *states):
        p = half.astype(wide) if master is None else rest.pop(0)
        if master is not None:
            _follow(p, half)
        yield (xp.empty(p.shape, p.dtype), p, g.astype(p.dtype, copy=False), *rest)
        half[...] = p


def _follow(master: Array, half: Array) -> None:
    """Take those elements of `half` that are not the rounded ones of `master`."""
    with np.errstate(over="ignore", invalid="ignore"):
        changed = master.astype(half.dtype) != half
    if changed.any():
        master[changed] = half[changed]
