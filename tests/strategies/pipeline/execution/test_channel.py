"""A pipeline's messages: headers, and their capacity for arrays."""

import sys
from types import SimpleNamespace

import ml_dtypes
import numpy as np
import pytest

import ferro
from ferro_strategies.pipeline.execution.channel import StageChannel
from ferro_strategies.pipeline.execution.header import HEADER_BYTES, ArrayHeader, decode, encode
from ferro_strategies.pipeline.execution.plan import FORWARD, STEP, PipelineCall

CALL = PipelineCall(STEP, 4)


@pytest.mark.parametrize("dtype", ["float64", "int8", "bool", "complex64", "bfloat16", "uint64"])
@pytest.mark.parametrize("shape", [(), (0,), (3, 0, 2), (5, 1), (1,) * 32])
def test_headers_describe_the_array_that_comes(dtype, shape):
    array = np.zeros(shape, ml_dtypes.bfloat16 if dtype == "bfloat16" else dtype)
    raw = encode(CALL, ArrayHeader.of(array, 12))
    assert (raw.size, raw.dtype) == (HEADER_BYTES, np.uint8)
    call, header, next_is_repeated = decode(raw)
    assert (call, next_is_repeated) == (CALL, False)
    assert header == ArrayHeader(microbatch=12, dtype=array.dtype, shape=shape, on_gpu=False)
    assert header.nbytes == array.nbytes
    assert (header.empty().shape, header.empty().dtype) == (shape, array.dtype)


def test_a_stop_message_is_a_header_too():
    raw = encode(PipelineCall(FORWARD, 70_000), None, next_is_repeated=True)
    assert raw.size == HEADER_BYTES
    assert decode(raw) == (PipelineCall(FORWARD, 70_000), None, True)


def spoilt(position, value):
    raw = encode(CALL, ArrayHeader.of(np.zeros((2, 3)), 0)).copy()
    raw[position : position + len(value)] = np.frombuffer(value, np.uint8)
    return raw


@pytest.mark.parametrize(
    ("position", "value", "message"),
    [
        (0, b"\x07", "begins with 7"),
        (1, b"\x09", "begins with 1, 9"),
        (2, b"\x28", "begins with 1, 0, 40"),
        (3, b"\x02", "call is 2"),
        (13, b"nonsense", "dtype is b'nonsense"),
        (13, b"object\0\0", "dtype object"),
        (13, b"\xff\xfe", "dtype is"),
        (29, b"\xff" * 8, r"shape is \(-1, 3\)"),
        (29, b"\xff" * 7 + b"\x7f", r"shape is \(9223372036854775807, 3\)"),
    ],
)
def test_bytes_that_are_no_header_are_refused(position, value, message):
    with pytest.raises(ferro.CollectiveMismatch, match=message):
        decode(spoilt(position, value))


def test_arrays_of_a_gpu_are_received_on_it(monkeypatch):
    made = []

    def empty(shape, dtype):
        made.append((shape, dtype))
        return np.empty(shape, dtype)

    monkeypatch.setitem(sys.modules, "cupy", SimpleNamespace(empty=empty))
    array = SimpleNamespace(dtype=np.dtype("float32"), shape=(2, 3))
    _, header, _ = decode(encode(CALL, ArrayHeader.of(array, 0)))
    assert header.on_gpu
    header.empty()
    assert made == [((2, 3), np.dtype("float32"))]
    assert not StageChannel(None, "world", capacity=24).fits(header)


def header_of(nbytes):
    return ArrayHeader.of(np.zeros(nbytes, np.uint8), 0)


def test_a_message_has_the_capacity_for_the_largest_array_before():
    channel = StageChannel(None, "world")
    results = []
    for nbytes in (24, 24, 20, 30, 4, 4, 0):  # the table in channel.py, and then less
        fits = channel.fits(header_of(nbytes))
        channel.adapt_capacity(header_of(nbytes))
        results.append((fits, channel.capacity))
    assert results == [*[(False, 24), (True, 24), (True, 24), (False, 30)], *[(True, 15), (True, 7), (True, 3)]]
    on_gpu = ArrayHeader(microbatch=0, dtype=np.dtype("f4"), shape=(99,), on_gpu=True)
    channel.adapt_capacity(on_gpu)
    assert channel.capacity == 1


@pytest.mark.parametrize("dtype", ["float64", "int8", "bool", "complex128", "bfloat16"])
@pytest.mark.parametrize("shape", [(), (0,), (3, 0, 2), (5, 3)])
def test_an_array_comes_out_of_its_message_as_it_went_in(dtype, shape):
    kind = np.dtype(ml_dtypes.bfloat16 if dtype == "bfloat16" else dtype)
    array = np.arange(np.prod(shape, dtype=int)).astype(kind).reshape(shape).T
    channel = StageChannel(None, "world", capacity=array.nbytes + 1)
    call, header, found = channel.unpack(channel.pack(CALL, ArrayHeader.of(array, 3), array))
    assert call == CALL
    assert (header.microbatch, found.dtype, found.shape) == (3, kind, array.shape)
    np.testing.assert_array_equal(found, array)
    assert found.flags.aligned


def test_a_little_array_keeps_no_large_message():
    channel = StageChannel(None, "world", capacity=1000)
    for size, kept in ((499, 499), (500, 1000 + HEADER_BYTES)):
        array = np.ones(size, np.uint8)
        _, _, found = channel.unpack(channel.pack(CALL, ArrayHeader.of(array, 0), array))
        memory = found
        while memory.base is not None:
            memory = memory.base
        assert memory.nbytes == kept
