"""Trees of arrays as bytes, and back."""

from collections import OrderedDict, namedtuple

import ml_dtypes
import numpy as np
import pytest

import ferro
from ferro_strategies.nn.trees import leaves, structure
from ferro_strategies.pipeline.execution.packed_trees import check_leaf, pack_tree, unpack_tree

Pair = namedtuple("Pair", ["first", "second"])

TREES = {
    "tuple": (np.arange(6.0).reshape(2, 3), np.ones(3, np.int8)),
    "nested": {"x": [np.zeros((0, 2)), None], "mask": (np.array([True]),), 3: Pair(np.ones(1, np.complex64), "text")},
    "ordered": OrderedDict(b=np.ones((2, 1)).T, a=np.float32([1.5])),
    "half": [np.ones((), np.float16), np.ones(5, ml_dtypes.bfloat16)],
    "none": None,
    "numbers": (1, 2.5, True, float("inf")),
    "empty": (),
}


@pytest.mark.parametrize("name", TREES)
def test_a_tree_comes_out_as_it_went_in(name):
    tree = TREES[name]
    found = unpack_tree(pack_tree(tree))
    assert structure(found) == structure(tree)
    assert type(found) is type(tree)
    for one, other in zip(leaves(found), leaves(tree), strict=True):
        if isinstance(other, np.ndarray):
            assert (one.dtype, one.shape) == (other.dtype, other.shape)
            assert one.flags.aligned
            np.testing.assert_array_equal(one, other)
        else:
            assert (type(one), one) == (type(other), other)


def test_what_cannot_be_sent_is_named():
    local = namedtuple("local", ["a"])
    for tree, message in (
        ((object(),), "a object, which is neither an array nor None"),
        ((np.float32(1),), "a float32, which is neither"),
        ((np.array([object()]),), "object"),
        ((np.ma.masked_array([1.0], [True]),), "mask"),
        (local(np.ones(1)), r"namedtuple .*local cannot be sent .* not at the top level of module"),
        ({(1, 2): np.ones(1)}, r"a dict with the keys \[\(1, 2\)\] cannot be sent"),
    ):
        with pytest.raises(ferro.UsageError, match=message):
            pack_tree(tree)
    assert check_leaf(np.ones(1)) == check_leaf(None) == check_leaf(2) == ""


@pytest.mark.parametrize(
    "spoil",
    [
        lambda raw: raw[:4],
        lambda raw: np.zeros_like(raw),
        lambda raw: np.frombuffer(raw.tobytes().replace(b"tuple", b"tulip"), np.uint8),
        lambda raw: np.frombuffer(raw.tobytes().replace(b"float64", b"object0"), np.uint8),
        lambda raw: raw[:-64],
    ],
)
def test_bytes_that_are_no_tree_are_refused(spoil):
    with pytest.raises(ferro.CollectiveMismatch, match="no tree of arrays"):
        unpack_tree(spoil(pack_tree((np.ones(3), np.ones(3)))))


def test_an_unknown_namedtuple_is_refused():
    raw = pack_tree(Pair(np.ones(1), None)).tobytes()
    for name in (b'"Pear"', b'"Pair"'):
        changed = raw.replace(b'"Pair"', name).replace(Pair.__module__.encode(), b"x" * len(Pair.__module__))
        with pytest.raises(ferro.CollectiveMismatch, match="is not defined on this rank"):
            unpack_tree(np.frombuffer(changed, np.uint8))
