"""Segments: their owner, their checks, and the end of their names."""

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
from ferro_gloo.shm.segment import NAME_BYTES, ShmSegment, free_bytes, remove_stale_names, unlink_name

NBYTES = 8192
EXPOSE = f"""
import os, pathlib, signal, sys
from ferro_gloo.shm import segment as module
module.SHM_DIRECTORY = pathlib.Path(sys.argv[1])
segment = module.ShmSegment.create({NBYTES})
segment.reserve(0, {NBYTES})
print(segment.expose().hex(), flush=True)
sys.stdin.read()
os.kill(os.getpid(), signal.SIGKILL)
"""


@pytest.fixture(autouse=True)
def folder(monkeypatch):
    """Shared memory of the test's own: other jobs that start remove stale names."""
    with tempfile.TemporaryDirectory(dir=module.SHM_DIRECTORY) as name:
        monkeypatch.setattr(module, "SHM_DIRECTORY", Path(name))
        yield module.SHM_DIRECTORY


def path_of(name):
    return module.SHM_DIRECTORY / f"ferro-gloo-{name.hex()}"


def random_name():
    return os.urandom(NAME_BYTES)


def reserved(nbytes=NBYTES):
    segment = ShmSegment.create(nbytes)
    segment.reserve(0, nbytes)
    return segment


@pytest.fixture
def exposed_by_another(folder):
    """The name of a segment, exposed by a process that is killed when its input ends."""
    command = [sys.executable, "-c", EXPOSE, folder]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as owner:
        yield bytes.fromhex(owner.stdout.readline()), owner
        owner.kill()


def test_what_one_writes_the_other_reads():
    owner = reserved()
    other = ShmSegment.open(owner.expose(), NBYTES)
    owner.unlink()
    owner.memory[5000] = 7
    assert other.memory[5000] == 7
    assert (len(other.memory), other.nbytes) == (NBYTES, NBYTES)
    del owner
    other.memory[5001] = 8  # it lives as long as anybody has it


def test_it_is_this_users_alone():
    segment = ShmSegment.create(NBYTES)
    found = path_of(segment.expose()).stat()
    assert stat.S_IMODE(found.st_mode) == 0o600
    assert found.st_uid == os.geteuid()


def used_bytes(name):
    return path_of(name).stat().st_blocks * 512


def test_it_takes_memory_as_that_is_reserved():
    segment = ShmSegment.create(1 << 40)
    name = segment.expose()
    assert used_bytes(name) == 0
    segment.reserve(0, NBYTES)
    segment.reserve(NBYTES, NBYTES)
    assert used_bytes(name) == 2 * NBYTES
    other = ShmSegment.open(name, 1 << 40)
    other.prefault(0, 2 * NBYTES)
    assert used_bytes(name) == 2 * NBYTES
    segment.memory[2 * NBYTES - 1] = 7
    assert other.memory[2 * NBYTES - 1] == 7


def test_an_old_kernel_reserves_as_well(monkeypatch):
    monkeypatch.setattr(module, "_POPULATE_WRITE", 999)
    segment = reserved()
    name = segment.expose()
    assert used_bytes(name) == NBYTES
    ShmSegment.open(name, NBYTES).prefault(0, NBYTES)


def test_the_mode_does_not_depend_on_the_umask():
    before = os.umask(0)
    try:
        segment = ShmSegment.create(NBYTES)
    finally:
        os.umask(before)
    assert stat.S_IMODE(path_of(segment.expose()).stat().st_mode) == 0o600


def test_a_name_is_there_from_expose_to_unlink_only(folder):
    segment = ShmSegment.create(NBYTES)
    assert list(folder.iterdir()) == []
    name = segment.expose()
    assert [path.name for path in folder.iterdir()] == [f"ferro-gloo-{name.hex()}"]
    assert len(name) == NAME_BYTES == 16
    segment.unlink()
    segment.unlink()
    assert not path_of(name).exists()
    with pytest.raises(FileNotFoundError):
        ShmSegment.open(name, NBYTES)


def test_a_deleted_segment_frees_its_name_and_descriptors():
    descriptors = len(os.listdir("/proc/self/fd"))
    segment = ShmSegment.create(NBYTES)
    name = segment.expose()
    other = ShmSegment.open(name, NBYTES)
    del segment, other
    assert not path_of(name).exists()
    assert len(os.listdir("/proc/self/fd")) == descriptors


def test_any_number_of_ranks_may_unlink_a_name():
    segment = ShmSegment.create(NBYTES)
    name = segment.expose()
    unlink_name(name)
    unlink_name(name)
    segment.unlink()


def test_a_forked_child_leaves_the_name_to_its_parent():
    segment = ShmSegment.create(NBYTES)
    name = segment.expose()
    child = os.fork()
    if child == 0:
        segment.unlink()
        os._exit(0)
    assert os.waitpid(child, 0)[1] == 0
    assert path_of(name).exists()


# -- what is refused ------------------------------------------------------------------------------


@pytest.mark.parametrize("nbytes", [NBYTES - 1, NBYTES + 1, NBYTES // 2, 2 * NBYTES])
def test_another_size_is_refused(nbytes):
    segment = ShmSegment.create(NBYTES)
    with pytest.raises(OSError, match="is not the segment that was offered"):
        ShmSegment.open(segment.expose(), nbytes)


def test_a_symbolic_link_is_refused(tmp_path):
    target = tmp_path / "target"
    target.write_bytes(bytes(NBYTES))
    name = random_name()
    path_of(name).symlink_to(target)
    try:
        with pytest.raises(OSError, match="symbolic links"):
            ShmSegment.open(name, NBYTES)
    finally:
        unlink_name(name)


@pytest.mark.skipif(os.geteuid() != 0, reason="giving a file away needs root")
def test_somebody_elses_file_is_refused():
    segment = ShmSegment.create(NBYTES)
    name = segment.expose()
    os.chown(path_of(name), 1234, 1234)
    with pytest.raises(OSError, match="is not the segment that was offered"):
        ShmSegment.open(name, NBYTES)


def test_a_folder_is_refused():
    name = random_name()
    path_of(name).mkdir()
    try:
        with pytest.raises(OSError, match="directory"):
            ShmSegment.open(name, NBYTES)
    finally:
        path_of(name).rmdir()


def test_refusing_leaves_no_descriptor():
    segment = ShmSegment.create(NBYTES)
    name = segment.expose()
    before = len(os.listdir("/proc/self/fd"))
    for _ in range(3):
        with pytest.raises(OSError, match="offered"):
            ShmSegment.open(name, NBYTES + 1)
    assert len(os.listdir("/proc/self/fd")) == before


def test_more_than_there_is_is_refused_before_it_is_reserved(folder):
    left = free_bytes()
    segment = ShmSegment.create(2 * left)
    with pytest.raises(OSError, match=r"has less than the \d+ KiB needed"):
        segment.reserve(0, 2 * left)
    assert free_bytes() > left // 2


def test_a_missing_folder_is_an_error_that_names_it(monkeypatch, tmp_path):
    monkeypatch.setattr(module, "SHM_DIRECTORY", tmp_path / "none")
    with pytest.raises(FileNotFoundError, match="none"):
        ShmSegment.create(NBYTES)


# -- what killed jobs left ------------------------------------------------------------------------


def test_the_name_of_a_killed_process_is_removed_by_the_next(exposed_by_another):
    name, owner = exposed_by_another
    remove_stale_names()
    assert path_of(name).exists(), "it is held"
    other = ShmSegment.open(name, NBYTES)
    owner.stdin.close()
    owner.wait(10)
    remove_stale_names()
    assert path_of(name).exists(), "somebody still has it"
    del other
    remove_stale_names()
    assert not path_of(name).exists()


def left(folder, digit, mode=0o600):
    """Return a path that looks like the stale name of a segment."""
    path = folder / f"ferro-gloo-{digit * 32}"
    path.touch(mode)
    return path


def test_only_segments_are_stale_names(folder):
    (folder / "others").write_bytes(b"x")
    (folder / "ferro-gloo-notes").write_bytes(b"x")
    (folder / f"ferro-gloo-{'a' * 32}").mkdir()
    (folder / f"ferro-gloo-{'b' * 32}").symlink_to(folder / "others")
    os.mkfifo(folder / f"ferro-gloo-{'c' * 32}", 0o600)  # opening it would wait for a writer
    left(folder, "d", mode=0o644)
    before = sorted(path.name for path in folder.iterdir())
    removed = left(folder, "e")
    remove_stale_names()
    assert not removed.exists()
    assert sorted(path.name for path in folder.iterdir()) == before


@pytest.mark.skipif(os.geteuid() != 0, reason="giving a file away needs root")
def test_another_users_names_are_left_alone(folder):
    theirs = left(folder, "f")
    os.chown(theirs, 1234, 1234)
    remove_stale_names()
    assert theirs.exists()


def test_a_segment_that_is_being_removed_is_refused_not_waited_for(exposed_by_another):
    name, owner = exposed_by_another
    owner.stdin.close()
    owner.wait(10)
    with path_of(name).open() as removed:
        fcntl.flock(removed, fcntl.LOCK_EX)
        with pytest.raises(BlockingIOError):
            ShmSegment.open(name, NBYTES)
