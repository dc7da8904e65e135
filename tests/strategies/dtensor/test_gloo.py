"""DTensor between real processes over gloo: a tensor-parallel step equal to one process's."""

from __future__ import annotations

import numpy as np

from ferro_strategies.dtensor import Partial, Replicate, Shard, distribute
from ferro_strategies.mesh import DeviceMesh
from ferro_testing import run_ranks

R, S0, S1, P = Replicate(), Shard(0), Shard(1), Partial()


def whole_arrays():
    rng = np.random.default_rng(7)
    return rng.standard_normal((9, 5)), rng.standard_normal((5, 7)), rng.standard_normal((7, 5))


def compute(x, up, down):
    return np.tanh(x @ up) @ down


def on_a_mesh(group):
    mesh = DeviceMesh((2, 2), ("dp", "tp"), group)
    x, up, down = whole_arrays()
    first = group.rank == 0
    x = distribute(x if first else None, mesh, (S0, R), source=0)
    y = compute(x, distribute(up, mesh, (R, S1)), distribute(down, mesh, (R, S0)))
    assert y.placements == (S0, P)
    moved = y.redistribute((S1, S0)).redistribute((S0, S0))
    return moved.local, moved.full_tensor(), float(y.mean())


def test_a_step_equals_that_of_one_process():
    expected = compute(*whole_arrays())
    results = run_ranks(on_a_mesh, 4, backend="gloo")
    parts = [part for half in np.array_split(expected, 2) for part in np.array_split(half, 2)]
    for (local, full, mean), part in zip(results, parts, strict=True):
        np.testing.assert_allclose(local, part, rtol=1e-12)
        np.testing.assert_allclose(full, expected, rtol=1e-12)
        assert abs(mean - expected.mean()) < 1e-12
