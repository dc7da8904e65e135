"""Segments: whose they are, what they refuse, and that their names go."""

from __future__ import annotations

import fcntl
import os
import stat
import subprocess
import sys
import tempfile
from pathlib import Path

import pytest

from ferro_gloo.shm import segment as module
from ferro_gloo.shm.segment import NAME_BYTES, Segment, remove, room, sweep

NBYTES = 8192
OFFER = f"""
import os, pathlib, signal, sys
from ferro_gloo.shm import segment as module
module.FOLDER = pathlib.Path(sys.argv[1])
segment = module.Segment.create({NBYTES})
segment.reserve(0, {NBYTES})
print(segment.offer().hex(), flush=True)
sys.stdin.read()
os.kill(os.getpid(), signal.SIGKILL)
"""


@pytest.fixture(autouse=True)
def folder(monkeypatch):
    """Shared memory of the test's own: any other job that starts sweeps what all use."""
    with tempfile.TemporaryDirectory(dir=module.FOLDER) as name:
        monkeypatch.setattr(module, "FOLDER", Path(name))
        yield module.FOLDER


def path_of(name):
    return module.FOLDER / f"ferro-gloo-{name.hex()}"


def random_name():
    return os.urandom(NAME_BYTES)


def reserved(nbytes=NBYTES):
    segment = Segment.create(nbytes)
    segment.reserve(0, nbytes)
    return segment


@pytest.fixture
def offered_by_another(folder):
    """A segment's name, offered by a process that is killed when its input ends."""
    command = [sys.executable, "-c", OFFER, folder]
    with subprocess.Popen(
        command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    ) as owner:
        yield bytes.fromhex(owner.stdout.readline()), owner
        owner.kill()


def test_what_one_writes_the_other_reads():
    owner = reserved()
    other = Segment.open(owner.offer(), NBYTES)
    owner.withdraw()
    owner.memory[5000] = 7
    assert other.memory[5000] == 7
    assert (len(other.memory), other.nbytes) == (NBYTES, NBYTES)
    del owner
    other.memory[5001] = 8  # it lives as long as anybody has it


def test_it_is_this_users_alone():
    segment = Segment.create(NBYTES)
    found = path_of(segment.offer()).stat()
    assert stat.S_IMODE(found.st_mode) == 0o600
    assert found.st_uid == os.geteuid()


def used_bytes(name):
    return path_of(name).stat().st_blocks * 512


def test_it_takes_memory_as_that_is_reserved():
    segment = Segment.create(1 << 40)
    name = segment.offer()
    assert used_bytes(name) == 0
    segment.reserve(0, NBYTES)
    segment.reserve(NBYTES, NBYTES)
    assert used_bytes(name) == 2 * NBYTES
    other = Segment.open(name, 1 << 40)
    other.prepare(0, 2 * NBYTES)
    assert used_bytes(name) == 2 * NBYTES
    segment.memory[2 * NBYTES - 1] = 7
    assert other.memory[2 * NBYTES - 1] == 7


def test_an_old_kernel_reserves_as_well(monkeypatch):
    monkeypatch.setattr(module, "_POPULATE_WRITE", 999)
    segment = reserved()
    name = segment.offer()
    assert used_bytes(name) == NBYTES
    Segment.open(name, NBYTES).prepare(0, NBYTES)


def test_the_mode_does_not_depend_on_the_umask():
    before = os.umask(0)
    try:
        segment = Segment.create(NBYTES)
    finally:
        os.umask(before)
    assert stat.S_IMODE(path_of(segment.offer()).stat().st_mode) == 0o600


def test_a_name_is_there_from_offer_to_withdraw_only(folder):
    segment = Segment.create(NBYTES)
    assert list(folder.iterdir()) == []
    name = segment.offer()
    assert [path.name for path in folder.iterdir()] == [f"ferro-gloo-{name.hex()}"]
    assert len(name) == NAME_BYTES == 16
    segment.withdraw()
    segment.withdraw()
    assert not path_of(name).exists()
    with pytest.raises(FileNotFoundError):
        Segment.open(name, NBYTES)


def test_a_forgotten_segment_takes_its_name_and_descriptors_along():
    descriptors = len(os.listdir("/proc/self/fd"))
    segment = Segment.create(NBYTES)
    name = segment.offer()
    other = Segment.open(name, NBYTES)
    del segment, other
    assert not path_of(name).exists()
    assert len(os.listdir("/proc/self/fd")) == descriptors


def test_any_number_of_ranks_may_remove_a_name():
    segment = Segment.create(NBYTES)
    name = segment.offer()
    remove(name)
    remove(name)
    segment.withdraw()


def test_a_forked_child_leaves_the_name_to_its_parent():
    segment = Segment.create(NBYTES)
    name = segment.offer()
    child = os.fork()
    if child == 0:
        segment.withdraw()
        os._exit(0)
    assert os.waitpid(child, 0)[1] == 0
    assert path_of(name).exists()


# -- what is refused ------------------------------------------------------------------------------


@pytest.mark.parametrize("nbytes", [NBYTES - 1, NBYTES + 1, NBYTES // 2, 2 * NBYTES])
def test_another_size_is_refused(nbytes):
    segment = Segment.create(NBYTES)
    with pytest.raises(OSError, match="is not the segment that was offered"):
        Segment.open(segment.offer(), nbytes)


def test_a_symbolic_link_is_refused(tmp_path):
    target = tmp_path / "target"
    target.write_bytes(bytes(NBYTES))
    name = random_name()
    path_of(name).symlink_to(target)
    try:
        with pytest.raises(OSError, match="symbolic links"):
            Segment.open(name, NBYTES)
    finally:
        remove(name)


@pytest.mark.skipif(os.geteuid() != 0, reason="giving a file away needs root")
def test_somebody_elses_file_is_refused():
    segment = Segment.create(NBYTES)
    name = segment.offer()
    os.chown(path_of(name), 1234, 1234)
    with pytest.raises(OSError, match="is not the segment that was offered"):
        Segment.open(name, NBYTES)


def test_a_folder_is_refused():
    name = random_name()
    path_of(name).mkdir()
    try:
        with pytest.raises(OSError, match="directory"):
            Segment.open(name, NBYTES)
    finally:
        path_of(name).rmdir()


def test_refusing_leaves_no_descriptor():
    segment = Segment.create(NBYTES)
    name = segment.offer()
    before = len(os.listdir("/proc/self/fd"))
    for _ in range(3):
        with pytest.raises(OSError, match="offered"):
            Segment.open(name, NBYTES + 1)
    assert len(os.listdir("/proc/self/fd")) == before


def test_more_than_there_is_is_refused_before_it_is_taken(folder):
    left = room()
    segment = Segment.create(2 * left)
    with pytest.raises(OSError, match=r"has less than the \d+ KiB needed"):
        segment.reserve(0, 2 * left)
    assert room() > left // 2


def test_a_missing_folder_is_an_error_that_names_it(monkeypatch, tmp_path):
    monkeypatch.setattr(module, "FOLDER", tmp_path / "none")
    with pytest.raises(FileNotFoundError, match="none"):
        Segment.create(NBYTES)


# -- what killed jobs left ------------------------------------------------------------------------


def test_what_a_killed_process_offered_is_swept_by_the_next(offered_by_another):
    name, owner = offered_by_another
    sweep()
    assert path_of(name).exists(), "it is held"
    other = Segment.open(name, NBYTES)
    owner.stdin.close()
    owner.wait(10)
    sweep()
    assert path_of(name).exists(), "somebody still has it"
    del other
    sweep()
    assert not path_of(name).exists()


def left(folder, digit, mode=0o600):
    """Return a path that looks like a segment's, left behind."""
    path = folder / f"ferro-gloo-{digit * 32}"
    path.touch(mode)
    return path


def test_sweeping_leaves_alone_what_is_no_segment(folder):
    (folder / "others").write_bytes(b"x")
    (folder / "ferro-gloo-notes").write_bytes(b"x")
    (folder / f"ferro-gloo-{'a' * 32}").mkdir()
    (folder / f"ferro-gloo-{'b' * 32}").symlink_to(folder / "others")
    os.mkfifo(folder / f"ferro-gloo-{'c' * 32}", 0o600)  # opening it would wait for a writer
    left(folder, "d", mode=0o644)
    before = sorted(path.name for path in folder.iterdir())
    swept = left(folder, "e")
    sweep()
    assert not swept.exists()
    assert sorted(path.name for path in folder.iterdir()) == before


@pytest.mark.skipif(os.geteuid() != 0, reason="giving a file away needs root")
def test_sweeping_leaves_alone_what_is_another_users(folder):
    theirs = left(folder, "f")
    os.chown(theirs, 1234, 1234)
    sweep()
    assert theirs.exists()


def test_a_segment_that_is_being_swept_is_refused_not_waited_for(offered_by_another):
    name, owner = offered_by_another
    owner.stdin.close()
    owner.wait(10)
    with path_of(name).open() as swept:
        fcntl.flock(swept, fcntl.LOCK_EX)
        with pytest.raises(BlockingIOError):
            Segment.open(name, NBYTES)
