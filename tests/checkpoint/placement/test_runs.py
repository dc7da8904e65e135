"""Runs of boxes and of flat parts of them are the elements that NumPy finds there."""

from __future__ import annotations

import math

import numpy as np
from hypothesis import given
from hypothesis import strategies as st

from ferro_checkpoint.placement.runs import box_runs


@st.composite
def pieces(draw):
    shape = tuple(draw(st.lists(st.integers(0, 6), max_size=4)))
    start = tuple(draw(st.integers(0, size)) for size in shape)
    extent = tuple(draw(st.integers(0, size - first)) for size, first in zip(shape, start, strict=True))
    box = math.prod(extent)
    first = draw(st.integers(0, box))
    flat = draw(st.none() | st.just((first, draw(st.integers(0, box - first)))))
    return shape, start, extent, flat


def expected(shape, start, extent, flat):
    indices = np.arange(math.prod(shape)).reshape(shape)
    box = indices[tuple(slice(a, a + n) for a, n in zip(start, extent, strict=True))].ravel()
    return box if flat is None else box[flat[0] : flat[0] + flat[1]]


def elements(runs):
    return [int(w) + k for w, n in zip(runs.whole, runs.count, strict=True) for k in range(n)]


@given(pieces())
def test_they_are_the_elements_in_order(piece):
    runs, wanted = box_runs(*piece), expected(*piece)
    assert elements(runs) == list(wanted)
    assert list(runs.local) == [sum(runs.count[:k]) for k in range(len(runs))]
    assert all(runs.count > 0)


@given(pieces(), st.integers(0, 1300), st.integers(0, 1300))
def test_a_part_of_the_whole_array(piece, first, last):
    part, wanted = box_runs(*piece).within(first, last), expected(*piece)
    assert elements(part) == [w for w in wanted if first <= w < last]
    for whole, local, count in zip(part.whole, part.local, part.count, strict=True):
        assert list(wanted[local : local + count]) == list(range(whole, whole + count))


def test_as_few_as_possible():
    assert len(box_runs((8, 5, 3), (2, 0, 0), (4, 5, 3), None)) == 1
    assert len(box_runs((8, 5, 3), (0, 1, 0), (8, 2, 3), None)) == 8
    assert len(box_runs((8, 5), (0, 1), (8, 2), (3, 6))) == 4
    assert len(box_runs((), (), (), None)) == 1
