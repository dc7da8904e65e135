"""Paths and addresses mean the storage that a user expects."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from ferro_checkpoint.errors import StateError
from ferro_checkpoint.storage.local import LocalStorage
from ferro_checkpoint.storage.object_store import ObjectStorage
from ferro_checkpoint.storage.opening import open_storage, split_path

from .saves import save, step_of


def test_paths(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    for path in ("run", "run/", Path("run"), tmp_path / "run", "./run"):
        storage = open_storage(path)
        assert isinstance(storage, LocalStorage)
        save(storage, "a", 1, overwrite=True)
        assert os.listdir(tmp_path / "run") == ["a"]
    for path in ("run/a", "run/a/", tmp_path / "run" / "a", "run/./a"):
        storage, name = split_path(path)
        assert name == "a"
        assert step_of(storage, name) == 1
    monkeypatch.chdir(tmp_path / "run" / "a")
    storage, name = split_path(".")
    assert (name, os.path.realpath(storage.path)) == ("a", os.path.realpath(tmp_path / "run"))
    monkeypatch.chdir("/")
    assert step_of(storage, name) == 1


@pytest.mark.parametrize(
    ("address", "parent", "name"),
    [
        ("memory://a/b/c", "memory://a/b", "c"),
        ("memory://a/b/c/", "memory://a/b", "c"),
        ("memory://c", "memory://", "c"),
        ("memory:///c", "memory://", "c"),
        ("file:///tmp/c", "file:///tmp", "c"),
    ],
)
def test_addresses(address, parent, name):
    storage, found = split_path(address)
    assert isinstance(storage, ObjectStorage)
    assert (storage.path, found) == (parent, name)


@pytest.mark.parametrize("path", ["", "/", "a\0b", "memory://", "//"])
def test_no_paths(path):
    with pytest.raises(StateError):
        split_path(path)
