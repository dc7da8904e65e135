"""Find the cheapest sequence of steps between two placements by a shortest-path search."""

from __future__ import annotations

import heapq
import itertools
from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache

from .local_shapes import Shape
from .placement import Placement, Placements, Replicate, Shard
from .redistribute_steps import RedistributeStep, elements_moved, steps_from


@dataclass(frozen=True, slots=True, kw_only=True)
class RedistributePlan:
    """The steps that change the placements of one array.

    Attributes:
        shape: shape of the global array.
        mesh_shape: shape of the mesh.
        steps: in the order in which they are to be done; empty if nothing changes.
    """

    shape: Shape
    mesh_shape: Shape
    steps: tuple[RedistributeStep, ...]

    def cost(self, itemsize: int = 1) -> int:
        """Return the bytes that the busiest rank sends (or receives, where that is more)."""
        return itemsize * sum(elements_moved(step, self.shape, self.mesh_shape) for step in self.steps)

    def describe(self, names: Sequence[str], itemsize: int) -> str:
        """Describe each step in one line, and the total in the last.

        Args:
            names: names of the mesh's axes.
            itemsize: bytes per element.
        """
        lines = [
            f"{step.kind:<14} axis {names[step.axis]!r}: {step.source} -> {step.target}, "
            f"{itemsize * elements_moved(step, self.shape, self.mesh_shape):,} bytes"
            for step in self.steps
        ]
        total = f"in all at most {self.cost(itemsize):,} bytes sent or received per rank"
        return "\n".join([*lines, total] if lines else ["nothing to do: the placements are equal"])


@lru_cache(maxsize=4096)
def plan_redistribute(source: Placements, target: Placements, shape: Shape, mesh_shape: Shape) -> RedistributePlan:
    """Find the steps from `source` to `target` that move the fewest bytes.

    It is the plan in which the busiest rank sends the fewest bytes; among equal plans the one with the fewest
    collectives, then the fewest steps. A plan may pass through placements that are in neither `source` nor `target`: on
    axes of 4 and 4, from (Shard(0), Replicate()) to (Replicate(), Shard(0)), for n elements:

        all_gather on axis 0; slice on 1                                      3/4 n
        slice on axis 1, to Shard(1); all_gather on 0; all_to_all on 1        3/16 n + 3/16 n

    No plan costs more than replicating the array and then slicing it, because the search covers that plan too. Every
    rank finds the same plan, because the search depends only on the arguments. A Partial stays as it is until it is
    reduced, and only an axis whose target is Partial gets a step to Partial.

    Args:
        source: placements now, checked.
        target: placements wanted, checked.
        shape: shape of the global array.
        mesh_shape: shape of the mesh.
    """
    choices = _choices(target, len(shape))
    count = itertools.count()  # breaks ties in the order of discovery, the same on every rank
    frontier: list[tuple[int, int, int, int, Placements, tuple[RedistributeStep, ...]]] = []
    heapq.heappush(frontier, (0, 0, 0, next(count), source, ()))
    visited: set[Placements] = set()
    while frontier:
        moved, collectives, length, _, placements, steps = heapq.heappop(frontier)
        if placements == target:
            return RedistributePlan(shape=shape, mesh_shape=mesh_shape, steps=steps)
        if placements in visited:
            continue
        visited.add(placements)
        for step in steps_from(placements, mesh_shape, choices):
            if step.after not in visited:
                item = (
                    moved + elements_moved(step, shape, mesh_shape),
                    collectives + step.kind.is_collective,
                    length + 1,
                    next(count),
                    step.after,
                    (*steps, step),
                )
                heapq.heappush(frontier, item)
    raise AssertionError("every placement can be reached through Replicate on all axes")


def _choices(target: Placements, ndim: int) -> list[list[Placement]]:
    """List the placements that a plan may give each axis: Replicate, any Shard, and the target."""
    common: list[Placement] = [Replicate(), *(Shard(dim) for dim in range(ndim))]
    return [common if end in common else [*common, end] for end in target]
