"""Random DTensors, and DTensors of one value."""

from __future__ import annotations

import numpy as np

from ferro_strategies.dtensor import DistributedGenerator, DTensor, Partial, Replicate, Shard, random_arrays

from .arrays_on_mesh import assert_equal, error_on_every_rank, on_mesh

R, S0, S1, P = Replicate(), Shard(0), Shard(1), Partial()


def test_numbers_are_those_of_one_process_for_any_placements(monkeypatch):
    monkeypatch.setattr(random_arrays, "_BLOCK", 7)

    def check(mesh):
        for placements in ([S0, S1], [S0, S0], [R, P]):
            rng, one_process = DistributedGenerator(5, mesh), np.random.default_rng(5)
            for shape in ((5, 4, 3), (0, 2), (7, 1)):
                assert_equal(rng.normal(shape, placements, loc=2), one_process.normal(2, 1, shape))
                assert_equal(rng.random(shape, placements, dtype=np.float32), one_process.random(shape, np.float32))
                small = rng.integers(shape, placements, low=0, high=9, dtype=np.int8)
                assert_equal(small, one_process.integers(0, 9, shape, np.int8))
                assert_equal(rng.uniform(shape, placements, high=3), one_process.uniform(0, 3, shape))
                assert_equal(rng.integers(shape, placements, low=0, high=9), one_process.integers(0, 9, shape))

    on_mesh((2, 3), check)


def test_seeds_that_differ_are_an_error_on_every_rank():
    for message in error_on_every_rank((2,), lambda mesh: DistributedGenerator(mesh.parent.rank, mesh)):
        assert "different seeds" in message
    error_on_every_rank((2,), lambda mesh: DistributedGenerator(None, mesh))


def test_arrays_of_one_value():
    def check(mesh):
        for placements in ([S0], [R], [P], [Partial("max")]):
            assert_equal(DTensor.zeros((np.int64(5), 2), mesh, placements), np.zeros((5, 2)))
            assert_equal(DTensor.ones(np.int64(5), mesh, placements, np.int8), np.ones(5, np.int8))
            assert_equal(DTensor.arange(9, mesh, placements, start=1, step=2), np.arange(1, 9, 2))
            assert_equal(DTensor.full((5,), 3, mesh, placements), np.full(5, 3))

    on_mesh((3,), check)
