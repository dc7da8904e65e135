"""DistributedGenerator: random DTensors with the numbers of one process, whatever the mesh and the placements."""

from __future__ import annotations

import hashlib
import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np
import numpy.typing as npt

from ferro import UsageError

from ..mesh import DeviceMesh
from ..nn.arrays import Array, Rng
from .agreement import gather_by_coordinates
from .local_shapes import Shape, local_slices, shape_of
from .placed_array import PlacedArray, coordinates_in
from .placement import Partial, Placement, Replicate, checked_placements
from .redistribute import redistribute
from .tensor import DTensor

_BLOCK = 2**20  # elements that are drawn at a time


class DistributedGenerator:
    """A random generator on a mesh, whose arrays are those of numpy.random.default_rng(seed) in one process.

    rng = DistributedGenerator(7, mesh)
    rng.normal((1000, 64), (Shard(0),))         # the rows of numpy.random.default_rng(7).normal(size=(1000, 64))

    Every rank draws all numbers, a block at a time, and keeps its part: this takes the time of one process, and memory
    for the part and a block. All ranks of the mesh make the generator together, and draw the same arrays in the same
    order; drawing sends nothing.

    Args:
        seed: a seed, or a generator, in the same state on every rank, which is used and changed.
        mesh: the ranks.

    Attributes:
        generator: NumPy's generator; it is where that of one process would be.
        mesh: as given.

    Raises:
        UsageError: there is no seed, or the ranks gave different ones. Every rank raises it.
    """

    def __init__(self, seed: Rng, mesh: DeviceMesh) -> None:
        self.generator = np.random.default_rng(seed)
        self.mesh = mesh
        state = "" if seed is None else hashlib.sha256(repr(self.generator.bit_generator.state).encode()).hexdigest()
        states = gather_by_coordinates(state, mesh) if mesh.coordinates is not None else {}
        if seed is None or len(set(states.values())) > 1:
            raise UsageError(
                f"DistributedGenerator: the ranks of {mesh!r} have different seeds, or None. Give all the same number, "
                "or generators in the same state.",
                op="DistributedGenerator",
            )

    def state_dict(self) -> dict[str, Any]:
        """Copy the generator's state, the same on every rank."""
        return dict(self.generator.bit_generator.state)

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Go on from a saved state; all ranks load the same."""
        self.generator.bit_generator.state = dict(state)

    def random(
        self, shape: int | Sequence[int], placements: Sequence[Placement], *, dtype: npt.DTypeLike = np.float64
    ) -> DTensor:
        """Draw floating numbers from [0, 1)."""
        kind = np.dtype(dtype)
        return self._draw(shape, placements, kind, lambda size: self.generator.random(size, dtype=kind))  # type: ignore[arg-type]

    def uniform(
        self, shape: int | Sequence[int], placements: Sequence[Placement], *, low: float = 0.0, high: float = 1.0
    ) -> DTensor:
        """Draw floating numbers from [low, high)."""
        kind = np.dtype(np.float64)
        return self._draw(shape, placements, kind, lambda size: self.generator.uniform(low, high, size))

    def normal(
        self, shape: int | Sequence[int], placements: Sequence[Placement], *, loc: float = 0.0, scale: float = 1.0
    ) -> DTensor:
        """Draw from the normal distribution with this mean and standard deviation."""
        kind = np.dtype(np.float64)
        return self._draw(shape, placements, kind, lambda size: self.generator.normal(loc, scale, size))

    def integers(
        self, shape: int | Sequence[int], placements: Sequence[Placement], *, low: int, high: int,
        dtype: npt.DTypeLike = np.int64,
    ) -> DTensor:  # fmt: skip
        """Draw integers from low to high - 1."""
        kind = np.dtype(dtype)
        return self._draw(shape, placements, kind, lambda size: self.generator.integers(low, high, size, dtype=kind))

    def _draw(
        self,
        shape: int | Sequence[int],
        placements: Sequence[Placement],
        dtype: np.dtype,
        draw: Callable[[Shape], object],
    ) -> DTensor:
        whole = shape_of(shape)
        target = checked_placements(placements, self.mesh.ndim, len(whole), "DistributedGenerator")
        full = tuple(Replicate() if isinstance(one, Partial) else one for one in target)
        slices = local_slices(whole, self.mesh.shape, full, coordinates_in(self.mesh))
        local = np.empty(tuple(part.stop - part.start for part in slices), dtype)
        rows = whole[0] if whole else 1
        # NumPy draws several small integers from one number of its generator, and forgets the rest after each call.
        block = rows if dtype.itemsize < 4 else max(1, _BLOCK // max(1, math.prod(whole[1:])))
        for start in range(0, rows, max(1, block)):
            drawn = np.asarray(draw((min(block, rows - start), *whole[1:]) if whole else ()))
            _keep_part(local, drawn, start, slices)
        placed = PlacedArray(local=local, mesh=self.mesh, shape=whole, placements=full)
        return DTensor(redistribute(placed, target))


def _keep_part(local: Array, drawn: Array, start: int, slices: tuple[slice, ...]) -> None:
    """Copy what this rank holds of some rows of the array, beginning with row `start`."""
    if not slices:
        local[...] = drawn
        return
    first, last = max(start, slices[0].start), min(start + len(drawn), slices[0].stop)
    if first < last:
        rows = drawn[(slice(first - start, last - start), *slices[1:])]
        local[first - slices[0].start : last - slices[0].start] = rows
