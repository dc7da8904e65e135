"""What a killed save has left goes away, and nothing that a living one writes."""

from __future__ import annotations

import os
from dataclasses import replace
from pathlib import Path

import pytest

from ferro_checkpoint.storage.leftovers import OLD_S
from ferro_checkpoint.storage.local import LocalStorage
from ferro_checkpoint.storage.saver import TOKEN_NAME, Saver

from .saves import save, step_of

HERE = Saver.this("t")
ENDED = replace(HERE, started="1")  # this number was another process's


def left(path: Path, name: str, saver: Saver | None, *, age_s: float = 0.0, record: bool = False) -> None:
    directory = path / name
    directory.mkdir(parents=True)
    (directory / "model.safetensors").write_text("part")
    if record:
        (directory / "ferro.json").write_text("{}")
    if saver:
        (directory / TOKEN_NAME).write_bytes(saver.encode())
        then = os.stat(directory).st_mtime - age_s
        os.utime(directory / TOKEN_NAME, (then, then))


@pytest.mark.parametrize(
    ("saver", "age_s", "stays"),
    [
        (HERE, 0, True),
        (HERE, OLD_S + 100, True),
        (ENDED, 0, False),
        (replace(ENDED, host="another"), 0, True),
        (replace(ENDED, host="another"), OLD_S + 100, False),
        (replace(ENDED, system="another container"), 0, True),
        (None, 0, True),
    ],
)
def test_temporary_directories(tmp_path, saver, age_s, stays):
    left(tmp_path, ".tmp-a-t", saver, age_s=age_s)
    save(LocalStorage(str(tmp_path)), "b", 1)
    assert (".tmp-a-t" in os.listdir(tmp_path)) == stays


def test_names_of_others_stay(tmp_path):
    for name in (".tmp-", ".tmp-x", ".tmp-a-", ".old-x", ".hidden"):
        left(tmp_path, name, ENDED)
    before = set(os.listdir(tmp_path))
    save(LocalStorage(str(tmp_path)), "b", 1)
    assert set(os.listdir(tmp_path)) == before | {"b"}


def test_one_that_was_begun_goes_after_a_day(tmp_path):
    old, new = tmp_path / ".tmp-a-old", tmp_path / ".tmp-a-new"
    old.mkdir()
    new.mkdir()
    then = os.stat(old).st_mtime - OLD_S - 100
    os.utime(old, (then, then))
    save(LocalStorage(str(tmp_path)), "b", 1)
    assert sorted(os.listdir(tmp_path)) == [".tmp-a-new", "b"]


@pytest.mark.parametrize("saver", [HERE, ENDED], ids=["living", "ended"])
def test_taken_away_and_not_yet_replaced(tmp_path, saver):
    storage = LocalStorage(str(tmp_path))
    save(storage, "a-1", 7)
    os.rename(tmp_path / "a-1", tmp_path / ".old-a-1-t")
    left(tmp_path, ".tmp-a-1-t", saver, record=True)
    assert storage.names() == ["a-1"]
    assert storage.exists("a-1")
    assert "ferro.json" in storage.files("a-1")
    assert step_of(storage, "a-1") == 7
    save(storage, "b", 1)
    assert step_of(storage, "a-1") == 7
    expected = {"b", ".old-a-1-t", ".tmp-a-1-t"} if saver is HERE else {"b", "a-1"}
    assert set(os.listdir(tmp_path)) == expected
    storage.remove("a-1")
    assert storage.names() == ["b"]


def test_token_files():
    assert Saver.decode(HERE.encode()) == HERE
    assert HERE.has_ended() is False
    assert ENDED.has_ended() is True
    assert replace(HERE, host="another").has_ended() is None
    text = HERE.encode()
    for damaged in (
        b"",
        b"[]",
        b"{}",
        text[:-1],
        text.replace(b'"pid":', b'"pid":1'),
        text.replace(b"token", b"other"),
    ):
        saver = Saver.decode(damaged)
        assert saver is None or saver.pid != HERE.pid
