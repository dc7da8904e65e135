"""Verify finds each damaged range of each file, and names the tensors in it."""

from __future__ import annotations

import dataclasses
import os

import numpy as np
import pytest

from ferro_checkpoint.errors import CheckpointError, CheckpointIncomplete
from ferro_checkpoint.layout.header import decode_header
from ferro_checkpoint.layout.record import RECORD_NAME, Record
from ferro_checkpoint.opened import damage
from ferro_checkpoint.opened import verify as module
from ferro_checkpoint.opened.checkpoint import OpenedCheckpoint
from ferro_checkpoint.opened.verify import verify
from ferro_checkpoint.storage.reading import LocalReadableDirectory

from .written import file_record, write


@pytest.fixture(autouse=True)
def _small_batches(monkeypatch):
    monkeypatch.setattr(module, "_BATCH_BYTES", 1000)


def change(path, places):
    with path.open("r+b", buffering=0) as file:
        for place in places:
            byte = os.pread(file.fileno(), 1, place)
            os.pwrite(file.fileno(), bytes([byte[0] ^ 1]), place)


def test_a_whole_one_has_no_findings_and_all_bytes_are_checked(storage):
    done = []
    assert list(verify(storage, "step-7", progress=done.append)) == []
    with OpenedCheckpoint.open(storage, "step-7") as checkpoint:
        assert sum(done) == sum(it.nbytes for it in checkpoint.record.files.values())


def test_each_damage_is_found(storage, tmp_path, monkeypatch):
    with OpenedCheckpoint.open(storage, "step-7") as checkpoint:
        weight, flags = checkpoint.tensors["model.0.weight"], checkpoint.tensors["optimizer.flags"]
        ends = checkpoint.segments(weight.file)
    directory = tmp_path / "step-7"
    change(directory / weight.file, [weight.begin + 100, weight.begin + 1000])
    change(directory / flags.file, [flags.begin])
    (directory / "model.safetensors.index.json").unlink()
    headers = []
    monkeypatch.setattr(damage, "decode_header", lambda *args: headers.append(args) or decode_header(*args))
    found = list(verify(storage, "step-7"))
    assert len(headers) == 2  # one of each file, however many places are damaged
    ranges = [(it.file, it.begin, it.end) for it in found]
    for place in (100, 1000):
        k = ends.searchsorted(weight.begin + place, "right")
        assert (weight.file, ends[k - 1], ends[k]) in ranges
    assert {it.tensors for it in found if it.file == weight.file} == {("model.0.weight",)}
    assert [it.tensors for it in found if it.file == flags.file] == [("optimizer.step", "optimizer.flags")]
    assert [(it.begin, "is not there" in it.message) for it in found if it.file.endswith("json")] == [(None, True)]
    assert len(found) == 4


def test_a_damaged_header_hides_the_names_and_no_other_damage(storage, tmp_path):
    change(tmp_path / "step-7" / "optimizer.safetensors", [8, 4096])
    found = list(verify(storage, "step-7"))
    assert [(it.begin, it.tensors) for it in found] == [(0, ()), (4096, ())]


def test_a_file_that_cannot_be_read(storage, monkeypatch):
    open_file = LocalReadableDirectory.open_file

    def failing(directory, file):
        opened = open_file(directory, file)
        if file.startswith("optimizer"):

            def fail(destinations, offset):
                raise OSError(5, "Input/output error")

            opened.read_into = fail
        return opened

    monkeypatch.setattr(LocalReadableDirectory, "open_file", failing)
    found = list(verify(storage, "step-7"))
    assert {it.file for it in found} == {"optimizer.safetensors"}
    assert all("Input/output error" in it.message for it in found)


def test_files_that_contradict_each_other_though_each_is_as_written(storage, tmp_path):
    write(tmp_path / "two", {"m": {"a": np.zeros(4), "b": np.zeros(4)}}, file_bytes=32)
    index = b'{"weight_map": {}}'
    (tmp_path / "two" / "m.safetensors.index.json").write_bytes(index)
    path = tmp_path / "two" / RECORD_NAME
    record = Record.decode(path.read_bytes(), "f")
    files = dict(record.files) | {"m.safetensors.index.json": file_record(index)}
    path.write_bytes(dataclasses.replace(record, files=files).encode())
    (found,) = verify(storage, "two")
    assert found.file == "m.safetensors.index.json"
    assert "tensor 'a' is in no file" in found.message


def test_no_record(storage, tmp_path):
    with pytest.raises(CheckpointIncomplete):
        list(verify(storage, "nothing"))
    change(tmp_path / "step-7" / RECORD_NAME, [50])
    with pytest.raises(CheckpointError):
        list(verify(storage, "step-7"))
