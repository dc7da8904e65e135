"""An opened checkpoint gives back what was written; whatever does not fit is refused, with file and tensor named."""

from __future__ import annotations

import contextlib
import dataclasses
import os
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import pytest

from ferro_checkpoint.errors import CheckpointDamaged, CheckpointError, CheckpointIncomplete, CheckpointTooNew
from ferro_checkpoint.layout.header import encode_header
from ferro_checkpoint.layout.record import RECORD_NAME, FileRecord, Record
from ferro_checkpoint.opened import files
from ferro_checkpoint.opened.checkpoint import OpenedCheckpoint
from ferro_checkpoint.opened.verify import verify
from ferro_checkpoint.storage.reading import LocalReadableDirectory
from ferro_checkpoint.storage.removal import remove_tree
from ferro_checkpoint.storage.saver import TOKEN_NAME
from ferro_checkpoint.storage.system_calls import exchange

from .conftest import ARRAYS
from .written import file_record, write


def opened(storage, name="step-7"):
    return OpenedCheckpoint.open(storage, name)


def read_all(storage, name):
    with opened(storage, name) as checkpoint:
        for tensor in checkpoint.tensors:
            checkpoint.read_tensor(tensor)


def rewrite(directory, change):
    """Write a record that says something else, and is whole."""
    record = Record.decode((directory / RECORD_NAME).read_bytes(), "f")
    (directory / RECORD_NAME).write_bytes(change(record).encode())


def test_what_was_written_comes_back(storage):
    with opened(storage) as checkpoint:
        assert checkpoint.record.step == 7
        assert checkpoint.path == f"{storage.path}/step-7"
        expected = {f"{bundle}.{name}": array for bundle, arrays in ARRAYS.items() for name, array in arrays.items()}
        assert set(checkpoint.tensors) == set(expected)
        for name, array in expected.items():
            read = checkpoint.read_tensor(name)
            assert (read.dtype, read.shape) == (array.dtype, array.shape)
            assert read.tobytes() == array.tobytes()
        place = checkpoint.tensors["model.z"]
        assert (place.dtype, place.shape, place.array_shape, place.complex128) == ("F64", (2, 2), (2,), True)
        checkpoint.check_unchanged()


def test_segments_are_read_where_they_are_to_be(storage):
    with opened(storage) as checkpoint:
        for file in checkpoint.record.files:
            content = Path(checkpoint.path, file).read_bytes()
            begin = 0
            for k, end in enumerate(checkpoint.segments(file)):
                one, two = bytearray(1), bytearray(end - begin - 1)
                checkpoint.read_segment(file, k, [memoryview(one), memoryview(two)])
                assert one + two == content[begin:end]
                begin = end
            last = len(content)
            for begin, end in ((0, 1), (0, last), (last // 2, last - 2), (last - 1, last), (5, 5), (last, last)):
                part = bytearray(end - begin)
                checkpoint.read_bytes(file, begin, memoryview(part))
                assert part == content[begin:end]


def test_many_small_tensors_of_a_segment_are_read_with_it(storage, tmp_path, monkeypatch):
    write(tmp_path / "many", {"m": {str(k): np.full(3, k, np.int16) for k in range(300)}})
    with opened(storage, "many") as checkpoint:
        reads = []
        read = checkpoint.read_segment
        monkeypatch.setattr(checkpoint, "read_segment", lambda *args: reads.append(args) or read(*args))
        assert all((checkpoint.read_tensor(f"m.{k}") == k).all() for k in range(300))
        assert len(reads) == 1


def test_several_threads_read_at_the_same_time(storage, tmp_path):
    arrays = {str(k): np.full(100 + k, k, np.int16) for k in range(60)}
    write(tmp_path / "many", {"m": arrays}, segment_bytes=3000, file_bytes=5000)
    with opened(storage, "many") as checkpoint, ThreadPoolExecutor(4) as pool:
        read = list(pool.map(checkpoint.read_tensor, [f"m.{name}" for name in arrays] * 4))
    assert all(
        array.tobytes() == expected.tobytes() for array, expected in zip(read, [*arrays.values()] * 4, strict=True)
    )


def test_more_files_than_may_be_open(storage, monkeypatch):
    monkeypatch.setattr(files, "_MOST_HANDLES", 1)
    with opened(storage) as checkpoint:
        for name in checkpoint.tensors:
            checkpoint.read_tensor(name)
        before = len(os.listdir("/proc/self/fd"))
        checkpoint.check_unchanged()
        assert len(os.listdir("/proc/self/fd")) == before


def test_every_flipped_byte_is_found(storage, tmp_path):
    """No byte of any file can change without an error of the opening or of the reading of the tensor it is in."""
    directory = tmp_path / "tiny"
    write(directory, {"m": {"a": np.arange(5.0), "b": np.arange(3)}}, file_bytes=40, segment_bytes=16, values={"x": 1})
    for path in directory.iterdir():
        content = path.read_bytes()
        with path.open("r+b", buffering=0) as changed:
            # Of the spaces that fill up a header every hundredth is tried, and of all else every byte.
            for place in (k for k in range(len(content)) if content[k : k + 1] != b" " or k % 100 == 0):
                os.pwrite(changed.fileno(), bytes([content[place] ^ (1 << place % 8)]), place)
                with pytest.raises((CheckpointDamaged, CheckpointTooNew)):
                    read_all(storage, "tiny")
                os.pwrite(changed.fileno(), content[place : place + 1], place)
    read_all(storage, "tiny")


def test_damage_names_file_range_and_tensors(storage):
    with opened(storage) as checkpoint:
        place = checkpoint.tensors["model.0.weight"]
        path = f"{checkpoint.path}/{place.file}"
        with open(path, "r+b") as changed:
            changed.seek(place.begin + 600)
            changed.write(b"\xff")
    with opened(storage) as checkpoint:
        k = checkpoint.segments(place.file).searchsorted(place.begin + 600, "right")
        begin, end = checkpoint.segments(place.file)[k - 1 : k + 1]
        with pytest.raises(
            CheckpointDamaged, match=rf"bytes {begin} to {end - 1} \(tensor 'model.0.weight'\)"
        ) as error:
            checkpoint.read_tensor("model.0.weight")
        assert (error.value.path, error.value.tensor) == (path, "model.0.weight")
        checkpoint.read_tensor("model.z")  # which is whole


def test_without_verification_digests_are_not_looked_at(storage, tmp_path):
    rewrite(tmp_path / "step-7", lambda it: dataclasses.replace(it, digest="md4"))
    with OpenedCheckpoint.open(storage, "step-7", verify=False) as checkpoint:
        assert (checkpoint.read_tensor("model.0.bias") == ARRAYS["model"]["0.bias"]).all()


def test_a_file_that_changes_while_it_is_read(storage):
    with opened(storage) as checkpoint:
        file = checkpoint.tensors["model.0.weight"].file
        with open(f"{checkpoint.path}/{file}", "ab") as changed:
            changed.write(b"more")
        with pytest.raises(CheckpointDamaged, match="was changed while it was read"):
            checkpoint.check_unchanged()


class Unheld:
    """A storage that opens each file by its path, as a store of objects does."""

    def __init__(self, storage):
        self.path, self.files, self.exists = storage.path, storage.files, storage.exists
        self.read_file, self.open_file = storage.read_file, storage.open_file


@pytest.fixture
def replace(tmp_path):
    """A function that gives the checkpoint's name to another one, as a save does."""
    for step in (8, 9):
        arrays = {bundle: {name: array + step for name, array in its.items()} for bundle, its in OTHER.items()}
        write(tmp_path / f"step-{step}", arrays, step=step)

    def replace(step):
        exchange(str(tmp_path / f"step-{step}"), str(tmp_path / "step-7"))
        remove_tree(str(tmp_path / f"step-{step}"))

    return replace


OTHER = {"model": {"a": np.zeros(3)}, "optimizer": {"b": np.zeros(3)}}


@pytest.mark.parametrize("verify_", [False, True])
@pytest.mark.parametrize("kind", [lambda storage: storage, Unheld])
def test_a_checkpoint_that_is_replaced_while_it_is_opened(storage, replace, kind, verify_, monkeypatch):
    """Once between the record and the first file, and once between two files, after which the first is not changed."""
    steps, opens = {1: 8, 3: 9}, []
    original = files.CheckpointFiles._open

    def open_(self, file):
        opens.append(file)
        if len(opens) in steps:
            replace(steps[len(opens)])
        return original(self, file)

    monkeypatch.setattr(files.CheckpointFiles, "_open", open_)
    with OpenedCheckpoint.open(kind(storage), "step-7", verify=verify_) as checkpoint:
        read = {float(value) for name in checkpoint.tensors for value in checkpoint.read_tensor(name)}
        assert (checkpoint.record.step, read) == (9, {9.0})


@pytest.mark.parametrize("kind", [lambda storage: storage, Unheld])
def test_a_checkpoint_that_is_replaced_or_removed_while_it_is_read(storage, replace, kind, monkeypatch):
    replace(8)
    with OpenedCheckpoint.open(kind(storage), "step-7", verify=False) as checkpoint:
        replace(9)
        assert [checkpoint.read_tensor(name)[0] for name in ("model.a", "optimizer.b")] == [
            8,
            8,
        ]  # their files are open
        with contextlib.suppress(files.CheckpointReplaced) if kind is Unheld else contextlib.nullcontext():
            checkpoint.check_unchanged()
            assert kind is not Unheld
    monkeypatch.setattr(files, "_MOST_HANDLES", 0)
    with opened(kind(storage)) as checkpoint:
        found = verify(kind(storage), "step-7")
        storage.remove("step-7")
        for read in (checkpoint.check_unchanged, lambda: checkpoint.read_tensor("model.a")):
            with pytest.raises(files.CheckpointReplaced, match="was replaced or removed while it was read"):
                read()
        with pytest.raises(CheckpointIncomplete, match="nothing of this name"):
            list(found)


def test_a_checkpoint_that_is_replaced_again_and_again(storage, monkeypatch):
    monkeypatch.setattr(LocalReadableDirectory, "is_current", lambda self: False)
    (Path(storage.path) / "step-7" / "optimizer.safetensors").unlink()
    before = len(os.listdir("/proc/self/fd"))
    with pytest.raises(files.CheckpointReplaced):
        opened(storage)
    assert len(os.listdir("/proc/self/fd")) == before


def test_files_that_are_gone_cut_off_or_unreadable(storage, tmp_path, monkeypatch):
    file = tmp_path / "step-7" / "optimizer.safetensors"
    content = file.read_bytes()
    file.write_bytes(content[:-1])
    with pytest.raises(CheckpointDamaged, match=rf"{file}: the file has {len(content) - 1} bytes, and had"):
        opened(storage)
    file.unlink()
    with pytest.raises(CheckpointDamaged, match="is not there"):
        opened(storage)

    def refuse(directory, file):
        raise PermissionError(13, "Permission denied")

    monkeypatch.setattr(LocalReadableDirectory, "open_file", refuse)
    with pytest.raises(CheckpointError, match="cannot be read: Permission denied"):
        opened(storage)


def both_files(tmp_path, header=None):
    """Write a bundle of two files that both have tensor "a"."""
    directory = tmp_path / "both"
    write(directory, {"m": {"a": np.zeros(4), "b": np.zeros(4)}}, file_bytes=32)
    content = encode_header({"a": ("F64", (4,))}, {}) + bytes(32)
    for name in ("m-00001-of-00002.safetensors", "m-00002-of-00002.safetensors"):
        (directory / name).write_bytes(content)
        rewrite(directory, lambda it, name=name: with_file(it, name, file_record(content)))


def with_file(record, name, its):
    return dataclasses.replace(record, files=dict(record.files) | {name: its})


def test_a_tensor_in_two_files(storage, tmp_path):
    both_files(tmp_path)
    with pytest.raises(CheckpointDamaged, match=r"tensor 'a' is also in m-00001") as error:
        opened(storage, "both")
    assert error.value.tensor == "a"


@pytest.mark.parametrize(
    ("index", "message"),
    [
        (b'{"weight_map": {"a": "m-00001-of-00002.safetensors"}}', r"tensor 'b' is in no file, and it is in 'm-00002"),
        (b'{"weight_map": {"a": 1}}', "no index"),
        (b"[" * 9999, "no JSON"),
        (b'{"weight_map": {"a": "x", "a": "x"}}', "comes twice"),
    ],
)
def test_an_index_that_says_something_else(storage, tmp_path, index, message):
    name = "m.safetensors.index.json"
    write(tmp_path / "two", {"m": {"a": np.zeros(4), "b": np.zeros(4)}}, file_bytes=32)
    (tmp_path / "two" / name).write_bytes(index)
    rewrite(tmp_path / "two", lambda it: with_file(it, name, file_record(index)))
    with pytest.raises(CheckpointDamaged, match=message):
        opened(storage, "two")


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        ({"digest": "md4"}, CheckpointTooNew, "'md4'.*: update"),
        ({"values": {"$complex128": ["model.none"]}}, CheckpointDamaged, "'model.none' is said to be complex128"),
        ({"values": {"$complex128": ["model.absent"]}}, CheckpointDamaged, "'model.absent' is said to be complex128"),
        ({"values": {"$complex128": 3}}, CheckpointDamaged, "no list of names"),
    ],
)
def test_a_record_that_does_not_fit(storage, tmp_path, change, error, message):
    rewrite(tmp_path / "step-7", lambda it: dataclasses.replace(it, **change))
    with pytest.raises(error, match=message):
        opened(storage)


@pytest.mark.parametrize("name", ["m-00001-of-00002.safetensors", "m.safetensors.index.json"])
def test_an_empty_file(storage, tmp_path, name):
    write(tmp_path / "two", {"m": {"a": np.zeros(4), "b": np.zeros(4)}}, file_bytes=32)
    (tmp_path / "two" / name).write_bytes(b"")
    rewrite(tmp_path / "two", lambda it: with_file(it, name, FileRecord(0, (), ())))
    with pytest.raises(CheckpointDamaged, match=r"a header of 0 bytes does not fit|the index is no JSON"):
        opened(storage, "two")


def test_a_segment_beyond_all_measure_and_an_index_that_is_not_listed(storage, tmp_path):
    name = "m-00001-of-00002.safetensors"
    write(tmp_path / "two", {"m": {"a": np.zeros(4), "b": np.zeros(4)}}, file_bytes=32)
    record = Record.decode((tmp_path / "two" / RECORD_NAME).read_bytes(), "f")
    rewrite(tmp_path / "two", lambda it: with_file(it, name, FileRecord(1 << 40, (1 << 40,), ("0",))))
    with pytest.raises(CheckpointDamaged, match="a segment of more than"):
        opened(storage, "two")
    no_index = {name: it for name, it in record.files.items() if not name.endswith(".json")}
    rewrite(tmp_path / "two", lambda it: dataclasses.replace(it, files=no_index))
    with pytest.raises(CheckpointDamaged, match="does not list the index"):
        opened(storage, "two")


def test_a_missing_record_says_what_is_there(storage, tmp_path):
    (tmp_path / "begun").mkdir()
    (tmp_path / "begun" / TOKEN_NAME).write_bytes(b"")
    (tmp_path / "empty").mkdir()
    (tmp_path / "notes").mkdir()
    (tmp_path / "notes" / "a.txt").write_text("a")
    (tmp_path / "foreign").mkdir()
    (tmp_path / "foreign" / "model.safetensors").write_bytes(b"")
    (tmp_path / "one.safetensors").write_bytes(b"")
    (tmp_path / "a.txt").write_bytes(b"")
    (tmp_path / "run").mkdir()
    (tmp_path / "step-7").rename(tmp_path / "run" / "step-7")
    for name, message in {
        "begun": "the save of this checkpoint goes on or was interrupted",
        "nothing": "nothing of this name",
        "empty": "the directory is empty",
        "notes": "the save did not end, or this is no checkpoint",
        "foreign": "interrupted.*ferro checkpoint convert",
        "one.safetensors": "this is a safetensors file.*ferro checkpoint convert",
        "a.txt": "this is a file",
        "run": "directory of checkpoints.*step-7",
    }.items():
        with pytest.raises(CheckpointIncomplete, match=message):
            opened(storage, name)
