"""plan: the cheapest way from placements to others, one axis at a time."""

from __future__ import annotations

import heapq
import itertools
from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache

from .layout import Shape
from .placement import Placement, Placements, Replicate, Shard
from .steps import Step, elements_moved, steps_from


@dataclass(frozen=True, slots=True, kw_only=True)
class Plan:
    """What changes the placements of one array.

    Attributes:
        shape: of the global array.
        mesh_shape: of the mesh.
        steps: in the order in which they are to be done; none where nothing changes.
    """

    shape: Shape
    mesh_shape: Shape
    steps: tuple[Step, ...]

    def cost(self, itemsize: int = 1) -> int:
        """Return the bytes that the busiest rank sends (or receives, where that is more)."""
        return itemsize * sum(
            elements_moved(step, self.shape, self.mesh_shape) for step in self.steps
        )

    def describe(self, names: Sequence[str], itemsize: int) -> str:
        """Return a line for each step, and the sum, for people.

        Args:
            names: of the mesh's axes.
            itemsize: bytes per element.
        """
        lines = [
            f"{step.how:<14} axis {names[step.axis]!r}: {step.source} -> {step.target}, "
            f"{itemsize * elements_moved(step, self.shape, self.mesh_shape):,} bytes"
            for step in self.steps
        ]
        total = f"in all at most {self.cost(itemsize):,} bytes sent or received per rank"
        return "\n".join([*lines, total] if lines else ["nothing to do: the placements are equal"])


@lru_cache(maxsize=4096)
def plan(source: Placements, target: Placements, shape: Shape, mesh_shape: Shape) -> Plan:
    """Return the steps from `source` to `target` that move least.

    Of all ways, the one in which the busiest rank sends the fewest bytes; of those the one with
    the fewest collectives, then steps. A way may lead over placements that are neither's: on
    axes of 4 and 4, from (Shard(0), Replicate()) to (Replicate(), Shard(0)), for n elements:

        all_gather on axis 0; slice on 1                                      3/4 n
        slice on axis 1, to Shard(1); all_gather on 0; all_to_all on 1        3/16 n + 3/16 n

    It is never worse than replicating all and then cutting, for that is one of the ways. All
    ranks find the same, for it follows from what is the same on all. Sums are left alone until
    they are reduced; zeros are added only where the target is a Partial.

    Args:
        source: placements now, checked.
        target: placements wanted, checked.
        shape: of the global array.
        mesh_shape: of the mesh.
    """
    choices = _choices(source, target, len(shape))
    count = itertools.count()  # equals are taken in the order found, the same on every rank
    waiting: list[tuple[int, int, int, int, Placements, tuple[Step, ...]]] = []
    heapq.heappush(waiting, (0, 0, 0, next(count), source, ()))
    done: set[Placements] = set()
    while waiting:
        moved, collectives, length, _, state, steps = heapq.heappop(waiting)
        if state == target:
            return Plan(shape=shape, mesh_shape=mesh_shape, steps=steps)
        if state in done:
            continue
        done.add(state)
        for step in steps_from(state, mesh_shape, choices):
            if step.after not in done:
                item = (
                    moved + elements_moved(step, shape, mesh_shape),
                    collectives + step.how.is_collective,
                    length + 1,
                    next(count),
                    step.after,
                    (*steps, step),
                )
                heapq.heappush(waiting, item)
    raise AssertionError("every placement can be reached through Replicate on all axes")


def _choices(source: Placements, target: Placements, ndim: int) -> list[list[Placement]]:
    """Return what each axis may be on the way: any shard, replicated, or what it shall be."""
    common: list[Placement] = [Replicate(), *(Shard(dim) for dim in range(ndim))]
    return [
        common if end in common else [*common, end] for _, end in zip(source, target, strict=True)
    ]
