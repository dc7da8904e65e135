"""A Checkpointer of several ranks: what they agree on, beside a training that communicates all the time."""

from __future__ import annotations

import errno
import re
import time
import warnings
from pathlib import Path

import numpy as np
import pytest

import ferro
from ferro_checkpoint import Checkpointer, CheckpointError, Continuous, Every, Last, SaveFailed, StateError, load, save
from ferro_checkpoint.checkpointer.memory.memory_storage import MemoryStorage
from ferro_checkpoint.placement.array_piece import ArrayPiece
from ferro_checkpoint.saving.segment_writer import SegmentWriter
from ferro_testing import run_ranks

WAIT_S = 60.0
ROWS = 30_000


class Rows:
    """Rows of a matrix, each on one rank."""

    def __init__(self, group: ferro.ProcessGroup) -> None:
        self.rank, self.count = group.rank, ROWS // group.world_size
        self.data = np.zeros((self.count, 8))

    def checkpoint_arrays(self) -> dict[str, object]:
        piece = {"start": (self.rank * self.count, 0), "extent": (self.count, 8)}
        return {"rows": ArrayPiece(shape=(ROWS, 8), data=self.data, **piece)}


def train(group: ferro.ProcessGroup, directory: str) -> list:
    """Save by clock and continuously, into a directory and memory, while the training's group is busy."""
    state = {"model": Rows(group), "bias": np.zeros(3), "rank": group.rank}
    began: list[int] = []
    policies = {"every": Every(minutes=0.1 / 60) | Every(steps=100), "in_memory": Continuous()}
    with Checkpointer(directory, group, keep=Last(2), **policies) as keeper:
        assert keeper.resume(into=state) is None
        deadline = time.monotonic() + WAIT_S
        step = 0
        on_disk: set[str] = set()
        while group.all_reduce(int(len(on_disk) < 3 or len(began) < 6), op="max") and time.monotonic() < deadline:
            step += 1
            state["model"].data += step
            state["bias"] += group.all_reduce(np.ones(3))
            result = keeper.step(step, state)
            if result is not None:
                began.append(step)
                on_disk |= {result.path} - {f"memory/step-{step:09}"}
        keeper.wait()
        assert all(steps == began for steps in group.all_gather_object(began))
        newest = {"model": Rows(group), "bias": np.zeros(3), "rank": -1}
        assert keeper.resume(into=newest) == began[-1]
        count = began[-1]
        assert np.all(newest["model"].data == count * (count + 1) / 2)
        assert newest["bias"].tolist() == [group.world_size * count] * 3
        assert newest["rank"] == group.rank
        held = keeper.memory_bytes
    assert held < 5 * ROWS * 8 * 8 // group.world_size + (4 << 20)  # four times its share, and the files' heads
    return sorted(on_disk)


def test_ranks_save_the_same_steps_by_clock_and_continuously(tmp_path: Path) -> None:
    found = run_ranks(train, 3, backend="gloo", args=(str(tmp_path),), timeout_s=120)
    assert found[0] == found[1] == found[2]
    left = sorted(str(path) for path in tmp_path.iterdir())
    assert left == found[0][-2:]
    for path in left:
        step = int(path[-9:])
        loaded = load(path)
        assert np.all(loaded["model"]["rows"] == step * (step + 1) / 2)
        assert loaded["model"]["bias"].tolist() == [3 * step] * 3


def fail(group: ferro.ProcessGroup, directory: str) -> list:
    """Fail on one rank; return the steps in which each call raised, and what was loaded in the end."""
    raised: list[int] = []
    close = SegmentWriter.close

    def full(writer: SegmentWriter) -> None:
        close(writer)
        time.sleep(0.2)
        raise OSError(errno.ENOSPC, "no space left")

    def step(number: int) -> None:
        state["bias"] += 1
        try:
            keeper.step(number, state)
        except SaveFailed as error:
            raised.append([number, "no space left" in str(error), "on rank 1" in str(error)])

    state = {"model": Rows(group), "bias": np.zeros(3)}
    keeper = Checkpointer(directory, group, every=Every(steps=4))
    for number in range(1, 9):
        step(number)
    keeper.wait()
    if group.rank == 1:
        SegmentWriter.close = full
    number = 8
    while not raised:
        number += 1
        assert number < 10**6
        step(number)
    SegmentWriter.close = close
    saved = number + 4 - number % 4
    while number < saved:
        number += 1
        step(number)
    keeper.close()
    if group.rank == 0:
        for file in Path(directory, f"step-{saved:09}").glob("model*"):
            content = bytearray(file.read_bytes())
            content[-8] ^= 1  # in the rows of the last rank
            file.write_bytes(content)
    group.barrier()
    with warnings.catch_warnings(record=True) as told, Checkpointer(directory, group) as keeper:
        warnings.simplefilter("always")
        resumed = keeper.resume(into=state)
    keeper = Checkpointer(f"{directory}/other" if group.rank else directory, group)
    with pytest.raises(CheckpointError, match="is there for some ranks, and not for rank 1"):
        keeper.resume(into=state)
    keeper.close()
    return [raised, saved - number, resumed, state["bias"].tolist(), [str(one.message) for one in told]]


def test_a_failure_of_one_rank_is_raised_on_all_in_one_step_and_damage_is_seen_by_all(tmp_path: Path) -> None:
    outcomes = run_ranks(fail, 2, backend="gloo", args=(str(tmp_path),), timeout_s=120)
    raised, _, resumed, bias, told = outcomes[0]
    assert outcomes[1][:4] == outcomes[0][:4]
    assert [each[1:] for each in raised] == [[True, True]]
    assert (resumed, bias) == (8, [8.0] * 3)
    assert len(told) == 1
    assert "is damaged, an older one is loaded" in told[0]
    assert outcomes[1][4] == []


def test_a_single_rank_resumes_from_its_own_memory() -> None:
    state = {"w": np.arange(5.0)}
    with Checkpointer(None, every=Every(steps=2), in_memory=True) as keeper:
        for step in range(1, 6):
            state["w"] += 1
            result = keeper.step(step, state)
        assert keeper.step(6, state).path == "memory/step-000000006"
        assert result is None
        state["w"] += 100
        assert keeper.resume(into=state) == 6
        assert state["w"][0] == 5
    assert isinstance(keeper._starter.memory, MemoryStorage)
    assert keeper.memory_bytes == 0


def misuse(group: ferro.ProcessGroup, directory: str) -> list[str]:
    """Make calls that differ between ranks, or mix runs; return the errors."""
    said: list[str] = []

    def refused(call, *arguments, **more) -> None:
        with pytest.raises(ferro.FerroError) as caught:
            call(*arguments, **more)
        said.append(str(caught.value))

    rank, state = group.rank, {"bias": np.zeros(3)}
    with Checkpointer(directory, group, every=Every(steps=1)) as keeper:
        keeper.step(1, state, loss=None if rank else 0.5)
        keeper.wait()
        refused(keeper.step, 2 + rank, state)
        keeper.step(4, state)
    refused(Checkpointer(directory, group, every=Every(steps=1 + rank)).step, 1, state)
    with Checkpointer(directory, group) as keeper:
        refused(keeper.save, 3, state)
        assert keeper.resume(into=state) == 4
        refused(keeper.save(4, state).wait)
        with pytest.raises(StateError):
            keeper.wait()
        keeper.save(5, state)
    refused(save, f"{directory}/by-hand-{rank}", state, group, step=rank)
    if rank:
        refused(Checkpointer(directory, group, timeout_s=1.5).save, 6, state)
    group.barrier()
    return said


def test_calls_that_differ_between_ranks_or_mix_runs_are_named(tmp_path: Path) -> None:
    found = run_ranks(misuse, 2, backend="gloo", args=(str(tmp_path),), timeout_s=120)
    assert [len(said) for said in found] == [5, 6]
    messages = [
        "rank 0 has step 2, rank 1 step 3",
        "rank 0 has every 'Every.steps=1.*rank 1 every 'Every.steps=2",
        f"{tmp_path} has checkpoints up to step 4 already, and this run would save step 3: call resume",
        "step-000000004 is there already: this step was saved before: go on with a later one",
        "rank 0 has name 'by-hand-0' and step 0, rank 1 name 'by-hand-1' and step 1",
    ]
    for said in found:
        for text, message in zip(said, messages, strict=False):
            assert re.search(message, text), text
    assert "1.5 s" in found[1][-1]
    assert sorted(path.name for path in tmp_path.iterdir()) == [f"step-00000000{step}" for step in (1, 4, 5)]
