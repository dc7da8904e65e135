"""The progress of saves and loads: every byte is told of once, and an error of the function is one of all ranks."""

from __future__ import annotations

import os

import numpy as np
import pytest

import ferro
import ferro_checkpoint
from ferro_checkpoint import ArrayPiece, CheckpointError, SaveFailed

ROWS = 600_000


def state_of(rank, by):
    """A matrix that two ranks hold by rows, or by columns, so that they exchange what they write or read."""
    shape = (ROWS // 2, 2) if by == "rows" else (ROWS, 1)
    start = (rank * ROWS // 2, 0) if by == "rows" else (0, rank)
    return {"a": {"w": ArrayPiece((ROWS, 2), np.zeros(shape, "f4"), start, shape), "x": np.ones(rank + 1)[:1]}}


def on_two_ranks(function):
    return ferro.simulate(function, 2, timeout_s=20, run_timeout_s=60)


@pytest.mark.parametrize("by", ["rows", "columns"])
def test_every_byte_is_told_of_once(tmp_path, by):
    def run(group):
        calls: dict[str, list] = {"save": [], "load": []}
        state = state_of(group.rank, by)
        ferro_checkpoint.save(tmp_path / "c", state, group, progress=lambda *done: calls["save"].append(done))
        ferro_checkpoint.load(tmp_path / "c", state, group, progress=lambda *done: calls["load"].append(done))
        return calls

    told = on_two_ranks(run)
    for each in told:
        for calls in each.values():
            assert [done for done, _ in calls] == sorted(done for done, _ in calls)
            assert calls[-1][0] == calls[-1][1]
    nbytes = (tmp_path / "c" / "a.safetensors").stat().st_size
    assert sum(each["save"][-1][1] for each in told) == nbytes


@pytest.mark.parametrize("by", ["rows", "columns"])
def test_an_error_of_the_function(tmp_path, by):
    def fails(done, nbytes):
        raise RuntimeError("no terminal")

    def error_of(function):
        def run(group):
            progress = fails if group.rank == 1 else None
            try:
                function(tmp_path / "c", state_of(group.rank, by), group, timeout_s=10, progress=progress)
            except CheckpointError as error:
                return error
            return None

        errors = on_two_ranks(run)
        assert all("on rank 1 of 2" in str(error) or "by rank 1 of 2" in str(error) for error in errors)
        assert all("RuntimeError: no terminal" in str(error) for error in errors)
        return {type(error) for error in errors}

    assert error_of(ferro_checkpoint.save) == {SaveFailed}
    assert os.listdir(tmp_path) == []
    on_two_ranks(lambda group: ferro_checkpoint.save(tmp_path / "c", state_of(group.rank, by), group))
    assert error_of(ferro_checkpoint.load) == {CheckpointError}
