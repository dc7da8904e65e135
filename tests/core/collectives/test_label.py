"""Call: what ranks compare. Calls of one shape are shared, so numbering must leave them alone."""

import numpy as np
import pytest

from ferro.collectives.label import LABEL_BYTES, Call, array_call, uneven_call


@pytest.mark.parametrize(
    ("shape", "detail", "count"),
    [((), "shape scalar", 1), ((3,), "shape 3", 3), ((2, 3), "shape 2x3", 6), ((0, 4), "shape 0x4", 0)],
)
def test_a_call_tells_the_shape(shape, detail, count):
    call = array_call("all_reduce", np.dtype("f4"), shape, "mean", 2)
    assert call == Call("all_reduce", 0, "float32", count, "mean", 2, detail)


def test_a_call_with_sizes_leaves_this_ranks_rows_out():
    calls = [array_call("all_gather", np.dtype("f4"), (n, 3), sizes=(2, 5)) for n in (2, 5)]
    assert calls[0] == calls[1]
    assert calls[0] == Call("all_gather", dtype="float32", count=21, detail="sizes 2,5 of shape 3")


def test_an_uneven_call_tells_the_shape_of_rows():
    call = uneven_call("all_to_all", np.dtype("f4"), (3,))
    assert call == Call("all_to_all", dtype="float32", detail="uneven rows of shape 3")


def test_numbering_leaves_a_shared_call_alone():
    call = array_call("broadcast", np.dtype("i8"), (5,), root=1)
    numbered = call.numbered(7)
    assert numbered == Call("broadcast", 7, "int64", 5, "", 1, "shape 5")
    assert call.seq == 0
    assert numbered.label() == call.label()


@pytest.mark.parametrize(
    "other",
    [
        array_call("all_reduce", np.dtype("f8"), (2, 3), "sum"),
        array_call("all_reduce", np.dtype("f4"), (3, 2), "sum"),
        array_call("all_reduce", np.dtype("f4"), (2, 3), "max"),
        array_call("reduce", np.dtype("f4"), (2, 3), "sum", 0),
    ],
    ids=str,
)
def test_calls_that_differ_have_labels_that_differ(other):
    call = array_call("all_reduce", np.dtype("f4"), (2, 3), "sum")
    assert other.label() != call.label()
    assert len(other.label()) == LABEL_BYTES
    assert str(Call.from_label(other.label())) == str(other)
