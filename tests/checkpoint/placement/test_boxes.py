"""Boxes hold the elements that they are said to hold."""

from __future__ import annotations

import math

import numpy as np
from hypothesis import given
from hypothesis import strategies as st

from ferro_checkpoint.placement.boxes import Box, flat_boxes, whole_box

SHAPES = st.lists(st.integers(0, 4), max_size=4).map(tuple)


def elements(box, shape):
    """The flattened indices of a box's elements, in order."""
    return np.arange(math.prod(shape)).reshape(shape)[box.within(whole_box(shape))].reshape(-1).tolist()


@st.composite
def boxes_of(draw, shape):
    start = [draw(st.integers(0, size)) for size in shape]
    return Box(
        tuple(start), tuple(draw(st.integers(0, size - begin)) for size, begin in zip(shape, start, strict=True))
    )


@given(st.data(), SHAPES)
def test_a_flat_range_is_cut_into_boxes_in_order(data, shape):
    first = data.draw(st.integers(0, math.prod(shape)))
    last = data.draw(st.integers(first, math.prod(shape)))
    boxes = list(flat_boxes(shape, first, last))
    assert [place for box in boxes for place in elements(box, shape)] == list(range(first, last))
    assert len(boxes) <= max(1, 2 * len(shape) - 1)
    assert all(box.consecutive(shape) is not None for box in boxes)


@given(st.data(), SHAPES)
def test_consecutive_elements_are_known(data, shape):
    box = data.draw(boxes_of(shape))
    found, places = box.consecutive(shape), elements(box, shape)
    if places and places == list(range(places[0], places[0] + len(places))):
        assert found == (places[0], places[0] + len(places))
    elif places:
        assert found is None


@given(st.data(), SHAPES)
def test_two_boxes_meet_in_their_common_elements(data, shape):
    one, two = data.draw(boxes_of(shape)), data.draw(boxes_of(shape))
    both = one.meet(two)
    assert sorted({*elements(one, shape)} & {*elements(two, shape)}) == (elements(both, shape) if both else [])
    if both:
        array = np.arange(math.prod(shape)).reshape(shape)
        own = array[one.within(whole_box(shape))]
        assert own[both.within(one)].reshape(-1).tolist() == elements(both, shape)
