"""Values of any nesting come back through JSON as they were, and JSON of any nesting is read or refused."""

from __future__ import annotations

import contextlib

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from ferro_checkpoint.errors import StateError
from ferro_checkpoint.layout.json_text import read_json, write_json
from ferro_checkpoint.state.values import decode_value, encode_value

SPECIAL = st.sampled_from(
    ["$tuple", "$float", "$dict", "$by_rank", "$none", "$array", "$scalar", "$complex", "$tensor"]
)
KEYS = st.one_of(
    st.text(max_size=6), st.integers(), st.none(), st.binary(max_size=3), st.tuples(st.integers()), SPECIAL
)
LEAVES = st.one_of(
    st.none(),
    st.booleans(),
    st.integers(-(1 << 4000), 1 << 4000),
    st.floats(),
    st.text(),
    st.binary(),
    st.complex_numbers(),
)
VALUES = st.recursive(
    LEAVES,
    lambda inner: st.one_of(
        st.lists(inner, max_size=4), st.lists(inner, max_size=3).map(tuple), st.dictionaries(KEYS, inner, max_size=4)
    ),
    max_leaves=20,
)
NUMBERS = st.floats(allow_nan=False, allow_infinity=False)
JSON = st.recursive(
    st.one_of(st.none(), st.booleans(), st.integers(), NUMBERS, st.text(max_size=5)),
    lambda inner: st.one_of(
        st.lists(inner, max_size=4), st.dictionaries(st.one_of(st.text(max_size=3), SPECIAL), inner, max_size=3)
    ),
    max_leaves=12,
)


def same(one, other):
    """Compare values and their types, NaN and -0.0 by how they are written."""
    assert type(one) is type(other)
    if isinstance(one, dict):
        same(list(one), list(other))
        same(list(one.values()), list(other.values()))
    elif isinstance(one, list | tuple):
        assert len(one) == len(other)
        for item, of_other in zip(one, other, strict=True):
            same(item, of_other)
    else:
        assert repr(one) == repr(other)


@settings(max_examples=100, deadline=None)
@given(VALUES)
def test_values_come_back(value):
    try:
        written = write_json(encode_value(value, "x"))
    except StateError as error:
        assert "no text that can be stored" in str(error)  # noqa: PT017 - the text has half of a surrogate pair
        return
    same(decode_value(read_json(written)), value)


@settings(max_examples=100, deadline=None)
@given(JSON)
def test_any_json_is_read_or_refused(value):
    with contextlib.suppress(ValueError):
        decode_value(value)


class Unnamed(int):
    """A key that cannot be written into a name."""

    def __format__(self, how):
        raise AssertionError("a name was made of it")


def test_names_are_made_for_errors_alone():
    assert encode_value({Unnamed(1): [1, 2.5, None]}, "x") == {"$dict": [[1, [1, 2.5, None]]]}
    with pytest.raises(StateError, match=r"^'x\.a\.1\.2\.b' is a set, which"):
        encode_value({"a": [1, (2, 3, {"b": {1}})]}, "x")
    with pytest.raises(StateError, match=r"^'x\.0\.1' is a number of 5001 bits"):
        encode_value([[1, 1 << 5000]], "x")
