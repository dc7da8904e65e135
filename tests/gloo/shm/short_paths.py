"""Short paths for tests: made as a group makes them, and called by themselves."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import ml_dtypes
import numpy as np

from ferro.collectives.reduction import reduction_for
from ferro.group.fast_calls import even_collective

REDUCTIONS = ("sum", "mean", "prod", "min", "max", "band", "bor", "bxor")
INTEGERS = ("int8", "int16", "int32", "int64", "uint8", "uint16", "uint32", "uint64", "bool")
FLOATS = ("float16", "bfloat16", "float32", "float64")
COMPLEX = ("complex64", "complex128")
OF_INTEGERS = ("sum", "prod", "min", "max", "band", "bor", "bxor")
OF_FLOATS = ("sum", "mean", "prod", "min", "max")
# What the native helper reduces: dtypes and reductions.
REDUCED = (
    [(dtype, reduction) for dtype in INTEGERS for reduction in OF_INTEGERS]
    + [(dtype, reduction) for dtype in FLOATS for reduction in OF_FLOATS]
    + [(dtype, reduction) for dtype in COMPLEX for reduction in ("sum", "mean")]
)
OPS = ("all_reduce", "reduce", "broadcast", "all_gather", "gather", "scatter", "reduce_scatter", "all_to_all")
ROOTED = ("reduce", "broadcast", "gather", "scatter")
REDUCING = ("all_reduce", "reduce", "reduce_scatter")
CUT = ("scatter", "reduce_scatter", "all_to_all")  # their input has a block for every rank


def dtype_of(name: str) -> np.dtype:
    return np.dtype(getattr(ml_dtypes, name, name))


_DRAWN = 65_521  # a prime, so that no two chunks or slots of a large array are equal


def numbers(dtype: np.dtype, size: int, seed: object) -> np.ndarray:
    """Draw numbers of all kinds: signs, zeros, infinities, NaN, and integers that overflow.

    A large array repeats them, for drawing takes longer than what is tested.
    """
    return np.resize(_draw(dtype, min(size, _DRAWN), seed), size)


def _draw(dtype: np.dtype, size: int, seed: object) -> np.ndarray:
    rng = np.random.default_rng(seed)
    if dtype.kind == "b":
        return rng.integers(0, 2, size).astype(dtype)
    if dtype.kind in "iu":
        return rng.integers(0, 256, size * dtype.itemsize, dtype=np.uint8).view(dtype)
    parts = 2 if dtype.kind == "c" else 1
    special = rng.choice([0.0, -0.0, np.inf, -np.inf, np.nan], size * parts)
    real = np.where(rng.random(size * parts) < 0.1, special, rng.standard_normal(size * parts) * 3)
    return real.view(np.complex128).astype(dtype) if parts == 2 else real.astype(dtype)


def expected(op: str, arrays: list[np.ndarray], rank: int, reduction: str | None, root: int) -> np.ndarray | None:
    """Compute a rank's result of a collective on all ranks' inputs."""
    n, start = len(arrays), arrays[0]
    if op in REDUCING:
        total = np.empty_like(start)
        reduction_for(str(reduction), start.dtype, n).into(total, arrays, at_once=True)
        if op == "reduce_scatter":
            return np.split(total, n)[rank]
        return total if op == "all_reduce" or rank == root else None
    if op == "broadcast":
        return arrays[root]
    if op in ("all_gather", "gather"):
        return np.concatenate(arrays) if op == "all_gather" or rank == root else None
    if op == "scatter":
        return np.split(arrays[root], n)[rank]
    return np.concatenate([np.split(array, n)[rank] for array in arrays])


def assert_same(got: np.ndarray | None, wanted: np.ndarray | None, what: str) -> None:
    """The same numbers; a zero, or NaN, may have another sign than NumPy's."""
    if wanted is None:
        return
    assert got is not None
    wide = np.float64 if wanted.dtype.name == "bfloat16" else wanted.dtype
    np.testing.assert_array_equal(got.astype(wide), wanted.astype(wide), err_msg=what)


@dataclass
class Short:
    """One kind of call in a group, on the short path and on the ordinary one."""

    group: Any
    op: str
    dtype: np.dtype
    size: int  # of the input on a rank that has one
    reduction: str | None = None
    root: int = -1

    def __post_init__(self) -> None:
        n = self.group.world_size
        found = even_collective(self.op, self.dtype, (self.size,), self.reduction, self.root, n)
        assert found is not None
        self.collective, shape = found
        self.result_size = int(np.prod(shape))
        self.path = self.group._dispatcher.fast_path(self.collective)
        at_root = self.group.rank == self.root or self.root < 0
        self.has_input = at_root or self.op not in ("broadcast", "scatter")
        self.has_result = at_root or self.op in ("broadcast", "scatter")

    def run(self, x: np.ndarray, *, in_place: bool = False) -> np.ndarray | None:
        """Take the short path."""
        out = None
        if self.has_result:
            same = in_place and self.has_input and x.size == self.result_size
            out = x if same else np.empty(self.result_size, self.dtype)
        assert self.path(x if self.has_input else None, out), "the short path declined"
        return out

    def run_ordinary(self, x: np.ndarray) -> np.ndarray | None:
        """Take the ordinary path, as every call with a timeout of its own does."""
        method = getattr(self.group, self.op)
        arguments: list[object] = [x]
        if self.root >= 0:
            arguments.append(self.root)
        if self.reduction is not None:
            arguments.append(self.reduction)
        if self.op == "scatter":  # without the broadcast that tells the sizes
            return self._scatter(x)
        return method(*arguments, timeout_s=60)

    def _scatter(self, x: np.ndarray) -> np.ndarray:
        block = np.empty(self.result_size, self.dtype)
        backend, n = self.group._backend, self.group.world_size

        def action(*, deadline: float) -> None:
            source = x if self.has_input else None
            backend.scatter(block, source, [self.result_size] * n, self.root, deadline=deadline)

        from ferro.types import Device

        return self.group._dispatcher.collective(
            self.collective.call, action, lambda: block, block.nbytes, Device.CPU, False, None
        )
