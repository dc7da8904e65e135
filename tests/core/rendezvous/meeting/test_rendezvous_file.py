"""The rendezvous file: private, written whole, refused when others could write it."""

from __future__ import annotations

import os
import stat
import time
from threading import Thread

import pytest

from ferro.errors import RendezvousError, UsageError
from ferro.rendezvous.meeting import rendezvous_file


def soon(seconds: float = 20.0) -> float:
    return time.monotonic() + seconds


NOW = 0.0  # a deadline long past: look once


@pytest.fixture
def directory(tmp_path):
    return tmp_path / "directory"


def test_a_file_is_read_as_it_was_written(directory):
    rendezvous_file.write("job/../7 ü", "127.0.0.1:4000 ü", directory=directory)
    assert rendezvous_file.read("job/../7 ü", deadline=NOW, directory=directory) == "127.0.0.1:4000 ü"
    (file,) = directory.iterdir()
    assert stat.S_IMODE(file.stat().st_mode) == 0o600
    assert stat.S_IMODE(directory.stat().st_mode) == 0o700


def test_a_later_file_replaces_an_earlier_one(directory):
    rendezvous_file.write("a", "old", directory=directory)
    rendezvous_file.write("a", "new", directory=directory)
    rendezvous_file.write("b", "other", directory=directory)
    assert rendezvous_file.read("a", deadline=NOW, directory=directory) == "new"
    assert len(list(directory.iterdir())) == 2


def test_a_reader_waits_for_the_writer(directory, monkeypatch):
    def write_during_the_first_pause(_seconds: float) -> None:
        rendezvous_file.write("late", "here", directory=directory)

    monkeypatch.setattr(rendezvous_file.time, "sleep", write_during_the_first_pause)
    assert rendezvous_file.read("late", deadline=soon(), directory=directory) == "here"


def test_a_file_never_written_is_an_error_that_says_so(directory):
    with pytest.raises(RendezvousError, match=r"no rank wrote the rendezvous file 'x'.*rank 0"):
        rendezvous_file.read("x", deadline=soon(0.02), directory=directory)


def test_a_removed_file_is_gone_and_removing_it_again_is_no_error(directory):
    rendezvous_file.write("x", "text", directory=directory)
    rendezvous_file.remove("x", directory=directory)
    rendezvous_file.remove("x", directory=directory)
    assert list(directory.iterdir()) == []


def test_a_file_has_a_bounded_size(directory):
    rendezvous_file.write("x", "t" * 4096, directory=directory)
    with pytest.raises(UsageError, match="4096"):
        rendezvous_file.write("x", "t" * 4097, directory=directory)
    (file,) = directory.iterdir()
    file.write_bytes(b"t" * 4097)
    with pytest.raises(RendezvousError, match="longer than 4096"):
        rendezvous_file.read("x", deadline=soon(), directory=directory)


def test_readers_never_see_half_a_file(directory):
    texts = ["a" * 4000, "b" * 4000]
    rendezvous_file.write("x", texts[0], directory=directory)

    def write() -> None:
        for i in range(50):
            rendezvous_file.write("x", texts[i % 2], directory=directory)

    writer = Thread(target=write)
    writer.start()
    seen = set()
    while writer.is_alive():
        seen.add(rendezvous_file.read("x", deadline=NOW, directory=directory))
    writer.join()
    assert seen <= set(texts)
    assert seen


@pytest.mark.parametrize("mode", [0o755, 0o770, 0o701])
def test_a_directory_open_to_others_is_refused(directory, mode):
    directory.mkdir()
    directory.chmod(mode)
    for use in (
        lambda: rendezvous_file.write("x", "t", directory=directory),
        lambda: rendezvous_file.read("x", deadline=NOW, directory=directory),
        lambda: rendezvous_file.remove("x", directory=directory),
    ):
        with pytest.raises(RendezvousError, match=r"open to other users.*0700"):
            use()


def test_a_directory_of_another_user_is_refused(directory, monkeypatch):
    directory.mkdir(mode=0o700)
    monkeypatch.setattr(os, "getuid", lambda: directory.stat().st_uid + 1)
    with pytest.raises(RendezvousError, match="belongs to user id"):
        rendezvous_file.write("x", "t", directory=directory)


def test_a_directory_or_file_that_is_a_link_is_refused(directory, tmp_path):
    real = tmp_path / "real"
    real.mkdir(mode=0o700)
    directory.symlink_to(real)
    with pytest.raises(RendezvousError, match="not a directory"):
        rendezvous_file.write("x", "t", directory=directory)
    rendezvous_file.write("x", "t", directory=real)
    (file,) = real.iterdir()
    elsewhere = tmp_path / "elsewhere"
    file.rename(elsewhere)
    file.symlink_to(elsewhere)
    with pytest.raises(RendezvousError, match="symbolic link"):
        rendezvous_file.read("x", deadline=NOW, directory=real)
    rendezvous_file.write("x", "new", directory=real)  # replaces the link, not what it points to
    assert elsewhere.read_text() == "t"
    assert rendezvous_file.read("x", deadline=NOW, directory=real) == "new"


def test_a_file_that_is_a_pipe_does_not_make_readers_wait(directory):
    rendezvous_file.write("x", "t", directory=directory)
    (file,) = directory.iterdir()
    file.unlink()
    os.mkfifo(file, 0o600)
    with pytest.raises(RendezvousError, match="not a plain file"):
        rendezvous_file.read("x", deadline=NOW, directory=directory)


def test_without_any_place_to_write_the_error_names_what_helps(tmp_path, monkeypatch):
    def no_directory() -> str:
        raise FileNotFoundError(2, "No usable temporary directory found in ['/tmp']")

    for place in (no_directory, lambda: str(tmp_path / "absent")):
        monkeypatch.setattr(rendezvous_file.tempfile, "gettempdir", place)
        with pytest.raises(RendezvousError, match=r"TMPDIR.*MASTER_ADDR=127\.0\.0\.1"):
            rendezvous_file.write("x", "t")


def test_the_default_directory_is_in_the_temporary_directory(tmp_path, monkeypatch):
    monkeypatch.setattr(rendezvous_file.tempfile, "gettempdir", lambda: str(tmp_path))
    rendezvous_file.write("x", "t")
    assert [entry.name for entry in tmp_path.iterdir()] == [f"ferro-{os.getuid()}"]
    assert rendezvous_file.read("x", deadline=NOW) == "t"
    rendezvous_file.remove("x")
