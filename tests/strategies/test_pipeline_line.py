"""What a pipeline's messages are made of: headers, and room for arrays."""

import sys
from types import SimpleNamespace

import ml_dtypes
import numpy as np
import pytest

import ferro
from ferro_strategies.pipeline.call import FORWARD, STEP, Call
from ferro_strategies.pipeline.header import HEADER_BYTES, Header, decode, encode
from ferro_strategies.pipeline.line import Line

CALL = Call(STEP, 4)


@pytest.mark.parametrize("dtype", ["float64", "int8", "bool", "complex64", "bfloat16", "uint64"])
@pytest.mark.parametrize("shape", [(), (0,), (3, 0, 2), (5, 1), (1,) * 32])
def test_headers_tell_what_comes(dtype, shape):
    array = np.zeros(shape, ml_dtypes.bfloat16 if dtype == "bfloat16" else dtype)
    raw = encode(CALL, Header.of(array, 12))
    assert (raw.size, raw.dtype) == (HEADER_BYTES, np.uint8)
    call, header = decode(raw)
    assert call == CALL
    assert header == Header(microbatch=12, dtype=array.dtype, shape=shape, on_gpu=False)
    assert header.nbytes == array.nbytes
    assert (header.empty().shape, header.empty().dtype) == (shape, array.dtype)


def test_the_word_that_nothing_comes_is_a_header_too():
    raw = encode(Call(FORWARD, 70_000), None)
    assert raw.size == HEADER_BYTES
    assert decode(raw) == (Call(FORWARD, 70_000), None)


def spoilt(position, value):
    raw = encode(CALL, Header.of(np.zeros((2, 3)), 0)).copy()
    raw[position : position + len(value)] = np.frombuffer(value, np.uint8)
    return raw


@pytest.mark.parametrize(
    ("position", "value", "message"),
    [
        (0, b"\x07", "begins with 7"),
        (1, b"\x09", "begins with 1, 9"),
        (2, b"\x28", "begins with 1, 0, 40"),
        (3, b"\x02", "call is 2"),
        (12, b"nonsense", "dtype is b'nonsense"),
        (12, b"object\0\0", "dtype object"),
        (12, b"\xff\xfe", "dtype is"),
        (28, b"\xff" * 8, r"shape is \(-1, 3\)"),
        (28, b"\xff" * 7 + b"\x7f", r"shape is \(9223372036854775807, 3\)"),
    ],
)
def test_what_is_no_header_is_refused(position, value, message):
    with pytest.raises(ferro.CollectiveMismatch, match=message):
        decode(spoilt(position, value))


def test_arrays_of_a_gpu_are_received_on_it(monkeypatch):
    made = []

    def empty(shape, dtype):
        made.append((shape, dtype))
        return np.empty(shape, dtype)

    monkeypatch.setitem(sys.modules, "cupy", SimpleNamespace(empty=empty))
    array = SimpleNamespace(dtype=np.dtype("float32"), shape=(2, 3))
    _, header = decode(encode(CALL, Header.of(array, 0)))
    assert header.on_gpu
    header.empty()
    assert made == [((2, 3), np.dtype("float32"))]
    assert not Line(None, "world", room=24).fits(header)


def header_of(nbytes):
    return Header.of(np.zeros(nbytes, np.uint8), 0)


def test_a_message_has_room_for_what_came_before():
    line = Line(None, "world")
    rooms = []
    for nbytes in (24, 24, 20, 30, 4, 4, 0):  # the table in line.py, and then less
        fits = line.fits(header_of(nbytes))
        line.note(header_of(nbytes))
        rooms.append((fits, line.room))
    assert rooms == [
        *[(False, 24), (True, 24), (True, 24), (False, 30)],
        *[(True, 15), (True, 7), (True, 3)],
    ]
    on_gpu = Header(microbatch=0, dtype=np.dtype("f4"), shape=(99,), on_gpu=True)
    line.note(on_gpu)
    assert line.room == 1


@pytest.mark.parametrize("dtype", ["float64", "int8", "bool", "complex128", "bfloat16"])
@pytest.mark.parametrize("shape", [(), (0,), (3, 0, 2), (5, 3)])
def test_an_array_comes_out_of_its_message_as_it_went_in(dtype, shape):
    kind = np.dtype(ml_dtypes.bfloat16 if dtype == "bfloat16" else dtype)
    array = np.arange(np.prod(shape, dtype=int)).astype(kind).reshape(shape).T
    line = Line(None, "world", room=array.nbytes + 1)
    call, header, found = line.unpacked(line.packed(CALL, Header.of(array, 3), array))
    assert call == CALL
    assert (header.microbatch, found.dtype, found.shape) == (3, kind, array.shape)
    np.testing.assert_array_equal(found, array)
    assert found.flags.aligned


def test_a_little_array_keeps_no_large_message():
    line = Line(None, "world", room=1000)
    for size, kept in ((499, 499), (500, 1000 + HEADER_BYTES)):
        array = np.ones(size, np.uint8)
        _, _, found = line.unpacked(line.packed(CALL, Header.of(array, 0), array))
        memory = found
        while memory.base is not None:
            memory = memory.base
        assert memory.nbytes == kept
