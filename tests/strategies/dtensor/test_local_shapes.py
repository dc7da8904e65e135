"""The slices of a global array that each rank holds."""

from __future__ import annotations

import itertools
import math

import numpy as np
from hypothesis import given
from hypothesis import strategies as st

from ferro.collectives.partition import even_sizes
from ferro_strategies.dtensor import Shard
from ferro_strategies.dtensor.local_shapes import local_slices, shard_slice

from .arrays_on_mesh import placement_changes

S0 = Shard(0)


@given(size=st.integers(0, 40), parts=st.integers(1, 9))
def test_slices_are_those_of_array_split(size, parts):
    expected = [piece.tolist() for piece in np.array_split(np.arange(size), parts)]
    assert [list(range(size))[shard_slice(size, parts, index)] for index in range(parts)] == expected
    assert list(even_sizes(size, parts)) == [len(piece) for piece in expected]


@given(placement_changes())
def test_shards_cover_an_array_once(case):
    mesh_shape, shape, placements, _ = case
    times = np.zeros(shape, int)
    for coordinate in itertools.product(*map(range, mesh_shape)):
        times[local_slices(shape, mesh_shape, placements, coordinate)] += 1
    copies = [n for n, one in zip(mesh_shape, placements, strict=True) if not isinstance(one, Shard)]
    assert (times == math.prod(copies)).all()


def test_the_first_axis_cuts_first():
    rows = [local_slices((7,), (2, 3), (S0, S0), coordinate)[0] for coordinate in itertools.product(range(2), range(3))]
    assert [list(range(7))[cut] for cut in rows] == [[0, 1], [2], [3], [4], [5], [6]]
