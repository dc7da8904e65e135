"""Arrays for the DTensor tests: every rank's part of one, and the whole to compare with."""

from __future__ import annotations

import itertools
import math
from collections import defaultdict

import numpy as np
from hypothesis import strategies as st

from ferro import simulate
from ferro_strategies.dtensor import DTensor, Partial, Replicate, Shard
from ferro_strategies.dtensor.layout import local_shape, local_slices
from ferro_strategies.mesh import DeviceMesh

REDUCE = {"sum": np.add, "prod": np.multiply, "max": np.maximum, "min": np.minimum}
NAMES = ("dp", "tp", "pp")
MESHES = ((1,), (2,), (3,), (4,), (2, 2), (2, 3), (3, 2), (1, 3), (2, 1))


def on_mesh(mesh_shape, function, *, observers=()):
    """Run `function(mesh)` on every rank of a simulated mesh; return the results by rank."""

    def run(group):
        return function(DeviceMesh(mesh_shape, NAMES[: len(mesh_shape)], group))

    return simulate(
        run, int(np.prod(mesh_shape)), observers=observers, timeout_s=20, run_timeout_s=60
    )


def spread(mesh, placements, shape, seed=0, dtype=np.float64, low=-3, high=4):
    """Return a DTensor of small whole numbers and, computed otherwise, the array that it is.

    On Partial axes every rank has numbers of its own, which are reduced here in one process.
    """
    partial = [axis for axis, one in enumerate(placements) if isinstance(one, Partial)]
    whole, own = None, None
    for place in itertools.product(*(range(mesh.shape[axis]) for axis in partial)):
        rng = np.random.default_rng([seed, *place])
        part = np.asarray(rng.integers(low, high, shape)).astype(dtype)
        if place == tuple(mesh.coordinates[axis] for axis in partial):
            own = part
        whole = (
            part if whole is None else np.asarray(REDUCE[placements[partial[0]].op](whole, part))
        )
    cut = local_slices(shape, mesh.shape, placements, mesh.coordinates)
    local = own[(*cut, ...)].copy()
    return DTensor.from_local(local, mesh, placements, shape=shape), whole


def held(mesh, placements, whole):
    """Return what this rank must have of an array so placed, if no axis is Partial."""
    cut = local_slices(whole.shape, mesh.shape, placements, mesh.coordinates)
    return whole[(*cut, ...)]


def buffers(way, coordinate, itemsize):
    """Return each collective of a plan, with the bytes of a rank's buffer: what is gathered,
    reduced or sent, as an observer is told."""
    return [
        (
            str(step.how),
            itemsize
            * math.prod(
                local_shape(
                    way.shape,
                    way.mesh_shape,
                    step.after if step.how == "all_gather" else step.before,
                    coordinate,
                )
            ),
        )
        for step in way.steps
        if step.how.is_collective
    ]


def placement_tuples(mesh_shape, ndim, *, op="sum", partial=True):
    """Draw placements for an array of so many dims."""
    kinds = [Replicate(), *(Shard(dim) for dim in range(ndim))]
    if partial:
        kinds.append(Partial(op))
    return st.tuples(*(st.sampled_from(kinds) for _ in mesh_shape))


class Watch:
    """An observer that keeps, for each rank, collectives and their bytes while it looks."""

    def __init__(self):
        self.seen = defaultdict(list)
        self.looking = set()

    def started(self, event):
        if event.global_rank in self.looking:
            self.seen[event.global_rank].append((event.op, event.nbytes))

    def finished(self, event):
        pass

    def close(self):
        pass
