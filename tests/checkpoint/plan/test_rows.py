"""Rows are cut where the ranks that hold them change, also where pieces of ranks overlap."""

import numpy as np
import pytest

from ferro_checkpoint.errors import StateError
from ferro_checkpoint.plan.agreement import Holdings
from ferro_checkpoint.plan.file_layout import layout_files
from ferro_checkpoint.plan.rows import HEADER, rows_of


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


def rows(sizes, pieces):
    """Each row of an array: the array's number, first element, one more than the last, and the ranks that hold it."""
    held = holdings(sizes, pieces)
    layout = layout_files(held, 1 << 20)
    found = rows_of(held, layout, 4)
    listed = []
    for row, number in enumerate(found.tensor.tolist()):
        if number != HEADER:
            lo, hi = ((int(edge[row]) - int(layout.addresses[number])) // 4 for edge in (found.begin, found.end))
            listed.append((number, lo, hi, found.of(row)))
    return sorted(listed)


def test_pieces_that_overlap_are_cut_at_each_others_ends():
    pieces = [(0, 0, 6, 0), (0, 6, 10, 1), (0, 0, 4, 2), (0, 4, 10, 3), (2, 0, 4, 1), (2, 0, 4, 0)]
    assert rows([10, 0, 4], pieces) == [(0, 0, 4, [0, 2]), (0, 4, 6, [0, 3]), (0, 6, 10, [1, 3]), (2, 0, 4, [0, 1])]


@pytest.mark.parametrize(
    ("pieces", "message"),
    [
        ([(0, 0, 4, 0), (0, 5, 10, 1)], "no rank holds its elements 4 to 4 of 10"),
        ([(0, 0, 4, 0), (0, 2, 9, 1)], "no rank holds its elements 9 to 9 of 10"),
        ([], "no rank holds its elements 0 to 9 of 10"),
    ],
)
def test_holes_are_refused(pieces, message):
    with pytest.raises(StateError, match=message):
        rows([10, 4], [*pieces, (1, 0, 4, 0)])
