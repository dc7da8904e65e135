"""Directories on a disk are there as a whole or not at all, whatever is in the way."""

from __future__ import annotations

import os
import stat
import subprocess
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import pytest

from ferro_checkpoint.errors import CheckpointDamaged, CheckpointError, StateError
from ferro_checkpoint.storage import local, local_files, system_calls
from ferro_checkpoint.storage.local import LocalStorage
from ferro_checkpoint.storage.local_files import LocalReadableFile

from .. import faults
from .saves import FILE, content_of, save, step_of


@pytest.fixture
def storage(tmp_path: Path) -> LocalStorage:
    return LocalStorage(str(tmp_path / "run" / "checkpoints"))


def test_it_is_there_when_it_is_committed(storage):
    assert storage.names() == []
    content = content_of(3)
    directory = storage.new_directory("a", "t")
    storage.create_directory(directory)
    assert storage.sees(directory)
    directory.create(FILE, len(content))
    with directory.open(FILE, len(content)) as file:
        file.write([memoryview(content)], 0)
        file.sync()
    assert storage.names() == []
    assert not storage.exists("a")
    directory.commit(b"{}", overwrite=False)
    assert storage.names() == ["a"]
    assert storage.exists("a")
    assert storage.files("a") == ["ferro.json", FILE]
    assert os.listdir(storage.path) == ["a"]
    assert Path(storage.path, "a", FILE).read_bytes() == content


def test_ranges_in_any_order_from_many_buffers(storage):
    data = np.random.default_rng(0).integers(0, 256, 9_000_000, np.uint8).tobytes()
    directory = storage.new_directory("a", "t")
    storage.create_directory(directory)
    directory.create("f", len(data))
    with directory.open("f", len(data)) as one, directory.open("f", len(data)) as other:
        other.write([memoryview(data)[5_000_000:]], 5_000_000)
        pieces = [memoryview(data)[k : k + 1000] for k in range(0, 5_000_000, 1000)]  # more than one call takes
        one.write([*pieces, memoryview(b"")], 0)
        one.sync()
        other.sync()
    path = os.path.join(directory.path, "f")
    assert Path(path).read_bytes() == data
    with LocalReadableFile(path) as file:
        assert file.nbytes == len(data)
        into = [bytearray(size) for size in (0, 3_000_000, 0, *[700] * 3000, 11, 0)]
        file.read_into([memoryview(part) for part in into], 17)
        read = b"".join(into)
        assert read == data[17 : 17 + len(read)]
        with pytest.raises(CheckpointDamaged, match="ends at byte 9000000"):
            file.read_into([memoryview(bytearray(10))], len(data) - 9)
        file.read_into([], len(data))


def test_threads_write_one_file(storage, monkeypatch):
    data = np.random.default_rng(1).integers(0, 256, 3_000_000, np.uint8).tobytes()
    directory = storage.new_directory("a", "t")
    storage.create_directory(directory)
    directory.create("f", len(data))
    started = []
    monkeypatch.setattr(local_files, "_WRITE_BACK_BYTES", 40_000)
    monkeypatch.setattr(local_files, "_LEAST_BYTES", 10_000)
    monkeypatch.setattr(
        system_calls, "start_writing_back", lambda fd, begin, size: started.append((begin, begin + size))
    )
    with directory.open("f", len(data)) as file, ThreadPoolExecutor(4) as pool:

        def write(begin: int) -> None:
            file.write([memoryview(data)[begin : begin + 15_000]], begin)

        list(pool.map(write, range(0, len(data), 15_000)))
    assert Path(directory.path, "f").read_bytes() == data
    assert started
    assert len({begin for begin, _ in started}) == len(started)  # no range twice
    assert sum(end - begin for begin, end in started) <= len(data)


def test_short_writes_and_reads_go_on(storage, monkeypatch):
    write, preadv = os.pwritev, os.preadv
    monkeypatch.setattr(os, "pwritev", lambda fd, parts, at: write(fd, [parts[0][:777]], at))
    monkeypatch.setattr(os, "preadv", lambda fd, parts, at: preadv(fd, [parts[0][:555]], at))
    save(storage, "a", 4)
    assert step_of(storage, "a") == 4


def test_modes_follow_the_umask(storage):
    before = os.umask(0o027)
    try:
        save(storage, "a", 1)
    finally:
        os.umask(before)
    assert stat.S_IMODE(os.stat(os.path.join(storage.path, "a")).st_mode) == 0o750
    assert stat.S_IMODE(os.stat(os.path.join(storage.path, "a", FILE)).st_mode) == 0o640


@pytest.mark.parametrize("exchange", [True, False])
def test_overwriting(storage, exchange):
    save(storage, "a", 1)
    with pytest.raises(CheckpointError, match="there already"):
        save(storage, "a", 2)
    assert step_of(storage, "a") == 1
    if exchange:
        save(storage, "a", 2, overwrite=True)
    else:
        with faults.without_exchange():
            save(storage, "a", 2, overwrite=True)
    assert step_of(storage, "a") == 2
    assert os.listdir(storage.path) == ["a"]


def test_what_is_no_checkpoint_is_not_replaced(storage):
    other = Path(storage.path, "home")
    other.mkdir(parents=True)
    save(storage, "home", 1)  # an empty directory may be there
    storage.remove("home")
    other.mkdir()
    (other / "letter").write_text("dear")
    with pytest.raises(CheckpointError, match="is no checkpoint"):
        save(storage, "home", 1, overwrite=True)
    assert os.listdir(storage.path) == ["home"]
    assert (other / "letter").read_text() == "dear"


def test_paths_that_cannot_be(tmp_path, storage):
    (tmp_path / "file").write_text("")
    (tmp_path / "nowhere").symlink_to(tmp_path / "missing")
    (tmp_path / "link").symlink_to(tmp_path)
    for path, what in [("file", "is a file"), ("file/deeper/still", "is a file"), ("nowhere", "leads nowhere")]:
        with pytest.raises(CheckpointError, match=what):
            save(LocalStorage(str(tmp_path / path)), "a", 1)
    for name, what in [("file", "is a file"), ("link", "is a link"), ("nowhere", "is a link")]:
        with pytest.raises(CheckpointError, match=what):
            save(LocalStorage(str(tmp_path)), name, 1, overwrite=True)
    for name in ("", ".", "..", "a/b", "a\0", ".tmp-a-b", ".old-a-b", "ferro.json", "n" * 250):
        with pytest.raises(StateError, match="name"):
            storage.new_directory(name, "t")
    with pytest.raises(StateError, match="token"):
        storage.new_directory("a", "t-u")
    with pytest.raises(CheckpointDamaged, match="no name"):
        storage.open_file("a", "../b")
    assert sorted(os.listdir(tmp_path)) == ["file", "link", "nowhere"]


def test_what_is_read_must_be_a_file(storage):
    save(storage, "a", 1)
    os.mkfifo(os.path.join(storage.path, "a", "pipe"))
    for name in ("pipe", "."):
        with pytest.raises(CheckpointDamaged, match="no"):
            storage.read_file("a", name, 10)
    with pytest.raises(FileNotFoundError):
        storage.read_file("b", FILE, 10)
    with pytest.raises(CheckpointDamaged, match="cannot have more than 10"):
        storage.read_file("a", FILE, 10)


def test_another_disk_is_not_seen(storage, tmp_path, monkeypatch):
    monkeypatch.setattr(local, "SEEN_S", 0.1)
    directory = storage.new_directory("a", "t")
    storage.create_directory(directory)
    other = LocalStorage(str(tmp_path / "other"))
    assert not other.sees(other.new_directory("a", "t"))
    os.mkdir(other.path)
    os.mkdir(os.path.join(other.path, os.path.basename(directory.path)))
    assert not other.sees(other.new_directory("a", "t"))
    assert storage.sees(storage.new_directory("a", "t"))


def test_removing(storage, tmp_path):
    save(storage, "a", 1)
    inner = Path(storage.path, "a", "inner")
    inner.mkdir()
    outside = tmp_path / "outside"
    outside.mkdir()
    (outside / "kept").write_text("")
    (inner / "link").symlink_to(outside)
    calls = faults.counted(lambda: storage.remove("a"))
    assert [name for name, _ in calls.made[:2]] == ["rename", "remove_file"]
    assert calls.made[1][1].endswith("/ferro.json")
    assert os.listdir(storage.path) == []
    assert os.listdir(outside) == ["kept"]
    (Path(storage.path) / "link").symlink_to(outside)
    with pytest.raises(CheckpointError, match="is a link"):
        storage.remove("link")
    assert storage.names() == []


def test_full_disk(tmp_path):
    mounted = subprocess.run(
        ["mount", "-t", "tmpfs", "-o", "size=1m", "tmpfs", str(tmp_path)], check=False, capture_output=True
    )
    if mounted.returncode:
        pytest.skip("cannot mount a small tmpfs")
    try:
        storage = LocalStorage(str(tmp_path))
        save(storage, "a", 1)
        directory = storage.new_directory("b", "t")
        storage.create_directory(directory)
        with pytest.raises(CheckpointError, match="free some space"):
            directory.create("f", 2 << 20)
        directory.discard()
        assert os.listdir(tmp_path) == ["a"]
        Path(tmp_path, "filling").write_bytes(bytes((1 << 20) - (7 << 12)))
        with pytest.raises(CheckpointError, match="No space left") as raised:
            [save(storage, f"s{step}", step) for step in range(2, 100)]
        assert isinstance(raised.value.__cause__, OSError)
        assert step_of(storage, "a") == 1
        assert not any(name.startswith(".") for name in os.listdir(tmp_path))
    finally:
        subprocess.run(["umount", str(tmp_path)], check=True, timeout=30)


def test_the_place_on_disk_is_taken_at_once(storage):
    directory = storage.new_directory("a", "t")
    storage.create_directory(directory)
    directory.create("f", 1 << 20)
    about = os.stat(os.path.join(directory.path, "f"))
    assert about.st_size == 1 << 20
    with pytest.raises(CheckpointError, match="where 5 were to be"):
        directory.open("f", 5)
    directory.discard()
    assert os.listdir(storage.path) == []
