"""Every collective with more ranks than talk to each other at once: rings, trees, pairs."""

from __future__ import annotations

import numpy as np
import pytest

import ferro
from ferro_testing import run_ranks


def all_of_them(g):
    n, r = g.world_size, g.rank
    x = np.arange(n * 3, dtype=np.float64) + r
    total = np.arange(n * 3) * n + n * (n - 1) / 2
    assert (g.all_reduce(x) == total).all()
    assert (g.all_reduce(x, "mean") == total / n).all()
    assert np.allclose(g.all_reduce(x.astype(np.float16)), total, rtol=1e-3)
    large = np.full(70_000, float(r))
    assert (g.all_reduce(large) == n * (n - 1) / 2).all()
    assert (g.broadcast(x, n - 1) == np.arange(n * 3) + n - 1).all()
    assert (g.broadcast(large, n // 2) == n // 2).all()
    assert (g.all_gather(r) == np.arange(n)).all()
    sizes = [i % 3 for i in range(n)]
    gathered = g.all_gather(np.full(sizes[r], r), sizes=sizes)
    assert (gathered == np.repeat(np.arange(n), sizes)).all()
    assert (g.reduce_scatter(x) == total[3 * r : 3 * r + 3]).all()
    at_root = g.gather(np.array([r]), n - 1)
    assert at_root is None or (at_root == np.arange(n)).all()
    assert g.scatter(np.arange(n) if r == 1 % n else None, 1 % n)[0] == r
    at_root = g.reduce(x, n // 3)
    assert at_root is None or (at_root == total).all()
    assert (g.all_to_all(np.arange(n) + 100 * r) == np.arange(n) * 100 + r).all()
    g.barrier()
    assert g.all_gather_object({"r": r}) == [{"r": i} for i in range(n)]
    third = g.split(r % 3)
    return int(third.all_reduce(1)) == third.world_size


@pytest.mark.parametrize("world_size", [17, 33, 64])
def test_simulated(world_size):
    assert ferro.simulate(all_of_them, world_size) == [True] * world_size


def test_between_processes():
    assert run_ranks(all_of_them, 12, backend="gloo") == [True] * 12
