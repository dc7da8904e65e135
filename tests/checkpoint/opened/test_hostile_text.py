"""No text makes a decoder raise anything but CheckpointError, or take much memory."""

from __future__ import annotations

import contextlib
import hashlib
import json
import tracemalloc

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from ferro_checkpoint.errors import CheckpointDamaged, CheckpointError
from ferro_checkpoint.layout import header
from ferro_checkpoint.layout.header import decode_header, encode_header
from ferro_checkpoint.layout.json_text import UnreadableJson, read_json
from ferro_checkpoint.layout.record import Record
from ferro_checkpoint.opened.index import check_index, decode_index

NUMBERS = st.integers() | st.sampled_from([0, 1, 4, 8, 1 << 62, (1 << 62) - 1, -1, 1 << 64, 10**4000])
SCALARS = st.none() | st.booleans() | NUMBERS | st.floats(allow_nan=False, allow_infinity=False) | st.text(max_size=9)
ANYTHING = st.recursive(
    SCALARS, lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(), inner), max_leaves=9
)
ENTRY = st.fixed_dictionaries(
    {
        "dtype": st.sampled_from(["F32", "I8", "BOOL", "F31", ""]) | SCALARS,
        "shape": st.lists(st.integers(0, 3) | NUMBERS, max_size=3) | ANYTHING,
        "data_offsets": st.tuples(st.integers(0, 40), st.integers(0, 40)) | st.lists(NUMBERS, max_size=3) | ANYTHING,
    },
    optional={"more": SCALARS},
)
HEADER = st.dictionaries(st.text(max_size=5) | st.just("__metadata__"), ENTRY | ANYTHING, max_size=4)
FILE = st.fixed_dictionaries(
    {"bytes": NUMBERS, "ends": st.lists(NUMBERS, max_size=3) | ANYTHING, "digests": st.lists(SCALARS) | ANYTHING}
)
WHOLE = {
    "format": "ferro-checkpoint",
    "version": 1,
    "step": 7,
    "saved_by": {},
    "digest": "xxh3_64",
    "bundles": {"m": ["f"]},
    "files": {"f": {"bytes": 3, "ends": [2, 3], "digests": ["a", "b"]}},
    "values": {},
}
CHANGES = {
    "bundles": st.dictionaries(st.sampled_from(["m", "..", "o"]), st.lists(st.sampled_from(["f", "g"])) | ANYTHING),
    "files": st.dictionaries(st.sampled_from(["f", "g", "a/b"]), FILE | ANYTHING),
}
RECORD = st.sampled_from(sorted(WHOLE)).flatmap(
    lambda key: (
        st.just({name: value for name, value in WHOLE.items() if name != key})
        | st.builds(lambda value: WHOLE | {key: value}, CHANGES.get(key, ANYTHING))
    )
)


def as_header(text):
    return len(text).to_bytes(8, "little") + text


@given(HEADER, st.integers(0, 200), st.booleans())
def test_headers(entries, size, compact):
    text = json.dumps(entries, separators=(",", ":") if compact else None, ensure_ascii=not compact)
    with contextlib.suppress(CheckpointDamaged, UnicodeEncodeError):
        decode_header(as_header(text.encode()), size, "f")


@settings(max_examples=100)
@given(st.data())
def test_the_quick_decoder_reads_what_the_other_one_reads(data):
    """Wherever the quick one reads a text, changed or not, the other one reads the same in it."""
    names = data.draw(st.lists(st.text(st.sampled_from('ab",{}:é\\\0'), max_size=3), unique=True, max_size=4))
    shapes = st.lists(st.integers(0, 3), max_size=3)
    tensors = {name: (data.draw(st.sampled_from(["F32", "I8"])), tuple(data.draw(shapes))) for name in names}
    written = encode_header(tensors, data.draw(st.sampled_from([{}, {"format": "pt"}, {"a": 'b"'}])))
    text = bytearray(written[8:].rstrip(b" "))
    for _ in range(data.draw(st.integers(0, 2))):
        place = data.draw(st.integers(0, len(text) - 1))
        text[place : place + data.draw(st.integers(0, 1))] = data.draw(
            st.sampled_from([b"", b"0", b",", b"{", b"}", b" ", b'"', b"\\", b"1"])
        )
    changed = as_header(bytes(text))
    quick = header._decode_usual(changed)
    if quick is not None:
        assert quick == header._decode_json(changed, "f")
    elif (
        not any(character in name for name in names for character in '"\\\0')
        and "" not in names
        and changed[8:] == written[8:].rstrip(b" ")
    ):
        assert b'\\"' in text  # which only the other one reads


@given(RECORD)
def test_records(content):
    text = json.dumps(content, separators=(",", ":"), ensure_ascii=False)
    with contextlib.suppress(CheckpointError, UnicodeEncodeError):
        digest = hashlib.blake2b(text.encode(), digest_size=16).hexdigest()
        Record.decode(json.dumps(content | {"record_digest": digest}).encode(), "f")


@given(st.dictionaries(st.text(max_size=3), SCALARS) | ANYTHING)
def test_indexes(where):
    with contextlib.suppress(CheckpointDamaged):
        check_index(json.dumps({"weight_map": where}).encode(), {"a": "f"}, "f")


BOMBS = {
    "deep": b"[" * 200_000,
    "deep and whole": b'{"a":' * 900 + b"1" + b"}" * 900,
    "number of many digits": b'{"a":' + b"9" * 1_000_000 + b"}",
    "float beyond all": b'{"format":"ferro-checkpoint","version":1,"a":1e999}',
    "half a surrogate pair": b'{"format":"ferro-checkpoint","version":1,"\\ud800":1}',
    "a key twice": b'{"a":1,"a":1}',
    "long key twice": b'{"' + b"a" * 1_000_000 + b'":1,"' + b"a" * 1_000_000 + b'":1}',
    "no text": b"\xff\xfe",
    "mark of byte order": b"\xef\xbb\xbf{}",
    "nothing": b"",
}


@pytest.mark.parametrize("bomb", BOMBS)
def test_bombs(bomb):
    for decode in (
        lambda text: decode_header(as_header(text), 1 << 20, "f"),
        lambda text: Record.decode(text, "f"),
        lambda text: decode_index(text, "f"),
    ):
        with pytest.raises(CheckpointDamaged) as error:
            decode(BOMBS[bomb])
        assert len(str(error.value)) < 1000


def test_many_values_are_refused_before_they_take_memory():
    tracemalloc.start()
    try:
        for text in (b"[" + b"[]," * 100_000 + b"0]", b"{" + b'"":{},' * 100_000 + b"}"):
            with pytest.raises(UnreadableJson, match="more than 1000 values"):
                read_json(text, most_values=1000)
        assert tracemalloc.get_traced_memory()[1] < 2_000_000
    finally:
        tracemalloc.stop()
