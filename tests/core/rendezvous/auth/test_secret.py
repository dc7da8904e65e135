"""The user's secret: private, written whole, refused when others could write it."""

from __future__ import annotations

import os
import stat
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from threading import Barrier

import pytest

from ferro.errors import AuthenticationError
from ferro.rendezvous import derive, per_user_secret


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
