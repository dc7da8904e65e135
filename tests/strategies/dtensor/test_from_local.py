"""DTensor.from_local: parts make up an array, or every rank raises an error."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings

from ferro_strategies.dtensor import DTensor, Replicate, Shard

from .arrays_on_mesh import distributions, error_on_every_rank, on_mesh, random_dtensor

R, S0, S1 = Replicate(), Shard(0), Shard(1)


@settings(max_examples=20, deadline=None)
@given(distributions())
def test_from_local_finds_the_shape(case):
    mesh_shape, shape, placements, _ = case

    def check(mesh):
        x, _ = random_dtensor(mesh, placements, shape)
        y = DTensor.from_local(x.local, mesh, placements)
        assert y.shape == shape
        assert y.local is x.local

    on_mesh(mesh_shape, check)


@pytest.mark.parametrize(
    ("part", "placements", "rank"),
    [
        (lambda rank: np.zeros((2 + (rank == 1), 3)), [S0], 0),  # 7 rows: the first must have 3
        (lambda rank: np.zeros((2, 3 + (rank == 2))), [S0], 2),
        (lambda rank: np.zeros((2, 3 + (rank == 1))), [R], 1),
        (lambda rank: np.zeros((2, 3), np.float32 if rank == 2 else np.float64), [S0], 2),
        (lambda rank: np.zeros((2, 3, 1)[: 3 - (rank == 1)]), [S0], 1),
        (lambda rank: np.zeros((2, 3)[: 2 - (rank == 1)]), [S1], 1),  # which rank 1 has not
    ],
)
def test_parts_that_make_up_no_array_are_refused_on_every_rank(part, placements, rank):
    for message in error_on_every_rank((3,), lambda mesh: DTensor.from_local(part(mesh.parent.rank), mesh, placements)):
        assert f"rank {rank}, at ({rank},)" in message


def test_placements_that_differ_between_ranks_are_refused_on_every_rank():
    for message in error_on_every_rank(
        (2,), lambda mesh: DTensor.from_local(np.zeros(2), mesh, [S0 if mesh.parent.rank else R])
    ):
        assert "rank 1" in message
        assert "same placements" in message


def test_a_part_of_a_known_shape_is_checked_where_it_is():
    for message in error_on_every_rank((2,), lambda mesh: DTensor.from_local(np.zeros(2), mesh, [S0], shape=(9,))):
        assert "must be (5,)" in message or "must be (4,)" in message
