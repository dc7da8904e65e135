"""The record comes back as it was written, and no other text passes for one."""

from __future__ import annotations

import hashlib
import json

import pytest
from hypothesis import given
from hypothesis import strategies as st

from ferro_checkpoint.errors import CheckpointDamaged, CheckpointTooNew, StateError
from ferro_checkpoint.layout import json_text, limits, record
from ferro_checkpoint.layout.bundle import layout_bundle
from ferro_checkpoint.layout.record import FileRecord, Record

RECORD = Record(
    step=7,
    bundles={"model": ("model.safetensors",)},
    files={"model.safetensors": FileRecord(10, (4, 8, 10), ("aa", "bb", "cc")), "empty": FileRecord(0, (), ())},
    values={"epoch": 3, "rate": 0.1, "name": "ü", "none": None},
    digest="crc32",
    saved_by={"ferro": "0.1.0", "world_size": 4},
)


def test_it_comes_back():
    assert Record.decode(RECORD.encode(), "f") == RECORD


def test_every_flipped_byte_is_found():
    text = RECORD.encode()
    for place in range(len(text)):
        for bit in (0, 5):
            changed = bytearray(text)
            changed[place] ^= 1 << bit
            with pytest.raises((CheckpointDamaged, CheckpointTooNew)):
                Record.decode(bytes(changed), "f")


def changed(**entries):
    content = json.loads(RECORD.encode()) | entries
    content.pop("record_digest")
    text = json.dumps(content, separators=(",", ":"), ensure_ascii=False).encode()
    content["record_digest"] = hashlib.blake2b(text, digest_size=16).hexdigest()
    return json.dumps(content).encode()


@pytest.mark.parametrize(
    ("entries", "message"),
    [
        ({"files": {"../m": {"bytes": 0, "ends": [], "digests": []}}}, "no name of a file"),
        ({"files": {"a/b": {"bytes": 0, "ends": [], "digests": []}}}, "no name of a file"),
        ({"files": {"..": {"bytes": 0, "ends": [], "digests": []}}}, "no name of a file"),
        ({"files": {"ferro.json": {"bytes": 0, "ends": [], "digests": []}}}, "no name of a file"),
        ({"files": {"m": {"bytes": -1, "ends": [], "digests": []}}}, "size of file 'm'"),
        ({"files": {"m": {"bytes": 9, "ends": [8], "digests": ["a"]}}, "bundles": {}}, "do not cover"),
        ({"files": {"m": {"bytes": 9, "ends": [4, 4, 9], "digests": ["a"] * 3}}, "bundles": {}}, "do not cover"),
        ({"files": {"m": {"bytes": 9, "ends": [9], "digests": []}}, "bundles": {}}, "segments of file 'm'"),
        ({"bundles": {"model": ["other"]}}, "does not list"),
        ({"values": []}, "'values'"),
        ({"step": "7"}, "step"),
        ({"values": {"v": json.loads("[" * 127 + "]" * 127)}}, "nested more than 128 levels deep"),
        ({"digest": 1}, "'digest'"),
        ({"format": "other"}, "no record"),
    ],
)
def test_a_record_that_says_what_cannot_be(entries, message):
    with pytest.raises(CheckpointDamaged, match=message):
        Record.decode(changed(**entries), "f")


def test_a_newer_one_says_so():
    with pytest.raises(CheckpointTooNew, match=r"version 2 .* update"):
        Record.decode(changed(version=2), "f")


@given(st.binary(max_size=300))
def test_random_bytes(text):
    with pytest.raises(CheckpointDamaged):
        Record.decode(text, "f")


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"step": True}, "step is True, of type bool"),
        ({"step": 1.5}, "give an int"),
        ({"values": {"v": json.loads("[" * 127 + "]" * 127)}}, "nested more than 128 levels deep"),
        ({"values": {"v": float("inf")}}, "no JSON"),
        ({"values": {"v": "\ud800"}}, "no JSON"),
        ({"values": {"v": [0] * 2000}}, "more than 1000 values: save large values as arrays"),
        ({"ends": {"f": list(range(1, 1000))}}, "more than 1000 values"),
        ({"values": {"v": "x" * 100000}}, "cannot have more than 50000"),
    ],
)
def test_a_record_that_none_could_read_is_not_written(monkeypatch, change, message):
    monkeypatch.setattr(json_text, "MOST_VALUES", 1000)
    monkeypatch.setattr(record, "MOST_RECORD_BYTES", 50000)
    fine = {
        "step": 3,
        "values": {"v": [json.loads("[" * 125 + "]" * 125)]},
        "bundles": {"m": ["f"]},
        "ends": {"f": [1]},
    }
    limits.check_record(**fine, saved_by={})
    with pytest.raises(StateError, match=message):
        limits.check_record(**fine | change, saved_by={})


@pytest.mark.parametrize(
    ("bundle", "tensors", "message"),
    [
        ("m" * 250, {"a": ("F32", (1,))}, "too long for a file"),
        ("m", {"": ("F32", (1,))}, "no name of a tensor"),
        ("m", {"a": ("F32", (1,) * 65)}, "65 dimensions"),
        ("m", {"a" * 5000: ("F32", (1,))}, "header of m.safetensors would have"),
        ("m", {"," * 1200: ("F32", (1,))}, "more than 1000 values"),
        ("m", {f"{'a' * 600}{k}": ("F32", (2,)) for k in range(9)}, "m.safetensors.index.json would have"),
    ],
)
def test_files_that_none_could_read_are_not_written(monkeypatch, bundle, tensors, message):
    monkeypatch.setattr(json_text, "MOST_VALUES", 1000)
    monkeypatch.setattr(limits, "MOST_HEADER_BYTES", 5000)
    limits.check_bundle("m", layout_bundle("m", {"a": ("F32", (2,)), "b": ("F32", (2,))}, 8))
    with pytest.raises(StateError, match=message):
        limits.check_bundle(bundle, layout_bundle(bundle, tensors, 8))


def test_hostile_text_takes_linear_time():
    """Both take less than a second, and would take minutes, or for ever, if they were not linear."""
    keys = b",".join(b'"%d":1' % k for k in range(200_000))
    with pytest.raises(json_text.UnreadableJson, match="'199999' comes twice"):
        json_text.read_json(b"{" + keys + b',"199999":1}')
    doubled = []
    for _ in range(60):
        doubled = [doubled, doubled]  # as a pickle may have it: 2^60 lists when all are written
    assert len(json_text.shown(doubled)) < 200
