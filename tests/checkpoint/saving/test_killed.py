"""A save that is killed or fails at any call that changes the disk: the checkpoint before it is whole, and is found."""

from __future__ import annotations

import contextlib
import errno
import os
import shutil
import signal
import tempfile
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest

import ferro
import ferro_checkpoint
from ferro_checkpoint import SaveFailed
from ferro_checkpoint.opened.latest import latest
from ferro_testing import run_ranks, run_ranks_outcomes

from .. import faults
from ..faults import Fault

MODES = ["beside", "overwrite"]
ROWS = 40_000  # of two columns of float32, by rows on two ranks: each writes some of the file


@pytest.fixture
def directory(tmp_path: Path) -> Iterator[Path]:
    """A directory in memory, if there is one: hundreds of saves sync their files, and a disk may be busy."""
    if not os.path.isdir("/dev/shm"):
        yield tmp_path
        return
    with tempfile.TemporaryDirectory(dir="/dev/shm") as path:
        yield Path(path)


def state_of(step: int, rank: int = 0, world_size: int = 1) -> dict:
    """A state of two bundles and some values, in which everything is the step's number."""
    rows = ROWS // world_size
    piece = ferro_checkpoint.ArrayPiece((ROWS, 2), np.full((rows, 2), step, "f4"), (rank * rows, 0), (rows, 2))
    return {"model": {"w": piece, "b": np.full(3, step)}, "optimizer": {"m": np.full((), step)}, "epoch": step}


def step_of(path: str | Path) -> int:
    """Return the number that everything in a checkpoint is."""
    state = ferro_checkpoint.load(path)
    for array in (*state["model"].values(), *state["optimizer"].values()):
        assert (array == state["epoch"]).all()
    return state["epoch"]


def next_save(path: str, mode: str, group=None) -> None:
    """Save step 2 beside step 1, or in its place."""
    rank, world_size = (group.rank, group.world_size) if group else (0, 1)
    name = "a" if mode == "overwrite" else "b"
    state = state_of(2, rank, world_size)
    ferro_checkpoint.save(f"{path}/{name}", state, group, step=2, overwrite=mode == "overwrite", timeout_s=20)


def check(path: Path, mode: str, *, may_be_saved: bool, may_leave: bool = False) -> int:
    """Check that what was there is there, that the next save succeeds, and what it leaves; return the newest step."""
    newest = step_of(latest(path))
    assert newest == 1 or (may_be_saved and newest == 2)
    assert step_of(path / "a") == (newest if mode == "overwrite" else 1)
    ferro_checkpoint.save(path / "later", state_of(3), step=3)
    assert step_of(latest(path)) == 3
    left = {name for name in os.listdir(path) if name.startswith(".")}
    assert may_leave or not left
    return newest


@contextlib.contextmanager
def prepared(directory: Path, name: object) -> Iterator[Path]:
    """Return a directory with a checkpoint of step 1."""
    source = directory / "source"
    if not source.exists():
        ferro_checkpoint.save(source / "a", state_of(1), step=1)
    path = directory / str(name)
    shutil.copytree(source, path)
    yield path
    shutil.rmtree(path)


def killed(path: Path, mode: str, fault: Fault) -> bool:
    """Save in a process that a fault kills; return False if it ended before the fault."""
    pid = os.fork()
    if pid == 0:
        try:
            faults.install(fault)
            next_save(str(path), mode)
        finally:
            os._exit(0)
    status = os.waitpid(pid, 0)[1]
    return os.WIFSIGNALED(status) and os.WTERMSIG(status) == signal.SIGKILL


def count_of(directory: Path, mode: str) -> int:
    with prepared(directory, "counted") as path:
        return len(faults.counted(lambda: next_save(str(path), mode)))


@pytest.mark.parametrize("mode", MODES)
def test_one_rank_killed_at_every_call(directory, mode):
    count = count_of(directory, mode)
    assert count >= 15
    found = []
    for k in range(count):
        with prepared(directory, k) as path:
            assert killed(path, mode, Fault(at=k, half=True))
            # Before its token file is written, nothing says whose a directory is.
            found.append(check(path, mode, may_be_saved=True, may_leave=k < 3))
    assert found == sorted(found)
    assert set(found) == {1, 2}


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("number", [errno.ENOSPC, errno.EIO, errno.EACCES], ids=errno.errorcode.get)
def test_one_rank_with_an_error_at_every_call(directory, mode, number):
    for k in range(count_of(directory, mode)):
        with prepared(directory, k) as path:
            text = ""
            try:
                with faults.injected(Fault(at=k, errno=number, half=True)):
                    next_save(str(path), mode)
            except SaveFailed as error:
                text = str(error)
            assert not text or os.strerror(number) in text
            assert not text or not any(name.startswith(".") for name in os.listdir(path))
            assert check(path, mode, may_be_saved=not text) == (1 if text else 2)


def save_with_faults(group, path: str, mode: str, number: int) -> list[list[int]]:
    """Let each call of each rank fail in turn; return how many of them there were, and how many saves succeeded."""
    tried = []
    for failing in range(2):
        k = succeeded = 0
        while True:
            if group.rank == 0:
                shutil.copytree(f"{path}/source", f"{path}/{failing}-{k}")
            group.barrier()
            fault = Fault(at=k, errno=number, half=True) if group.rank == failing else None
            text = ""
            with faults.injected(fault) as calls:
                try:
                    next_save(f"{path}/{failing}-{k}", mode, group)
                except SaveFailed as error:
                    text = str(error)
            texts = group.all_gather_object([text, len(calls)])
            assert texts[0][0] == texts[1][0]
            assert not text or f"failed on rank {failing} of 2" in text
            assert not text or os.strerror(number) in text
            ends = texts[failing][1] <= k
            if group.rank == 0:
                here = Path(f"{path}/{failing}-{k}")
                assert not text or not any(name.startswith(".") for name in os.listdir(here))
                assert check(here, mode, may_be_saved=not text) == (1 if text else 2)
                shutil.rmtree(here)
            if ends:
                break
            k += 1
            succeeded += not text
        tried.append([k, succeeded])
    return tried


def test_two_ranks_with_an_error_at_every_call(directory):
    with prepared(directory, "unused"):
        pass
    for mode, number in (("beside", errno.ENOSPC), ("overwrite", errno.EIO)):
        tried = run_ranks(save_with_faults, 2, backend="gloo", args=[str(directory), mode, number], timeout_s=90)
        assert tried[0] == tried[1]
        (of_first, _), (of_second, succeeded) = tried[0]
        assert of_first >= 15
        assert of_second >= 2
        assert succeeded == 0  # all that the second rank does comes before the commit


def save_and_die(group, path: str, mode: str, failing: int, k: int) -> str:
    fault = Fault(at=k, half=True) if group.rank == failing else None
    with faults.injected(fault) as calls:
        try:
            next_save(path, mode, group)
            return f"saved with {len(calls)} calls"
        except ferro.PeerLost as error:
            lost = error
    assert isinstance(lost, SaveFailed)
    assert group.shrink().world_size == 1
    text = str(lost)
    assert text.count("saving ") == 1
    return text


def kill_one_of_two(directory: Path, mode: str, failing: int, k: int) -> tuple[str, str]:
    """Kill a rank at a call; return "killed" or the number of its calls, and what the other one says."""
    with prepared(directory, "two") as path:
        args = [str(path), mode, failing, k]
        outcomes = run_ranks_outcomes(save_and_die, 2, backend="gloo", args=args, timeout_s=40)
        own, other = outcomes[failing], outcomes[1 - failing]
        assert other.ok, other.describe()
        assert isinstance(other.result, str)
        if own.ok:
            return str(own.result), other.result
        assert own.signal == "SIGKILL", own.describe()
        assert f"rank {failing}" in other.result
        assert "is gone" in other.result
        check(path, mode, may_be_saved="committed before" in other.result, may_leave=failing == 0 and k < 3)
        return "killed", other.result


@pytest.mark.parametrize(("mode", "failing", "k"), [("beside", 1, 1), ("overwrite", 0, 12)])
def test_one_of_two_ranks_killed(directory, mode, failing, k):
    assert kill_one_of_two(directory, mode, failing, k)[0] == "killed"
