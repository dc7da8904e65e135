"""The newest whole checkpoint is found, and it is the same on all ranks."""

from __future__ import annotations

import os
import shutil
import warnings
from pathlib import Path

import pytest

from ferro import simulate
from ferro_checkpoint.errors import CheckpointError
from ferro_checkpoint.opened.latest import latest
from ferro_checkpoint.storage.local import LocalStorage

from ..storage.saves import FILE, save


@pytest.fixture
def storage(tmp_path):
    return LocalStorage(str(tmp_path / "run"))


def test_the_newest(storage):
    assert latest(storage.path) is None
    save(storage, "z", 1)
    save(storage, "timed", None)
    save(storage, "a", 10)
    save(storage, "b", 9)
    assert latest(storage.path) == f"{storage.path}/a"
    assert latest(Path(storage.path), deep=True) == f"{storage.path}/a"
    save(storage, "0", 10, time_s=4e9)
    assert latest(storage.path) == f"{storage.path}/0"
    os.mkdir(os.path.join(storage.path, "logs"))
    os.symlink("0", os.path.join(storage.path, "link"))
    os.mkdir(os.fsencode(storage.path) + b"/\xff")
    assert latest(storage.path) == f"{storage.path}/0"


def cut_off(path):
    os.truncate(path / FILE, 5000)


def removed(path):
    os.remove(path / FILE)


def replaced_header(path):
    content = bytearray((path / FILE).read_bytes())
    content[10] ^= 1
    (path / FILE).write_bytes(content)


def no_record(path):
    os.remove(path / "ferro.json")


def half_a_record(path):
    (path / "ferro.json").write_bytes((path / "ferro.json").read_bytes()[:-20])


def flipped(path):
    content = bytearray((path / FILE).read_bytes())
    content[-1] ^= 128
    (path / FILE).write_bytes(content)


@pytest.mark.parametrize(
    ("damage", "deep"),
    [
        (cut_off, False),
        (removed, False),
        (replaced_header, False),
        (no_record, False),
        (half_a_record, False),
        (flipped, True),
    ],
)
def test_what_is_not_whole_is_passed_over(storage, damage, deep):
    save(storage, "a", 1)
    save(storage, "b", 2)
    damage(Path(storage.path, "b"))
    with pytest.warns(UserWarning, match=r"passing over.*run/b"):
        assert latest(storage.path, deep=deep) == f"{storage.path}/a"


def test_all_ranks_agree(tmp_path):
    paths = [str(tmp_path / str(rank)) for rank in range(3)]
    for step in range(1, 5):
        save(LocalStorage(paths[0]), f"s{step}", step)
    for path in paths[1:]:
        shutil.copytree(paths[0], path)
    shutil.rmtree(os.path.join(paths[1], "s4"))
    cut_off(Path(paths[2], "s3"))

    def work(group):
        return latest(paths[group.rank], group, timeout_s=30)

    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        assert simulate(work, 3, run_timeout_s=60) == [f"{path}/s2" for path in paths]


def test_an_error_of_one_rank_is_told_to_all(tmp_path):
    (tmp_path / "file").write_text("")
    (tmp_path / "directory").mkdir()

    def work(group):
        with pytest.raises(CheckpointError, match=r"cannot (be listed|look for checkpoints)"):
            latest(tmp_path / ("file" if group.rank == 1 else "directory"), group, timeout_s=30)

    simulate(work, 2, run_timeout_s=60)
