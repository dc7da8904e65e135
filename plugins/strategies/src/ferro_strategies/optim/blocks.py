"""Updates block by block: blocks of matching arrays, in single precision for parameters in half precision."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import numpy as np

from ferro.errors import UsageError

from ..nn.arrays import Array, namespace_of, wide_dtype

# An update works on blocks of this many elements. On a CPU a block of each array stays in the cache from one operation
# to the next, and the scratch memory is small; a GPU needs large operations.
_CPU_BLOCK = 1 << 15
_GPU_BLOCK = 1 << 24


def blocks(data: Array, *others: Array) -> Iterator[tuple[Array, ...]]:
    """Cut C-contiguous arrays of one size into matching blocks, and add a scratch block.

    A complex number is cut into two real ones, its real and its imaginary part.

    Yields:
        (scratch, block of data, block of each other array), one-dimensional. The scratch block is
        the same memory each time, of the dtype of `data`, with arbitrary content.
    """
    xp = namespace_of(data)
    flat = [_flat(array) for array in (data, *others)]
    count = flat[0].size
    if any(array.size != count for array in flat):
        raise UsageError(f"blocks: the arrays have shapes {[array.shape for array in (data, *others)]}, not one.")
    size = min(count, _CPU_BLOCK if xp is np else _GPU_BLOCK)
    scratch = xp.empty(size, flat[0].dtype)
    for start in range(0, count, max(size, 1)):
        parts = [array[start : start + size] for array in flat]
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
    wide = wide_dtype(data.dtype)
    if data.dtype == wide:
        if grad.dtype == wide:
            yield from blocks(data, grad, *states)
            return
        grad = grad.astype(wide)
    xp = namespace_of(data)
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


def _flat(array: Array) -> Array:
    flat = array.reshape(array.size)
    return flat.view(flat.real.dtype) if flat.dtype.kind == "c" else flat
