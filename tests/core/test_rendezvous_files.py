"""The rendezvous file and the secret: private, written whole, refused when others could write."""

from __future__ import annotations

import os
import stat
import subprocess
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from threading import Barrier, Thread

import pytest

from ferro.errors import AuthenticationError, RendezvousError, UsageError
from ferro.rendezvous import derive, per_user_secret
from ferro.rendezvous.meeting import rendezvous_file


def soon(seconds: float = 20.0) -> float:
    return time.monotonic() + seconds


NOW = 0.0  # a deadline long past: look once


@pytest.fixture
def board(tmp_path):
    return tmp_path / "board"


def test_a_note_is_read_as_it_was_posted(board):
    rendezvous_file.post("job/../7 ü", "127.0.0.1:4000 ü", directory=board)
    assert rendezvous_file.read("job/../7 ü", deadline=NOW, directory=board) == "127.0.0.1:4000 ü"
    (note,) = board.iterdir()
    assert stat.S_IMODE(note.stat().st_mode) == 0o600
    assert stat.S_IMODE(board.stat().st_mode) == 0o700


def test_a_later_note_replaces_an_earlier_one(board):
    rendezvous_file.post("a", "old", directory=board)
    rendezvous_file.post("a", "new", directory=board)
    rendezvous_file.post("b", "other", directory=board)
    assert rendezvous_file.read("a", deadline=NOW, directory=board) == "new"
    assert len(list(board.iterdir())) == 2


def test_a_reader_waits_for_the_post(board, monkeypatch):
    def post_during_the_first_pause(_seconds: float) -> None:
        rendezvous_file.post("late", "here", directory=board)

    monkeypatch.setattr(rendezvous_file.time, "sleep", post_during_the_first_pause)
    assert rendezvous_file.read("late", deadline=soon(), directory=board) == "here"


def test_a_note_never_posted_is_an_error_that_says_so(board):
    with pytest.raises(RendezvousError, match=r"nobody posted 'x'.*rank 0"):
        rendezvous_file.read("x", deadline=soon(0.02), directory=board)


def test_a_removed_note_is_gone_and_removing_it_again_is_no_error(board):
    rendezvous_file.post("x", "text", directory=board)
    rendezvous_file.remove("x", directory=board)
    rendezvous_file.remove("x", directory=board)
    assert list(board.iterdir()) == []


def test_a_note_has_a_bounded_size(board):
    rendezvous_file.post("x", "t" * 4096, directory=board)
    with pytest.raises(UsageError, match="4096"):
        rendezvous_file.post("x", "t" * 4097, directory=board)
    (note,) = board.iterdir()
    note.write_bytes(b"t" * 4097)
    with pytest.raises(RendezvousError, match="longer than 4096"):
        rendezvous_file.read("x", deadline=soon(), directory=board)


def test_readers_never_see_half_a_note(board):
    texts = ["a" * 4000, "b" * 4000]
    rendezvous_file.post("x", texts[0], directory=board)

    def write() -> None:
        for i in range(50):
            rendezvous_file.post("x", texts[i % 2], directory=board)

    writer = Thread(target=write)
    writer.start()
    seen = set()
    while writer.is_alive():
        seen.add(rendezvous_file.read("x", deadline=NOW, directory=board))
    writer.join()
    assert seen <= set(texts)
    assert seen


@pytest.mark.parametrize("mode", [0o755, 0o770, 0o701])
def test_a_board_open_to_others_is_refused(board, mode):
    board.mkdir()
    board.chmod(mode)
    for use in (
        lambda: rendezvous_file.post("x", "t", directory=board),
        lambda: rendezvous_file.read("x", deadline=NOW, directory=board),
        lambda: rendezvous_file.remove("x", directory=board),
    ):
        with pytest.raises(RendezvousError, match=r"open to other users.*0700"):
            use()


def test_a_board_of_another_user_is_refused(board, monkeypatch):
    board.mkdir(mode=0o700)
    monkeypatch.setattr(os, "getuid", lambda: board.stat().st_uid + 1)
    with pytest.raises(RendezvousError, match="belongs to user id"):
        rendezvous_file.post("x", "t", directory=board)


def test_a_board_or_note_that_is_a_link_is_refused(board, tmp_path):
    real = tmp_path / "real"
    real.mkdir(mode=0o700)
    board.symlink_to(real)
    with pytest.raises(RendezvousError, match="not a directory"):
        rendezvous_file.post("x", "t", directory=board)
    rendezvous_file.post("x", "t", directory=real)
    (note,) = real.iterdir()
    elsewhere = tmp_path / "elsewhere"
    note.rename(elsewhere)
    note.symlink_to(elsewhere)
    with pytest.raises(RendezvousError, match="symbolic link"):
        rendezvous_file.read("x", deadline=NOW, directory=real)
    rendezvous_file.post("x", "new", directory=real)  # replaces the link, not what it points to
    assert elsewhere.read_text() == "t"
    assert rendezvous_file.read("x", deadline=NOW, directory=real) == "new"


def test_a_note_that_is_a_pipe_does_not_make_readers_wait(board):
    rendezvous_file.post("x", "t", directory=board)
    (note,) = board.iterdir()
    note.unlink()
    os.mkfifo(note, 0o600)
    with pytest.raises(RendezvousError, match="not a plain file"):
        rendezvous_file.read("x", deadline=NOW, directory=board)


def test_the_default_board_is_in_the_temporary_directory(tmp_path, monkeypatch):
    monkeypatch.setattr(rendezvous_file.tempfile, "gettempdir", lambda: str(tmp_path))
    rendezvous_file.post("x", "t")
    assert [entry.name for entry in tmp_path.iterdir()] == [f"ferro-{os.getuid()}"]
    assert rendezvous_file.read("x", deadline=NOW) == "t"
    rendezvous_file.remove("x")


def test_the_secret_is_made_once_and_kept_private(tmp_path):
    first = per_user_secret(tmp_path)
    assert len(first) == 32
    assert per_user_secret(tmp_path) == first
    path = tmp_path / ".ferro" / "secret"
    assert stat.S_IMODE(path.stat().st_mode) == 0o600
    assert stat.S_IMODE(path.parent.stat().st_mode) == 0o700
    assert path.read_text() == first.hex() + "\n"
    assert os.listdir(path.parent) == ["secret"]


def test_ranks_that_make_it_at_once_end_with_the_same(tmp_path):
    for attempt in range(10):
        home = tmp_path / str(attempt)
        home.mkdir()
        barrier = Barrier(8, timeout=20)

        def make(_rank: int, home: Path = home, barrier: Barrier = barrier) -> bytes:
            barrier.wait()
            return per_user_secret(home)

        with ThreadPoolExecutor(8) as pool:
            assert len(set(pool.map(make, range(8)))) == 1
        assert os.listdir(home / ".ferro") == ["secret"]


def test_processes_that_make_it_at_once_end_with_the_same(tmp_path):
    program = (
        "import pathlib, sys; from ferro.rendezvous import per_user_secret;"
        "print(per_user_secret(pathlib.Path(sys.argv[1])).hex())"
    )
    command = [sys.executable, "-c", program, str(tmp_path)]
    ranks = [subprocess.Popen(command, stdout=subprocess.PIPE, text=True) for _ in range(3)]
    outputs = {rank.communicate(timeout=30)[0] for rank in ranks}
    assert outputs == {per_user_secret(tmp_path).hex() + "\n"}


@pytest.mark.parametrize("mode", [0o640, 0o604, 0o620])
def test_a_secret_open_to_others_is_refused_with_the_remedy(tmp_path, mode):
    per_user_secret(tmp_path)
    path = tmp_path / ".ferro" / "secret"
    path.chmod(mode)
    with pytest.raises(AuthenticationError, match=rf"open to other users.*chmod 600 {path}"):
        per_user_secret(tmp_path)


def test_a_secret_of_another_user_is_refused(tmp_path, monkeypatch):
    per_user_secret(tmp_path)
    owner = os.getuid()
    monkeypatch.setattr(os, "getuid", lambda: owner + 1)
    with pytest.raises(AuthenticationError, match="belongs to user id"):
        per_user_secret(tmp_path)


@pytest.mark.parametrize("content", [b"", b"ab\n", b"zz" * 32, b"\xff" * 64, b"a" * 4096])
def test_a_damaged_secret_is_refused_and_kept(tmp_path, content):
    per_user_secret(tmp_path)
    path = tmp_path / ".ferro" / "secret"
    path.write_bytes(content)
    with pytest.raises(AuthenticationError, match="remove it"):
        per_user_secret(tmp_path)
    assert path.read_bytes() == content


def test_a_secret_that_is_a_link_is_refused_even_to_nowhere(tmp_path):
    (tmp_path / ".ferro").mkdir()
    (tmp_path / ".ferro" / "secret").symlink_to(tmp_path / "nowhere")
    with pytest.raises(AuthenticationError, match="symbolic link"):
        per_user_secret(tmp_path)
    assert not (tmp_path / "nowhere").exists()


def test_without_a_home_the_other_ways_are_named(tmp_path):
    with pytest.raises(AuthenticationError, match="FERRO_SECRET"):
        per_user_secret(tmp_path / "nobody")


def test_each_job_has_its_own_secret():
    secret = bytes(32)
    assert derive(secret, "job 1") == derive(secret, "job 1")
    assert len({derive(secret, "job 1"), derive(secret, "job 2"), derive(b"x", "job 1")}) == 3
    assert len(derive(secret, "job 1")) == 32
