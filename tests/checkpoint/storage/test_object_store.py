"""Stores that fsspec reaches hold checkpoints whose record is written last."""

from __future__ import annotations

import os
import sys

import pytest

from ferro import PluginError
from ferro_checkpoint.errors import CheckpointDamaged, CheckpointError
from ferro_checkpoint.opened.latest import latest
from ferro_checkpoint.storage import object_calls, object_store
from ferro_checkpoint.storage.object_store import ObjectStorage

from .saves import FILE, content_of, save, step_of

fsspec = pytest.importorskip("fsspec")


@pytest.fixture(params=["memory", "file"])
def storage(request, tmp_path):
    address = f"memory://{tmp_path.name}/run" if request.param == "memory" else f"file://{tmp_path}/run"
    yield ObjectStorage(address)
    fsspec.filesystem("memory").store.clear()


def begun(storage, name="a", token="t", nbytes=20_000):
    directory = storage.new_directory(name, token)
    storage.create_directory(directory)
    directory.create(FILE, nbytes)
    return directory, directory.open(FILE, nbytes)


def test_it_is_there_when_it_is_committed(storage):
    assert storage.names() == []
    assert not storage.exists("a")
    assert not storage.writes_ranges
    save(storage, "a", 3)
    assert storage.names() == ["a"]
    assert storage.files("a") == ["ferro.json", FILE, "model.safetensors.index.json"]
    assert step_of(storage, "a") == 3
    assert latest(storage.path) == f"{storage.path}/a"
    with storage_file(storage) as file:
        into = [bytearray(size) for size in (0, 1000, 0, 5, 3000)]
        file.read_into([memoryview(part) for part in into], 4090)
        assert b"".join(into) == content_of(3)[4090 : 4090 + 4005]
        with pytest.raises(CheckpointDamaged, match="ends at byte"):
            file.read_into([memoryview(bytearray(10))], file.nbytes - 9)
    storage.remove("a")
    assert storage.names() == []


def storage_file(storage):
    from contextlib import closing

    return closing(storage.open_file("a", FILE))


def test_reads_of_several_requests(storage, monkeypatch):
    monkeypatch.setattr("ferro_checkpoint.storage.object_files._READ_BYTES", 777)
    save(storage, "a", 3)
    assert step_of(storage, "a") == 3


def test_overwriting(storage):
    save(storage, "a", 1)
    with pytest.raises(CheckpointError, match="there already"):
        save(storage, "a", 2)
    assert step_of(storage, "a") == 1
    save(storage, "a", 2, overwrite=True)
    assert step_of(storage, "a") == 2


def test_given_up(storage):
    directory, file = begun(storage)
    file.write([memoryview(bytes(100))], 0)
    with pytest.raises(CheckpointError, match="in order"):
        file.write([memoryview(bytes(100))], 50)
    with pytest.raises(CheckpointError, match="100 bytes were written, where 20000"):
        file.sync()
    file.close()
    assert storage.files("a") == [".ferro-save"]
    directory.discard()
    assert storage.files("a") == []
    assert storage.names() == []


def test_a_killed_save_makes_room_for_the_next(storage):
    begun(storage)[1].close()
    assert not storage.exists("a")
    with pytest.warns(UserWarning, match="interrupted"):
        assert latest(storage.path) is None
    save(storage, "a", 5)
    assert step_of(storage, "a") == 5


def test_the_first_of_two_saves_fails(storage):
    first = begun(storage)[0]
    second = begun(storage, token="u")[0]
    assert not first.has_token()
    with pytest.raises(CheckpointError, match="another save"):
        first.commit(b"{}", overwrite=False)
    first.discard()
    assert storage.sees(second)
    second.discard()
    assert not storage.exists("a")


def test_what_is_no_checkpoint_is_not_replaced(storage):
    store, root = fsspec.core.url_to_fs(storage.path)
    store.makedirs(f"{root}/a")
    store.pipe_file(f"{root}/a/letter", b"dear")
    with pytest.raises(CheckpointError, match="is no checkpoint"):
        save(storage, "a", 1, overwrite=True)
    assert storage.files("a") == ["letter"]


def test_another_store_is_not_seen(storage, monkeypatch):
    monkeypatch.setattr(object_store, "SEEN_S", 0.05)
    assert not storage.sees(storage.new_directory("a", "t"))


@pytest.mark.parametrize("failures", [2, 9])
def test_failures_that_pass(storage, monkeypatch, failures):
    save(storage, "a", 1)
    monkeypatch.setattr(object_calls, "_PAUSES_S", (0.0,) * 3)
    store = fsspec.core.url_to_fs(storage.path)[0]
    cat, left = type(store).cat_file, [failures]

    def failing(self, *arguments, **options):
        if left[0]:
            left[0] -= 1
            raise ConnectionResetError("the store hung up")
        return cat(self, *arguments, **options)

    monkeypatch.setattr(type(store), "cat_file", failing)
    if failures == 2:
        assert step_of(storage, "a") == 1
    else:
        with pytest.raises(CheckpointError, match="cannot be read: ConnectionResetError: the store hung up"):
            step_of(storage, "a")


def test_what_is_not_installed_is_named(monkeypatch):
    with pytest.raises(CheckpointError, match="no address"):
        ObjectStorage("nosuchstore://a/b")
    monkeypatch.setitem(sys.modules, "fsspec", None)
    with pytest.raises(PluginError, match=r"ferro-checkpoint\[fsspec\]"):
        ObjectStorage("memory://a")


def test_files_have_the_bytes_on_disk(tmp_path):
    save(ObjectStorage(f"file://{tmp_path}"), "a", 1)
    assert (tmp_path / "a" / FILE).read_bytes() == content_of(1)
    assert sorted(os.listdir(tmp_path / "a")) == ["ferro.json", FILE, "model.safetensors.index.json"]


def test_a_place_that_is_not_there_is_an_error_of_the_save(storage, monkeypatch):
    store = fsspec.core.url_to_fs(storage.path)[0]

    def failing(self, *_, **__):
        raise FileNotFoundError("The specified bucket does not exist")

    monkeypatch.setattr(type(store), "pipe_file", failing)
    with pytest.raises(CheckpointError, match=r"run/a/\.ferro-save cannot be written: .*bucket does not exist"):
        save(storage, "a", 1)
