"""Headers are what the safetensors library writes and reads; whatever else comes in is refused."""

from __future__ import annotations

import contextlib
import json

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from ferro_checkpoint.errors import CheckpointDamaged
from ferro_checkpoint.layout.header import ALIGNMENT, decode_header, encode_header, header_length

TENSORS = {"a": ("F32", (2, 3)), "b.ü": ("BF16", ()), "none": ("I64", (0, 4)), "c": ("BOOL", (5,))}
DATA_BYTES = 24 + 2 + 0 + 5


def test_it_comes_back():
    header = encode_header(TENSORS, {"format": "pt"})
    assert len(header) % ALIGNMENT == 0
    total = len(header) + DATA_BYTES
    assert header_length(header[:8], total, "f") == len(header)
    tensors, metadata = decode_header(header, total, "f")
    assert metadata == {"format": "pt"}
    assert {name: (t.dtype, t.shape) for name, t in tensors.items()} == TENSORS
    assert (tensors["a"].begin, tensors["a"].end, tensors["c"].end) == (len(header), len(header) + 24, total)


def test_the_library_reads_it(tmp_path):
    numpy = pytest.importorskip("safetensors.numpy")
    values = {"x": np.arange(6, dtype=np.float32).reshape(2, 3), "n": np.array(7, np.int64)}
    header = encode_header({"x": ("F32", (2, 3)), "n": ("I64", ())}, {})
    path = tmp_path / "t.safetensors"
    path.write_bytes(header + values["x"].tobytes() + values["n"].tobytes())
    read = numpy.load_file(path)
    assert all((read[name] == values[name]).all() for name in values)


def wrong(entries, data=b""):
    text = entries if isinstance(entries, bytes) else json.dumps(entries).encode()
    header = len(text).to_bytes(8, "little") + text
    decode_header(header, len(header) + len(data), "f")


F = {"dtype": "F32", "shape": [1], "data_offsets": [0, 4]}


@pytest.mark.parametrize(
    ("entries", "data", "message"),
    [
        (b"{", b"", "no JSON"),
        (b"[]", b"", "no JSON object"),
        (b'{"a":1,"a":2}', b"", "comes twice"),
        (b"[" * 100_000, b"", "no JSON"),
        (b'{"a": NaN}', b"", "no JSON"),
        ({"a": F | {"dtype": "F31"}}, b"1234", "dtype 'F31' is unknown"),
        ({"a": F | {"shape": [2]}}, b"1234", "has 8 bytes"),
        ({"a": F | {"shape": [-1]}}, b"1234", "shape"),
        ({"a": F | {"shape": [0, 1 << 61], "data_offsets": [0, 0]}}, b"", "shape"),
        ({"a": F | {"shape": [1 << 30, 0, 1 << 30], "data_offsets": [0, 0]}}, b"", "shape"),
        ({"a": F | {"shape": [True]}}, b"1234", "shape"),
        ({"a": F | {"data_offsets": [0, 1 << 80]}}, b"1234", "data_offsets"),
        ({"a": F | {"more": 1}}, b"1234", "not just"),
        ({"": F}, b"1234", "no name"),
        ({"a\0": F}, b"1234", "no name"),
        ({"a": F, "b": F}, b"1234", "tensor 'b' overlaps tensor 'a'"),
        ({"a": F, "b": F | {"data_offsets": [8, 12]}}, b"12341234abcd", "tensor 'b' leaves a hole"),
        ({"a": F}, b"12345", "end at byte"),
        ({"a": F}, b"123", "end at byte"),
        ({"__metadata__": {"a": 1}}, b"", "__metadata__"),
    ],
)
def test_what_is_wrong_is_named(entries, data, message):
    with pytest.raises(CheckpointDamaged, match=message):
        wrong(entries, data)


def test_a_length_beyond_the_file():
    for length in (9, 1 << 40, (1 << 64) - 1):
        with pytest.raises(CheckpointDamaged, match="does not fit"):
            header_length(length.to_bytes(8, "little"), 16, "f")
    with pytest.raises(CheckpointDamaged):
        header_length(b"123", 3, "f")


@given(st.binary(max_size=300), st.integers(0, 400))
def test_random_bytes_are_refused_or_read(header, size):
    with contextlib.suppress(CheckpointDamaged):
        decode_header(header, size, "f")
