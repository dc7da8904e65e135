"""The codec: MessagePack as others speak it, and nothing that hostile bytes can break."""

import contextlib
import enum
import math
import struct
import tracemalloc

import ml_dtypes
import msgpack
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as npst

from ferro.errors import UsageError
from ferro.group.codec import MAX_DEPTH, decode, encode

NUMBERS = st.integers(-(2**63), 2**64 - 1) | st.floats(allow_nan=False)
LEAVES = st.none() | st.booleans() | NUMBERS | st.text(max_size=40) | st.binary(max_size=40)
VALUES = st.recursive(
    LEAVES,
    lambda inner: st.lists(inner, max_size=6) | st.dictionaries(st.text(max_size=5), inner, max_size=6),
    max_leaves=20,
)
DTYPES = npst.boolean_dtypes() | npst.integer_dtypes() | npst.unsigned_integer_dtypes()
DTYPES |= npst.floating_dtypes() | npst.complex_number_dtypes()
ARRAYS = npst.arrays(DTYPES, npst.array_shapes(min_dims=0, min_side=0, max_side=4))
few = settings(max_examples=60, deadline=None, database=None)


@few
@given(VALUES)
def test_values_come_back(value):
    assert decode(encode(value)) == value


@few
@given(VALUES)
def test_the_real_library_reads_what_is_written(value):
    assert msgpack.unpackb(encode(value), strict_map_key=False) == value


@few
@given(VALUES)
def test_what_the_real_library_writes_is_read(value):
    assert decode(msgpack.packb(value)) == value


@few
@given(ARRAYS)
def test_arrays_come_back_in_this_machines_byte_order(array):
    found = decode(encode(array))
    assert found.dtype == array.dtype.newbyteorder("=")
    assert found.shape == array.shape
    np.testing.assert_array_equal(found, array)
    assert found.flags.writeable


@pytest.mark.parametrize("size", [0, 15, 16, 31, 32, 255, 256, 65_535, 65_536])
def test_every_length_of_header_is_read(size):
    for value in ("x" * size, b"x" * size, [None] * size, dict.fromkeys(range(size))):
        assert decode(msgpack.packb(value)) == value
        assert decode(encode(value)) == value


def test_values_of_other_types_become_plain_ones():
    color = enum.StrEnum("color", {"RED": "red"})
    value = {
        "tuple": (1, (2,)),
        "complex": 1 - 2j,
        "numpy": [np.int16(-3), np.float32(0.5), np.bool_(True), np.complex64(1j)],
        "bytes": [bytearray(b"a"), memoryview(b"b")],
        "enum": color.RED,
        3: None,
        b"key": 1.5,
        1j: "complex keys",
    }
    assert decode(encode(value)) == {
        "tuple": [1, [2]],
        "complex": 1 - 2j,
        "numpy": [-3, 0.5, True, 1j],
        "bytes": [b"a", b"b"],
        "enum": "red",
        3: None,
        b"key": 1.5,
        1j: "complex keys",
    }
    half = np.arange(6, dtype=ml_dtypes.bfloat16).reshape(2, 3)[:, ::2]
    for array in (half, half[:0], half[0, 0:1].reshape(())):
        back = decode(encode({"a": array}))["a"]
        assert (back.dtype, back.shape, back.tolist()) == (array.dtype, array.shape, array.tolist())
    assert math.isnan(decode(encode(math.nan)))
    assert decode(encode([math.inf, -0.0])) == [math.inf, -0.0]


def nested(depth):
    value = 1
    for _ in range(depth):
        value = [value]
    return value


@pytest.mark.parametrize(
    ("value", "words"),
    [
        (object(), "value is a object, which has no safe encoding"),
        ({"a": [1, {2}]}, r"value\['a'\]\[1\] is a set"),
        (len, "value is a builtin_function_or_method"),
        (np.ma.array([1]), r"value is a MaskedArray, whose mask would be lost: pass x.filled\(0\)"),
        ({"a": [np.ones((1, 1)).view(np.matrix)]}, r"value\['a'\]\[0\] is a matrix"),
        (np.array([None]), "array of object, which has no safe encoding"),
        (np.array(["a"]), "array of <U1"),
        (np.zeros(1, [("a", "i4")]), "no safe encoding"),
        ({(1, 2): 3}, r"key \(1, 2\) of value is a tuple"),
        ("\ud800", "value is a string that UTF-8 cannot hold"),
        (nested(MAX_DEPTH + 1), "nested deeper than 32 levels"),
    ],
    ids=lambda value: type(value).__name__,
)
def test_what_has_no_safe_form_is_refused_with_its_place(value, words):
    with pytest.raises(UsageError, match=words):
        encode(value)


@pytest.mark.parametrize(
    "value", [2**64, -(2**63) - 1, 1 << 100, -(1 << 127), 255 << 120, 10**5000], ids=int.bit_length
)
def test_integers_have_any_size(value):
    assert decode(encode(value)) == value
    assert decode(encode({value: value})) == {value: value}


def test_the_place_of_an_item_stays_short():
    value = {"k" * 1000: {10**5000: [object()]}}
    with pytest.raises(UsageError, match=r"large integer\)\]\[0\] is a object") as caught:
        encode(value)
    assert len(str(caught.value)) < 400


def test_keys_that_all_collide_are_refused():
    colliding = {index * (2**61 - 1): None for index in range(1, 200)}
    with pytest.raises(UsageError, match="too many have the same hash"):
        decode(encode(colliding))
    harmless = dict.fromkeys(range(-1000, 1000)) | {2**61 - 1 + index: None for index in range(20)}
    assert decode(encode(harmless)) == harmless


def test_the_deepest_value_passes():
    assert decode(encode(nested(MAX_DEPTH))) == nested(MAX_DEPTH)


def array(dtype, shape, data=b""):
    body = msgpack.packb(dtype) + msgpack.packb(shape) + data
    return struct.pack(">BIb", 0xC9, len(body), 1) + body


HOSTILE = {
    "nothing": b"",
    "bytes after the end": b"\xc0\xc0",
    "unused code": b"\xc1",
    "list of 4 billion": b"\xdd\xff\xff\xff\xff",
    "dict of 4 billion": b"\xdf\xff\xff\xff\xff",
    "list of lists of 4 billion": b"\xdd\xff\xff\xff\xff" * 20,
    "string of 4 GiB": b"\xdb\xff\xff\xff\xffabc",
    "bytes of 4 GiB": b"\xc6\xff\xff\xff\xffabc",
    "array of 4 GiB": b"\xc9\xff\xff\xff\xff\x01abc",
    "nested lists": b"\x91" * 10_000,
    "nested dicts": b"\x81\xc0" * 10_000,
    "no UTF-8": b"\xa2\xff\xfe",
    "list as key": b"\x81\x90\xc0",
    "dict as key": b"\x81\x80\xc0",
    "array as key": b"\x81" + array("|i1", [1], b"a") + b"\xc0",
    "unknown extension": b"\xc7\x01\x05a",
    "timestamp": msgpack.packb(msgpack.Timestamp(1)),
    "short complex": b"\xc7\x08\x02" + bytes(8),
    "array of objects": array("|O", [1], bytes(8)),
    "array of records": array("i4,i4", [1], bytes(8)),
    "dtype of code": array("(1,f8", [1], bytes(8)),
    "dtype of gigabytes": array("|V2000000000", [0]),
    "dtype of many": array("(1000000000,)f8", [0]),
    "no dtype": array(5, [1], bytes(8)),
    "no shape": array("<f8", 1, bytes(8)),
    "shape too large": array("<f8", [2], bytes(8)),
    "shape of a third": array("<f8", [1], bytes(3)),
    "shape beyond 64 bits": array("<f8", [2**64 - 1], bytes(8)),
    "shape of zeros": array("<f8", [0, 2**63], b""),
    "shape of fractions": array("<f8", [1.0], bytes(8)),
    "shape of infinity": array("<f8", [math.inf], bytes(8)),
    "shape of words": array("<f8", ["1"], bytes(8)),
    "shape of 100 dimensions": array("<f8", [1] * 100, bytes(8)),
    "array in a shape": array("<f8", [[1]], bytes(8)),
}


@pytest.mark.parametrize("data", HOSTILE.values(), ids=HOSTILE)
def test_hostile_bytes_are_refused_at_no_cost(data):
    tracemalloc.start()
    try:
        with pytest.raises(UsageError):
            decode(data)
        assert tracemalloc.get_traced_memory()[1] < 1 << 20
    finally:
        tracemalloc.stop()


@few
@given(VALUES | ARRAYS, st.data())
def test_a_value_that_is_cut_short_is_refused(value, data):
    whole = encode(value)
    cut = data.draw(st.integers(0, len(whole) - 1))
    with pytest.raises(UsageError):
        decode(whole[:cut])


@settings(max_examples=300, deadline=None, database=None)
@given(st.binary(max_size=60) | st.builds(array, st.text(max_size=8), VALUES, st.binary()))
def test_random_bytes_are_read_or_refused(data):
    with contextlib.suppress(UsageError):
        decode(data)
