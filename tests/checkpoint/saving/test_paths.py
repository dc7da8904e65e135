"""Where a save cannot be: taken, full, read-only or different paths, lost and late ranks, saves at the same time."""

from __future__ import annotations

import contextlib
import os
import subprocess
import time
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest

import ferro_checkpoint
from ferro_checkpoint import SaveFailed, StateError
from ferro_checkpoint.opened.latest import latest
from ferro_checkpoint.storage import system_calls
from ferro_testing import run_ranks, run_ranks_outcomes


def state_of(step: int, group=None, rows: int = 50_000) -> dict:
    """A matrix by rows, of which each rank writes its own, and a value."""
    rank, world_size = (group.rank, group.world_size) if group else (0, 1)
    own = rows // world_size
    piece = ferro_checkpoint.ArrayPiece((rows, 2), np.full((own, 2), step, "f4"), (rank * own, 0), (own, 2))
    return {"model": {"w": piece}, "epoch": step}


def step_of(path: str | Path) -> int:
    state = ferro_checkpoint.load(path)
    assert (state["model"]["w"] == state["epoch"]).all()
    return state["epoch"]


def failed(group, path: str, kind: type[Exception], message: str, rows: int = 50_000, **options) -> None:
    """Check that a save fails on all ranks with one error."""
    found = ""
    try:
        ferro_checkpoint.save(path, state_of(9, group, rows), group, timeout_s=20, **options)
    except kind as error:
        found = str(error)
    assert message in found, found
    if group is not None:
        assert len(set(group.all_gather_object(found))) == 1


def fail_in_many_places(group, path: str) -> None:
    """Save to paths that cannot be: all ranks have the same clear error, and the group goes on."""
    ferro_checkpoint.save(f"{path}/c", state_of(1, group), group)
    if group.rank == 0:
        Path(path, "file").touch()
        os.mkdir(f"{path}/other")
        Path(path, "other", "data").touch()
        os.symlink("c", f"{path}/link")
    group.barrier()
    failed(group, f"{path}/c", StateError, "is there already: overwrite=True")
    failed(group, f"{path}/file", SaveFailed, "is a file", overwrite=True)
    failed(group, f"{path}/file/c", SaveFailed, "is a file")
    failed(group, f"{path}/other", SaveFailed, "is no checkpoint", overwrite=True)
    failed(group, f"{path}/link", SaveFailed, "is a link", overwrite=True)
    failed(group, "/sys/ferro-checkpoint/c", SaveFailed, "cannot be made")
    failed(group, f"{path}/{'x' * 250}", StateError, "too long")
    failed(group, f"{path}/.tmp-x", StateError, "is being written: choose another one")
    failed(group, "", StateError, "is no path")
    # Directories that are not the same on all ranks.
    own = f"{path}/host {group.rank}"
    os.mkdir(own)
    os.chdir(own)
    failed(group, "run/c", StateError, "give a directory that all hosts share")
    assert not os.path.isdir("run") or os.listdir("run") == []
    os.chdir("/")
    # A state that disagrees, and one that cannot be saved on one rank.
    wrong = {"model": {"w": object() if group.rank == 1 else np.zeros(2)}}
    with pytest.raises(StateError, match="is an object"):
        ferro_checkpoint.save(f"{path}/new", wrong, group)
    # After all of these, saves go on.
    ferro_checkpoint.save(f"{path}/c", state_of(2, group), group, overwrite=True)
    assert step_of(f"{path}/c") == 2
    assert not [name for name in os.listdir(path) if name.startswith(".")]


def save_at_the_same_time(group, path: str) -> list[int]:
    """Let two pairs of ranks save again and again: beside each other, and in each other's place."""
    pair = group.split(group.rank // 2)
    number, outcomes = group.rank // 2, [0, 0]
    for k in range(6):
        group.barrier()
        ferro_checkpoint.save(f"{path}/{k}-{number}", state_of(10 * k + number, pair), pair, step=k)
        group.barrier()
        with contextlib.suppress(StateError, SaveFailed):
            ferro_checkpoint.save(f"{path}/new-{k}", state_of(number, pair), pair, step=k)
            outcomes[0] += 1
        group.barrier()
        with contextlib.suppress(SaveFailed):
            ferro_checkpoint.save(f"{path}/same", state_of(number, pair), pair, step=k, overwrite=True)
            outcomes[1] += 1
    return outcomes


def come_late(group, path: str, alone: bool) -> list:
    """Save by rank 0; rank 1 comes when that has given up, or not at all."""
    ferro_checkpoint.save(f"{path}/first", state_of(1, group), group)
    group.barrier()
    given_up = Path(f"{path} given up")
    begin = time.monotonic()
    if group.rank == 1:
        while not given_up.exists() and time.monotonic() < begin + 30:
            time.sleep(0.05)
        if alone:
            return ["", 0.0, os.listdir(path)]
    try:
        ferro_checkpoint.save(f"{path}/c", state_of(2, group), group, timeout_s=1.5)
    except SaveFailed as error:
        given_up.touch()
        return [str(error), time.monotonic() - begin, os.listdir(path)]
    return ["saved", 0.0, os.listdir(path)]


def test_paths_that_cannot_be(tmp_path):
    run_ranks(fail_in_many_places, 2, backend="gloo", args=[str(tmp_path)], timeout_s=60)


def test_saves_at_the_same_time(tmp_path):
    outcomes = run_ranks(save_at_the_same_time, 4, backend="gloo", args=[str(tmp_path)], timeout_s=90)
    assert outcomes[0] == outcomes[1]
    assert outcomes[2] == outcomes[3]
    assert outcomes[0][0] + outcomes[2][0] >= 6  # one of two at least gets a new name
    assert outcomes[0][1] + outcomes[2][1] >= 6
    for name in os.listdir(tmp_path):
        assert not name.startswith(".")
        step = step_of(tmp_path / name)
        assert step in (0, 1) if name.startswith(("new", "same")) else name == f"{step // 10}-{step % 10}"
    assert latest(tmp_path) is not None


@pytest.mark.parametrize("alone", [False, True], ids=["late", "never"])
def test_a_rank_that_does_not_come(tmp_path, alone):
    outcomes = run_ranks_outcomes(come_late, 2, backend="gloo", args=[str(tmp_path), alone], timeout_s=40)
    assert outcomes[0].ok, outcomes[0].describe()
    text, seconds, left = outcomes[0].result
    assert text.startswith(f"saving {tmp_path}/c failed: ")
    assert "Nothing was saved" in text
    assert 1.2 < seconds < 20
    assert left == ["first"]
    if not alone:
        assert outcomes[1].ok, outcomes[1].describe()
        text, seconds, left = outcomes[1].result
        assert text.startswith(f"saving {tmp_path}/c failed: ")
        assert seconds < 25
        assert left == ["first"]
    assert step_of(latest(tmp_path)) == 1


@pytest.fixture
def small_disk(tmp_path) -> Iterator[Path]:
    """A file system of 1 MiB."""
    path = tmp_path / "disk"
    path.mkdir()
    made = subprocess.run(["mount", "-t", "tmpfs", "-o", "size=1m", "tmpfs", path], capture_output=True, check=False)
    if made.returncode:
        pytest.skip(f"no file system can be mounted here: {made.stderr.decode().strip()}")
    try:
        yield path
    finally:
        subprocess.run(["umount", "-l", path], check=True)


def fill_disk(group, path: str) -> None:
    """Save what fits, and what does not: with the space reserved at once, and found to be lacking by a write."""
    rows = 80_000  # 640 kB
    ferro_checkpoint.save(f"{path}/a", state_of(1, group, rows), group)
    failed(group, f"{path}/b", SaveFailed, "free some space", rows)
    failed(group, f"{path}/a", SaveFailed, "free some space", rows, overwrite=True)
    system_calls.reserve = os.ftruncate
    failed(group, f"{path}/b", SaveFailed, "free some space", rows)
    group.barrier()
    assert os.listdir(path) == ["a"]
    assert step_of(f"{path}/a") == 1
    ferro_checkpoint.save(f"{path}/small", state_of(2, group, 8000), group, step=2)
    assert step_of(latest(path, group)) == 2


def test_a_full_disk(small_disk):
    run_ranks(fill_disk, 2, backend="gloo", args=[str(small_disk)], timeout_s=60)


@pytest.mark.parametrize(
    "arguments", [{"step": 1.5}, {"step": -1}, {"step": True}, {"step": "x"}, {"group": 3}, {"timeout_s": "x"}]
)
def test_arguments_that_make_no_sense(tmp_path, arguments):
    name = next(iter(arguments))
    with pytest.raises(StateError, match=f"{name} is "):
        ferro_checkpoint.save(tmp_path / "c", {"a": np.ones(2)}, **arguments)
    assert not list(tmp_path.iterdir())
    ferro_checkpoint.save(tmp_path / "c", {"a": np.ones(2)}, step=np.int64(3))
