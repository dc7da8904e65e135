"""What is damaged, hostile or changing on disk is one clear error of a load, on all ranks."""

from __future__ import annotations

import json
import os
import shutil

import numpy as np
import pytest

import ferro
import ferro_checkpoint
from ferro_checkpoint import (
    ArrayPiece,
    CheckpointDamaged,
    CheckpointError,
    CheckpointIncomplete,
    CheckpointTooNew,
    StateError,
)
from ferro_checkpoint.layout import header
from ferro_checkpoint.layout.digest import digest_of
from ferro_checkpoint.layout.record import FileRecord, Record
from ferro_checkpoint.loading import load_checkpoint as load_module
from ferro_checkpoint.opened.checkpoint import OpenedCheckpoint

from ..placements import bits


def state_of(fill):
    """A state of two bundles, with a tensor in each, and values."""
    return {
        "model": {"w": np.full((3, 5), fill, np.float32), "c": np.full(2, fill, np.complex128)},
        "optimizer": {"m": np.full(7, fill, np.int16)},
        "epoch": fill,
        "config": {"lr": [0.5, None]},
    }


def same(one, other):
    return all(
        bits(one[bundle][name]) == bits(other[bundle][name])
        for bundle in ("model", "optimizer")
        for name in one[bundle]
    ) and (one["epoch"], one["config"]) == (other["epoch"], other["config"])


@pytest.fixture
def short_headers(monkeypatch):
    """Let headers not fill a page, so that there are fewer bytes to flip."""
    monkeypatch.setattr(header, "ALIGNMENT", 8)


def test_every_byte_flipped(tmp_path, short_headers):
    path, saved = tmp_path / "c", state_of(1)
    ferro_checkpoint.save(path, saved, step=3)
    files = sorted(os.listdir(path))
    assert files == ["ferro.json", "model.safetensors", "optimizer.safetensors"]
    count = 0
    for file in files:
        content = (path / file).read_bytes()
        assert len(content) < 2000
        for place in range(len(content)):
            changed = bytearray(content)
            changed[place] ^= (0x01, 0x80, 0xFF)[place % 3]
            (path / file).write_bytes(changed)
            count += 1
            with pytest.raises(CheckpointDamaged) as caught:
                ferro_checkpoint.load(path, state_of(0))
            assert str(path / file) in str(caught.value), (file, place)
            # A damaged header may not say which tensors there are.
            assert caught.value.tensor or file == "ferro.json" or place < header_bytes(content), (file, place)
        (path / file).write_bytes(content)
        for shorter in (content[:-1], content[: len(content) // 2], b"", content + b"\0"):
            (path / file).write_bytes(shorter)
            with pytest.raises(CheckpointDamaged, match=file):
                ferro_checkpoint.load(path, state_of(0))
        (path / file).unlink()
        with pytest.raises((CheckpointDamaged, CheckpointIncomplete), match=file):
            ferro_checkpoint.load(path, state_of(0))
        (path / file).write_bytes(content)
    assert same(ferro_checkpoint.load(path, state_of(0)), saved)
    assert count > 800


def length_of(content):
    return 8 + int.from_bytes(content[:8], "little")


def header_bytes(content):
    return 8 + int.from_bytes(content[:8], "little")


def rewrite(path, file, content, **changes):
    """Give a file another content, to which the record agrees."""
    record = Record.decode((path / "ferro.json").read_bytes(), "")
    (path / file).write_bytes(content)
    one = FileRecord(len(content), (len(content),), (digest_of([memoryview(content)]),))
    fields = {name: getattr(record, name) for name in ("step", "bundles", "values", "digest")} | changes
    (path / "ferro.json").write_bytes(Record(**fields, files={**record.files, file: one}).encode())


def errors_of(world_size, function):
    """Run a function on simulated ranks; return the error of each."""

    def run(group):
        try:
            function(group)
        except ferro.FerroError as error:
            return error
        return None

    return ferro.simulate(run, world_size, timeout_s=10, run_timeout_s=30)


ENTRY = '{"dtype":"I16","shape":[7],"data_offsets":[0,14]}'


@pytest.mark.parametrize(
    ("text", "message"),
    [
        (b"{" + b'"m":' + ENTRY.encode() + b"}", None),
        ((1 << 40, b"{}"), "a header of 1099511627776 bytes does not fit"),
        ((200, b"{}"), "a header of 200 bytes does not fit"),
        (b"[" * 100_000, "the header is no JSON"),
        (b'{"m":' * 3000 + b"1" + b"}" * 3000, "the header is no JSON"),
        (b'{"m":{"dtype":"I16","shape":[' + b"1," * 70 + b'7],"data_offsets":[0,14]}}', "its shape"),
        (b'{"m":{"dtype":"I16","shape":[7],"data_offsets":[0,14],"data_offsets":[0,14]}}', "comes twice"),
        (('{"m":' + ENTRY + ',"n":' + ENTRY + "}").encode(), "tensor 'n' overlaps tensor 'm'"),
        (b'{"m":{"dtype":"I16","shape":[4611686018427387904],"data_offsets":[0,14]}}', "its shape"),
        (b'{"m":{"dtype":"I16","shape":[3037000500,3037000500,0],"data_offsets":[14,14]}}', "its shape"),
        (b'{"m":{"dtype":"P64","shape":[7],"data_offsets":[0,14]}}', "its dtype 'P64' is unknown"),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_hostile_headers(tmp_path, text, message):
    path = tmp_path / "c"
    ferro_checkpoint.save(path, state_of(1))
    length, text = text if isinstance(text, tuple) else (len(text), text)
    data = np.full(7, 2, np.int16).tobytes()
    rewrite(path, "optimizer.safetensors", length.to_bytes(8, "little") + text + data)
    states = [state_of(0), state_of(0)]
    errors = errors_of(2, lambda group: ferro_checkpoint.load(path, states[group.rank], group))
    if message is None:
        assert errors == [None, None]
        assert states[0]["optimizer"]["m"].tolist() == [2] * 7
        return
    for error, state in zip(errors, states, strict=True):
        assert isinstance(error, CheckpointDamaged)
        assert message in str(error)
        assert str(path / "optimizer.safetensors") in str(error)
        assert len(str(error)) < 600
        assert same(state, state_of(0))  # nothing was loaded


def test_versions_and_records_that_are_none(tmp_path):
    path = tmp_path / "c"
    ferro_checkpoint.save(path, state_of(1))
    record = json.loads((path / "ferro.json").read_bytes())
    for content, kind, message in (
        (json.dumps(record | {"version": 2}).encode(), CheckpointTooNew, "version 2 of the format"),
        (json.dumps(record | {"digest": "sha512"}).encode(), CheckpointError, "ferro.json"),
        (b"[" * 1_000_000, CheckpointDamaged, "ferro.json"),
        (b"{" + b'"a":{' * 10_000, CheckpointDamaged, "ferro.json"),
        (b"\x80\x04pickle", CheckpointDamaged, "ferro.json"),
        (b'{"version": 1e999}', CheckpointDamaged, "ferro.json"),
        (None, CheckpointIncomplete, "ferro.json"),
    ):
        (path / "ferro.json").unlink(missing_ok=True)
        if content is not None:
            (path / "ferro.json").write_bytes(content)
        for error in errors_of(2, lambda group: ferro_checkpoint.load(path, state_of(0), group)):
            assert isinstance(error, kind)
            assert message in str(error)
    shutil.rmtree(path)
    for error in errors_of(2, lambda group: ferro_checkpoint.load(path, state_of(0), group)):
        assert isinstance(error, CheckpointIncomplete)


ROWS = 40_000


def rows_of(rank, fill):
    """The half of a matrix that one of two ranks holds: each reads its own segment."""
    half = ROWS // 2
    return {"model": {"w": ArrayPiece((ROWS, 2), np.full((half, 2), fill, "f4"), (rank * half, 0), (half, 2))}}


def test_damage_that_one_rank_finds_is_one_error_of_all(tmp_path):
    path = tmp_path / "c"
    ferro.simulate(lambda group: ferro_checkpoint.save(path, rows_of(group.rank, 1), group), 2, run_timeout_s=30)
    content = bytearray((path / "model.safetensors").read_bytes())
    content[-1] ^= 1
    (path / "model.safetensors").write_bytes(content)
    errors = errors_of(2, lambda group: ferro_checkpoint.load(path, rows_of(group.rank, 0), group))
    for error in errors:
        assert isinstance(error, CheckpointDamaged)
        assert "tensor 'model.w'" in str(error)
        assert "found by rank 1 of 2" in str(error)
    # Only one of them sees the file's end cut off: the other finds no fault as it opens the checkpoint.

    def cut(group):
        group.barrier()
        if group.rank == 1:
            (path / "model.safetensors").write_bytes(content[:-1])
        ferro_checkpoint.load(path, rows_of(group.rank, 0), group)

    for error in errors_of(2, cut):
        assert isinstance(error, CheckpointDamaged)


@pytest.mark.parametrize(
    ("how", "verify"),
    [("cut off", True), ("cut off", False), ("written to", True), ("written to", False), ("replaced", True)],
)
def test_a_file_that_changes_while_it_is_read(tmp_path, monkeypatch, how, verify):
    path = tmp_path / "c"
    ferro_checkpoint.save(path, rows_of(0, 1) | {"model": {"w": np.ones((ROWS, 2), "f4")}})
    file = path / "model.safetensors"

    def change(*arguments):
        content = file.read_bytes()
        if how == "written to":
            with open(file, "r+b") as opened:
                opened.seek(-1, os.SEEK_END)
                opened.write(b"\x17")
        elif how == "cut off":
            os.truncate(file, len(content) // 2)
        else:
            file.unlink()
            file.write_bytes(content[: len(content) // 2])
        return plan_reads(*arguments)

    plan_reads = load_module.plan_reads
    monkeypatch.setattr(load_module, "plan_reads", change)
    into = {"model": {"w": np.zeros((ROWS, 2), "f4")}}
    if how == "replaced":  # the file that was opened is as it was
        ferro_checkpoint.load(path, into, verify=verify)
        assert (into["model"]["w"] == 1).all()
        return
    with pytest.raises(CheckpointDamaged, match=r"model\.safetensors"):
        ferro_checkpoint.load(path, into, verify=verify)


def test_ranks_that_see_different_checkpoints(tmp_path):
    for rank in range(2):
        ferro_checkpoint.save(tmp_path / f"{rank}" / "c", state_of(rank))
    errors = errors_of(2, lambda group: ferro_checkpoint.load(tmp_path / f"{group.rank}" / "c", state_of(5), group))
    for error in errors:
        assert isinstance(error, StateError)
        assert "not the same checkpoint on all ranks" in str(error)
    shutil.rmtree(tmp_path / "1")
    for error in errors_of(
        2, lambda group: ferro_checkpoint.load(tmp_path / f"{group.rank}" / "c", state_of(5), group)
    ):
        assert isinstance(error, CheckpointIncomplete)


def test_a_checkpoint_that_is_replaced_while_it_is_loaded(tmp_path, monkeypatch):
    path, read_headers, plan_reads = tmp_path / "c", OpenedCheckpoint._read_headers, load_module.plan_reads
    ferro_checkpoint.save(path, state_of(1))
    fills = [2]

    def replace():
        if fills:
            ferro_checkpoint.save(path, state_of(fills.pop()), overwrite=True)

    def replaced_before(opened):
        replace()
        return read_headers(opened)

    def replaced_after(*arguments):
        replace()
        return plan_reads(*arguments)

    monkeypatch.setattr(OpenedCheckpoint, "_read_headers", replaced_before)
    assert same(ferro_checkpoint.load(path, state_of(0)), state_of(2))
    monkeypatch.setattr(load_module, "plan_reads", replaced_after)
    monkeypatch.setattr(OpenedCheckpoint, "_read_headers", read_headers)
    fills.append(3)
    assert same(ferro_checkpoint.load(path, state_of(0)), state_of(2))  # as it was opened, though it is gone
    assert same(ferro_checkpoint.load(path, state_of(0)), state_of(3))
