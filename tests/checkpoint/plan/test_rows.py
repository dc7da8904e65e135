"""Rows are cut where the ranks that hold them change, also where pieces of ranks overlap."""

import numpy as np
import pytest

from ferro_checkpoint.errors import StateError
from ferro_checkpoint.plan.rows import _cut_at_all_ends, rows_of
from ferro_checkpoint.plan.agreement import Holdings


def holdings(sizes, pieces):
    """Arrays of these sizes, and pieces: number of the array, first element, one more than the last, rank."""
    columns = np.array(pieces, np.int64).reshape(-1, 4).T
    return Holdings(
        names=[f"model.{number}" for number in range(len(sizes))],
        dtypes=["F32"] * len(sizes),
        shapes=[(size,) for size in sizes],
        sizes=np.array(sizes, np.int64),
        itemsizes=np.full(len(sizes), 4),
        first_counts=np.zeros(len(sizes), bool),
        tensor=columns[0],
        lo=columns[1],
        hi=columns[2],
        rank=columns[3],
    )


def test_pieces_that_overlap_are_cut_at_each_others_ends():
    cut = _cut_at_all_ends(holdings([10, 0, 4], [(0, 0, 6, 0), (0, 6, 10, 1), (0, 0, 4, 2), (0, 4, 10, 3), (2, 0, 4, 1)]))
    assert np.array(cut).T.tolist() == [
        [0, 0, 4, 0],
        [0, 0, 4, 2],
        [0, 4, 6, 0],
        [0, 4, 6, 3],
        [0, 6, 10, 1],
        [0, 6, 10, 3],
        [2, 0, 4, 1],
    ]
