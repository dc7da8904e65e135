"""DTensors on simulated meshes for tests, each with the whole array to compare with."""

from __future__ import annotations

import itertools
import math
from collections import defaultdict
from contextlib import contextmanager

import numpy as np
import pytest
from hypothesis import strategies as st

from ferro import UsageError, simulate
from ferro_strategies.dtensor import DTensor, Partial, Replicate, Shard
from ferro_strategies.dtensor.local_shapes import local_shape, local_slices
from ferro_strategies.mesh import DeviceMesh

REDUCE = {"sum": np.add, "prod": np.multiply, "max": np.maximum, "min": np.minimum}
NAMES = ("dp", "tp", "pp")
MESHES = ((1,), (2,), (3,), (4,), (2, 2), (2, 3), (3, 2), (1, 3), (2, 1))


def on_mesh(mesh_shape, function, *, observers=()):
    """Run `function(mesh)` on every rank of a simulated mesh; return the results by rank."""

    def run(group):
        return function(DeviceMesh(mesh_shape, NAMES[: len(mesh_shape)], group))

    return simulate(run, int(np.prod(mesh_shape)), observers=observers, timeout_s=20, run_timeout_s=60)


def error_on_every_rank(mesh_shape, function, error=UsageError):
    """Return every rank's message; every rank must raise, and the group must stay usable."""

    def check(mesh):
        with pytest.raises(error) as caught:
            function(mesh)
        mesh.parent.barrier()
        return str(caught.value)

    return on_mesh(mesh_shape, check)


def random_dtensor(mesh, placements, shape, seed=0, dtype=np.float64, low=-3, high=4):
    """Return a DTensor of small integers, and the whole array, computed in one process.

    On Partial axes every rank draws numbers of its own; the whole array is their reduction.
    """
    partial = [axis for axis, one in enumerate(placements) if isinstance(one, Partial)]
    whole, own = None, None
    for at in itertools.product(*(range(mesh.shape[axis]) for axis in partial)):
        rng = np.random.default_rng([seed, *at])
        part = np.asarray(rng.integers(low, high, shape)).astype(dtype)
        if part.dtype.kind == "c":
            part = part + np.asarray(1j * rng.integers(low, high, shape)).astype(dtype)
        if at == tuple(mesh.coordinates[axis] for axis in partial):
            own = part
        whole = part if whole is None else np.asarray(REDUCE[placements[partial[0]].op](whole, part))
    local = expected_local(mesh, placements, own).copy()
    return DTensor.from_local(local, mesh, placements, shape=shape), whole


def expected_local(mesh, placements, whole):
    """Return this rank's part of an array that is Partial on no axis."""
    slices = local_slices(whole.shape, mesh.shape, placements, mesh.coordinates)
    return whole[(*slices, ...)]


def assert_equal(x, expected):
    """Compare a DTensor with the whole array: shape, dtype and values, on every rank."""
    expected = np.asarray(expected)
    assert (x.shape, x.dtype) == (expected.shape, expected.dtype)
    near = 1e-6 if expected.dtype == np.float32 else 1e-12
    np.testing.assert_allclose(x.full_tensor(), expected, rtol=near, atol=near)


def unless_misplaced(call):
    """Return a call's result, or None if all ranks raise that placements do not fit."""
    try:
        return call()
    except UsageError as error:
        if "edistribute" not in str(error):
            raise
        return None


def expected_collectives(plan, coordinates, itemsize):
    """Return each collective of a plan with the bytes of the rank's buffer.

    The buffer is the one that observers are told of: the array gathered, reduced or sent.
    """
    return [
        (
            str(step.kind),
            itemsize
            * math.prod(
                local_shape(
                    plan.shape, plan.mesh_shape, step.after if step.kind == "all_gather" else step.before, coordinates
                )
            ),
        )
        for step in plan.steps
        if step.kind.is_collective
    ]


any_shape = st.lists(st.integers(0, 6), max_size=3).map(tuple)


def placement_tuples(mesh_shape, ndim, *, op="sum", partial=True):
    """Draw placements for an array of so many dims."""
    kinds = [Replicate(), *(Shard(dim) for dim in range(ndim))]
    if partial:
        kinds.append(Partial(op))
    return st.tuples(*(st.sampled_from(kinds) for _ in mesh_shape))


@st.composite
def operands(draw, shapes):
    """Draw a mesh, and placements for each shape of `shapes`."""
    mesh_shape = draw(st.sampled_from(MESHES))
    shapes = draw(shapes)
    return mesh_shape, [(shape, draw(placement_tuples(mesh_shape, len(shape)))) for shape in shapes]


@st.composite
def distributions(draw):
    """Draw a mesh, a shape, placements, and the source rank or None."""
    mesh_shape = draw(st.sampled_from(MESHES))
    shape = tuple(draw(st.lists(st.integers(0, 6), max_size=3)))
    op = draw(st.sampled_from(["sum", "prod", "max"]))
    placements = draw(placement_tuples(mesh_shape, len(shape), op=op))
    source = draw(st.none() | st.integers(0, int(np.prod(mesh_shape)) - 1))
    return mesh_shape, shape, placements, source


@st.composite
def placement_changes(draw):
    """Draw the shapes of a mesh and an array, and placements before and after."""
    mesh_shape = tuple(draw(st.lists(st.integers(1, 4), min_size=1, max_size=3)))
    shape = tuple(draw(st.lists(st.integers(0, 7), max_size=3)))
    op = draw(st.sampled_from(["sum", "max"]))
    kinds = [Replicate(), Partial(op), *(Shard(dim) for dim in range(len(shape)))]
    placements = st.tuples(*(st.sampled_from(kinds) for _ in mesh_shape))
    return mesh_shape, shape, draw(placements), draw(placements)


class CollectiveLog:
    """An observer that keeps, for each rank, the collectives and bytes of its `recording`."""

    def __init__(self):
        self.calls = defaultdict(list)
        self._ranks = set()

    @contextmanager
    def recording(self, mesh):
        self._ranks.add(mesh.parent.rank)
        yield
        self._ranks.discard(mesh.parent.rank)

    def started(self, event):
        if event.global_rank in self._ranks:
            self.calls[event.global_rank].append((event.op, event.nbytes))

    def finished(self, event):
        pass

    def close(self):
        pass
