"""The store's messages: what is written is read, and sizes are refused by the header alone."""

from __future__ import annotations

import struct

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from ferro.rendezvous.store import wire

INT64 = st.integers(-(2**63), 2**63 - 1)


@given(
    op=st.sampled_from(wire.StoreOp),
    key=st.binary(min_size=1, max_size=1024),
    number=INT64,
    value=st.binary(max_size=200),
)
@settings(deadline=None)
def test_a_request_arrives_as_it_was_sent(op, key, number, value):
    request = wire.Request(op, key, number, value)
    message = bytearray(wire.encode_request(request))
    assert wire.request_bytes(message) == len(message)
    assert wire.decode_request(message) == request


@given(status=st.sampled_from(wire.ReplyStatus), number=INT64, value=st.binary(max_size=200))
@settings(deadline=None)
def test_a_reply_header_arrives_as_it_was_sent(status, number, value):
    header = wire.encode_reply_header(wire.Reply(status, number, value))
    assert len(header) == wire.REPLY_HEADER_BYTES
    assert wire.decode_reply_header(header) == (status, number, len(value))


def test_the_layout_is_the_documented_one():
    request = wire.encode_request(wire.Request(wire.StoreOp.ADD, b"key", -2, b"v"))
    assert request == b"\3" + b"\xff" * 7 + b"\xfe" + b"\0\3" + b"\0\0\0\1" + b"key" + b"v"


def test_a_size_is_unknown_until_the_header_is_whole():
    message = wire.encode_request(wire.Request(wire.StoreOp.SET, b"k", value=b"v"))
    sizes = [wire.request_bytes(bytearray(message[:n])) for n in range(18)]
    assert sizes == [None] * 15 + [17] * 3


@pytest.mark.parametrize(
    ("key_bytes", "value_bytes", "fits"),
    [
        (1, 0, True),
        (1024, 16 << 20, True),
        (0, 0, False),
        (1025, 0, False),
        (1, (16 << 20) + 1, False),
        (0xFFFF, 0xFFFFFFFF, False),
    ],
)
def test_the_bounds_of_a_request(key_bytes, value_bytes, fits):
    header = bytearray(struct.pack("!BqHI", 1, 0, key_bytes, value_bytes))
    if fits:
        assert wire.request_bytes(header) == 15 + key_bytes + value_bytes
    else:
        with pytest.raises(wire.WireError, match=str(value_bytes)):
            wire.request_bytes(header)


@pytest.mark.parametrize("op", [0, 7, 255])
def test_an_unknown_operation_is_refused(op):
    with pytest.raises(wire.WireError, match=f"operation {op}"):
        wire.decode_request(bytearray(struct.pack("!BqHI", op, 0, 1, 0) + b"k"))


@pytest.mark.parametrize(("status", "size"), [(5, 0), (0, (16 << 20) + 1)])
def test_a_reply_out_of_bounds_is_refused(status, size):
    with pytest.raises(wire.WireError):
        wire.decode_reply_header(struct.pack("!BqI", status, 0, size))
