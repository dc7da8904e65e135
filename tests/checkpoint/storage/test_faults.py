"""A fault at any call that changes the disk leaves the checkpoints that were there, and the next save succeeds."""

from __future__ import annotations

import contextlib
import errno
import os
import signal
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from ferro_checkpoint.errors import CheckpointError
from ferro_checkpoint.storage.local import LocalStorage
from ferro_testing import run_ranks, run_ranks_outcomes

from .. import faults
from ..faults import Fault
from .saves import save, step_of


@pytest.fixture
def directory(tmp_path: Path) -> Iterator[Path]:
    """A directory in memory, if there is one: hundreds of saves sync their files, and a disk may be busy."""
    if not os.path.isdir("/dev/shm"):
        yield tmp_path
        return
    with tempfile.TemporaryDirectory(dir="/dev/shm") as path:
        yield Path(path)


MODES = ["new", "overwrite", "overwrite without exchange"]


def prepared(path: str, mode: str) -> tuple[LocalStorage, Callable[[], None]]:
    """Return storage with a checkpoint of step 1, and the save of step 2."""
    storage = LocalStorage(path)
    save(storage, "before", 1)
    name = "new" if mode == "new" else "before"

    def next_save() -> None:
        with faults.without_exchange() if "without" in mode else contextlib.nullcontext():
            save(storage, name, 2, overwrite=mode != "new", token="next")

    return storage, next_save


def killed(function: Callable[[], None], fault: Fault) -> bool:
    """Run a function in a process that a fault kills; return False if it ended before the fault."""
    pid = os.fork()
    if pid == 0:
        try:
            faults.install(fault)
            function()
        finally:
            os._exit(0)
    status = os.waitpid(pid, 0)[1]
    return os.WIFSIGNALED(status) and os.WTERMSIG(status) == signal.SIGKILL


def error_of(function: Callable[[], None], fault: Fault) -> str:
    try:
        with faults.injected(fault):
            function()
    except CheckpointError as error:
        return str(error)
    return ""


@pytest.mark.parametrize("mode", MODES)
def test_killed_at_every_call(directory, mode):
    storage, next_save = prepared(str(directory / "counted"), mode)
    count = len(faults.counted(next_save))
    assert count > 15
    seen = set()
    for k in range(count):
        storage, next_save = prepared(str(directory / str(k)), mode)
        assert killed(next_save, Fault(at=k, half=True))
        assert set(storage.names()) <= {"before", "new"}
        seen.add(step_of(storage, "before"))
        if "new" in storage.names():
            assert step_of(storage, "new") == 2  # it has its name, and is whole
        leftovers = os.listdir(storage.path)
        save(storage, "later", 3)
        assert step_of(storage, "before") in (1, 2)
        left = {name for name in os.listdir(storage.path) if name.startswith(".")}
        if k < 3:  # there was no whole token file yet, which says whether the process has ended
            assert left <= set(leftovers)
        else:
            assert not left, (k, leftovers)
    assert seen == ({1} if mode == "new" else {1, 2})


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("number", [errno.ENOSPC, errno.EACCES])
def test_an_error_at_every_call(directory, mode, number):
    storage, next_save = prepared(str(directory / "counted"), mode)
    count = len(faults.counted(next_save))
    for k in range(count):
        storage, next_save = prepared(str(directory / str(k)), mode)
        error = error_of(next_save, Fault(at=k, errno=number, half=True))
        if error:
            assert os.strerror(number) in error
            assert storage.names() == ["before"]
            assert step_of(storage, "before") == 1
            assert os.listdir(storage.path) == ["before"]  # nothing was left
        else:
            assert step_of(storage, "new" if mode == "new" else "before") == 2  # it was cleaning up
            save(storage, "later", 3)
            assert not any(name.startswith(".") for name in os.listdir(storage.path))


def test_a_disk_that_stays_full_keeps_what_was_there(tmp_path):
    storage, next_save = prepared(str(tmp_path), "overwrite")
    fills = ("make_directory", "create_file", "reserve", "write")
    with (
        faults.injected(Fault(at=4, errno=errno.ENOSPC, only=fills, lasting=True)),
        pytest.raises(CheckpointError, match="free some space"),
    ):
        next_save()
    assert step_of(storage, "before") == 1
    assert os.listdir(storage.path) == ["before"]


def test_killed_while_it_is_removed(directory):
    storage = LocalStorage(str(directory))
    save(storage, "counted", 1)
    count = len(faults.counted(lambda: storage.remove("counted")))
    for k in range(1, count):
        save(storage, "a", 1)
        assert killed(lambda: storage.remove("a"), Fault(at=k))
        if storage.exists("a"):
            assert step_of(storage, "a") == 1  # it is whole
            storage.remove("a")
        else:
            with pytest.raises(FileNotFoundError):
                storage.read_file("a", "ferro.json", 1 << 20)
        save(storage, "a", 2)
        assert step_of(storage, "a") == 2
        assert os.listdir(directory) == ["a"]
        storage.remove("a")


def writes_half(group, path: str, fatal: int) -> None:
    """Write one file on two ranks, the second of which is killed at its write of this index."""
    storage = LocalStorage(path)
    directory = storage.new_directory("a", "t")
    if group.rank == 0:
        storage.create_directory(directory)
        directory.create("f", 1000)
    group.barrier()
    assert storage.sees(directory)
    calls = faults.install(Fault(at=fatal, only=("write",)) if group.rank == 1 else None)
    with directory.open("f", 1000) as file:
        for begin in range(500 * group.rank, 500 * (group.rank + 1), 100):
            file.write([memoryview(bytes([group.rank]) * 100)], begin)
        file.sync()
    assert calls.names == ["write"] * 5 + ["sync_data"] * (group.rank == 0)
    group.barrier()
    if group.rank == 0:
        directory.commit(b"{}", overwrite=False)


def test_in_ranks(tmp_path):
    run_ranks(writes_half, 2, backend="gloo", args=[str(tmp_path / "whole"), 5], timeout_s=60)
    assert (tmp_path / "whole" / "a" / "f").read_bytes() == bytes(500) + b"\1" * 500
    outcomes = run_ranks_outcomes(writes_half, 2, backend="gloo", args=[str(tmp_path / "half"), 3], timeout_s=60)
    assert not outcomes[0].ok
    assert outcomes[1].signal == "SIGKILL"
    assert LocalStorage(str(tmp_path / "half")).names() == []
    assert (tmp_path / "half" / ".tmp-a-t" / "f").read_bytes()[500:] == b"\1" * 300 + bytes(200)
