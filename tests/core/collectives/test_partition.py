"""Sizes and buffers divided among ranks."""

import numpy as np
import pytest

from ferro.collectives.partition import blocks, even_sizes, near_equal


@pytest.mark.parametrize("total", [0, 1, 7, 40])
@pytest.mark.parametrize("parts", [1, 3, 9])
def test_even_sizes_are_those_of_array_split(total, parts):
    assert list(even_sizes(total, parts)) == [len(piece) for piece in np.array_split(np.arange(total), parts)]


@pytest.mark.parametrize("size", [0, 1, 5, 8])
@pytest.mark.parametrize("parts", [1, 3, 8])
def test_near_equal_cuts_everything_once(size, parts):
    buffer = np.arange(size)
    views = near_equal(buffer, parts)
    assert len(views) == parts
    np.testing.assert_array_equal(np.concatenate(views), buffer)
    sizes = {view.size for view in views}
    assert max(sizes) - min(sizes) <= 1


def test_blocks_are_views_of_the_given_sizes():
    buffer = np.arange(6)
    first, nothing, last = blocks(buffer, [2, 0, 4])
    assert (first.tolist(), nothing.tolist(), last.tolist()) == ([0, 1], [], [2, 3, 4, 5])
    last[...] = -1
    assert buffer.tolist() == [0, 1, -1, -1, -1, -1]
