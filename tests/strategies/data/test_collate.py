"""collate: trees of arrays of trees."""

from collections import namedtuple

import numpy as np
import pytest

from ferro import UsageError
from ferro_strategies.data import collate

Pair = namedtuple("Pair", "left right")


def test_items_are_stacked_part_by_part():
    items = [
        {"x": np.ones(2) * i, "pair": Pair(i, (np.float32(i), "ab"[i])), "none": None, "list": [i]} for i in (0, 1)
    ]
    batch = collate(items)
    assert batch["x"].tolist() == [[0, 0], [1, 1]]
    assert isinstance(batch["pair"], Pair)
    assert batch["pair"].left.tolist() == [0, 1]
    assert batch["pair"].right[0].dtype == np.float32
    assert batch["pair"].right[1] == ["a", "b"]
    assert batch["none"] == [None, None]
    assert batch["list"][0].tolist() == [0, 1]


@pytest.mark.parametrize(
    ("items", "words"),
    [
        ([np.ones(2), np.ones(3)], r"item has not the same shape \(\(2,\), \(3,\)\) in all items"),
        ([{"x": 1}, {"y": 1}], "item has not the same keys"),
        ([(1, 2), (1,)], "item has not the same length"),
        ([{"x": object()}], r"item\['x'\] is a object"),
        ([(np.ma.array([1.0, 2.0], mask=[0, 1]), 1)], r"item\[0\] is a MaskedArray, whose mask would be lost"),
    ],
)
def test_items_that_do_not_fit_are_refused(items, words):
    with pytest.raises(UsageError, match=words):
        collate(items)
