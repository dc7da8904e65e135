"""A Checkpointer of one process: what is saved when, what is kept, what is loaded, and who is told of failures."""

from __future__ import annotations

import os
import subprocess
import sys
import threading
import time
from pathlib import Path

import numpy as np
import pytest

from ferro import FerroError, PeerLost
from ferro_checkpoint import (
    Best,
    CheckpointDamaged,
    Checkpointer,
    Continuous,
    Every,
    Last,
    SaveFailed,
    StateError,
    load,
)
from ferro_checkpoint.checkpointer import background, resuming, save_starter
from ferro_checkpoint.saving import write

WAIT_S = 60.0


def new_state() -> dict:
    return {"model": {"weight": np.zeros((64, 33), np.float32)}, "optimizer": {"m": np.zeros(5)}, "epoch": 0}


def train(state: dict, step: int) -> dict:
    """Return the state of a step, of which all arrays are new."""
    model, m = state["model"]["weight"] + np.float32(step), state["optimizer"]["m"] * 0.5 + step
    return {"model": {"weight": model}, "optimizer": {"m": m}, "epoch": step}


def states(last: int) -> list[dict]:
    found = [new_state()]
    for step in range(1, last + 1):
        found.append(train(found[-1], step))
    return found


def same(one: dict, other: dict) -> None:
    np.testing.assert_array_equal(one["model"]["weight"], other["model"]["weight"])
    np.testing.assert_array_equal(one["optimizer"]["m"], other["optimizer"]["m"])
    assert one["epoch"] == other["epoch"]


def names(directory: Path) -> list[int]:
    return sorted(int(path.name.removeprefix("step-")) for path in directory.iterdir() if path.name.startswith("step-"))


class Held:
    """Takes the place of `write_checkpoint`: waits until it is released, or fails."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.begun, self.released, self.error = threading.Event(), threading.Event(), None
        self.niceness = None
        real = save_starter.write_checkpoint

        def write(*arguments, **options):
            self.begun.set()
            self.niceness = os.getpriority(os.PRIO_PROCESS, threading.get_native_id())
            assert self.released.wait(WAIT_S)
            if self.error is not None:
                raise self.error
            real(*arguments, **options)

        monkeypatch.setattr(save_starter, "write_checkpoint", write)


def test_training_resumes_with_the_same_bits_and_the_policies_go_on(tmp_path):
    every = states(13)
    state = new_state()
    with Checkpointer(tmp_path / "run", every=Every(steps=2), keep=Last(2) | Best("loss", 1)) as keeper:
        assert keeper.resume(into=state) is None
        for step in range(1, 9):
            state = train(state, step)
            result = keeper.step(step, state, loss=float("nan") if step == 8 else abs(step - 4))
            assert (result is None) == (step % 2 == 1)
            for array in (state["model"]["weight"], state["optimizer"]["m"]):
                kept = array.copy()
                array[...] = -1  # the save has its own copy
                keeper.wait() if step % 4 == 0 else None
                array[...] = kept
        assert keeper.staging_bytes == 64 * 33 * 4 + 5 * 8
        assert (result.step, result.path) == (8, str(tmp_path / "run" / "step-000000008"))
        assert result.bytes == keeper.staging_bytes
    assert result.done()
    assert result.written_s > 0
    assert names(tmp_path / "run") == [4, 6, 8]
    state = new_state()
    with Checkpointer(tmp_path / "run", every=Every(steps=2), keep=Last(1) | Best("loss", 1), async_=False) as keeper:
        assert keeper.resume(into=state) == 8
        same(state, every[8])
        for step in range(9, 14):
            state = train(state, step)
            keeper.step(step, state, loss=50.0)
        assert keeper.save(13, state) is keeper.save(13, state)
        assert names(tmp_path / "run") == [4, 13]  # the best is from before
    loaded = new_state()
    load(tmp_path / "run" / "step-000000004", loaded)
    same(loaded, every[4])


def test_damage_that_is_found_while_loading_leads_to_the_next_older_one(tmp_path):
    every = states(5)
    with Checkpointer(tmp_path, every=Every(steps=1)) as keeper:
        for step in range(1, 5):
            keeper.step(step, every[step])
    (tmp_path / "step-9").mkdir()  # not named by a Checkpointer
    (tmp_path / "step-000000009").mkdir()  # no record
    for step in (3, 4):
        file = tmp_path / f"step-00000000{step}" / "optimizer.safetensors"
        content = bytearray(file.read_bytes())
        content[-1] ^= 1
        file.write_bytes(content)
    state = new_state()
    with Checkpointer(tmp_path, every=Every(steps=2), keep=Last(1)) as keeper:
        with pytest.warns(RuntimeWarning, match="step-00000000[34] is damaged") as told:
            assert keeper.resume(into=state) == 2
        assert len(told) == 2
        assert "optimizer" in str(told[0].message)
        same(state, every[2])
        keeper.step(3, every[3])
        keeper.step(4, every[4]).wait(WAIT_S)
    assert names(tmp_path) == [3, 4, 9, 9]  # the damaged one of step 4 was replaced, and step 3 was not saved again
    for name in ("step-000000001", "step-000000002"):
        assert not (tmp_path / name).exists()
    (tmp_path / "step-000000004" / "ferro.json").write_bytes(b"{}")
    with (
        pytest.warns(RuntimeWarning),
        Checkpointer(tmp_path) as keeper,
        pytest.raises(CheckpointDamaged, match="every"),
    ):
        keeper.resume(into=state)


def test_a_save_that_is_due_too_early_pushes_back(tmp_path, monkeypatch, caplog):
    held = Held(monkeypatch)
    state = new_state()
    keeper = Checkpointer(tmp_path, every=Every(steps=1) | Continuous(), timeout_s=WAIT_S)
    first = keeper.step(1, state)
    assert held.begun.wait(WAIT_S)
    assert not first.done()
    assert not first.wait(0.01)
    threading.Timer(0.2, held.released.set).start()
    second = keeper.step(2, state)
    assert second.waited_s > 0.1
    assert "step 2 waited" in caplog.text
    keeper.close()
    assert first.done()
    assert second.done()
    assert names(tmp_path) == [1, 2]
    if sys.platform == "linux":
        assert held.niceness == os.getpriority(os.PRIO_PROCESS, 0) + background.NICENESS


def test_continuous_saves_begin_when_the_last_has_ended(tmp_path, monkeypatch):
    held = Held(monkeypatch)
    with Checkpointer(tmp_path, every=Continuous()) as keeper:
        results = [keeper.step(step, new_state()) for step in range(1, 6)]
        assert [result is not None for result in results] == [False, True, False, False, False]
        held.released.set()
        results[1].wait(WAIT_S)
        assert keeper.step(6, new_state()) is None  # the ranks learn of the end one step later
        assert keeper.step(7, new_state()) is not None


def test_a_failure_is_raised_once_and_the_next_save_goes_well(tmp_path, monkeypatch):
    held = Held(monkeypatch)
    held.error = SaveFailed("the disk is full", path="x")
    with Checkpointer(tmp_path, every=Every(steps=2)) as keeper:
        result = keeper.step(2, new_state())
        held.released.set()
        with pytest.raises(SaveFailed, match="full"):
            result.wait()
        assert keeper.step(3, new_state()) is None  # the ranks learn of it one step later
        with pytest.raises(SaveFailed, match="full"):
            keeper.step(4, new_state())
        held.error = None
        assert keeper.step(5, new_state()) is not None  # what step 4 has not saved
        keeper.wait()
        held.error = SaveFailed("the disk is full again", path="x")
        keeper.save(7, new_state())
        with pytest.raises(SaveFailed, match="again"):
            keeper.wait()
        keeper.wait()
        keeper.save(8, new_state())
        with pytest.raises(SaveFailed, match="again"):
            keeper.close()
    assert names(tmp_path) == [5]
    assert not background._untold


def test_an_exception_lets_the_running_save_finish_and_is_not_hidden(tmp_path, monkeypatch):
    held = Held(monkeypatch)
    threading.Timer(0.2, held.released.set).start()

    def train_badly() -> None:
        with Checkpointer(tmp_path, every=Every(steps=1)) as keeper:
            keeper.step(1, new_state())
            raise KeyError("mine")

    with pytest.raises(KeyError, match="mine"):
        train_badly()
    assert names(tmp_path) == [1]


def test_a_save_that_hangs_ends_at_its_deadline(tmp_path, monkeypatch):
    held = Held(monkeypatch)
    monkeypatch.setattr(save_starter, "_GRACE_S", 0.1)
    keeper = Checkpointer(tmp_path, every=Every(steps=1), timeout_s=0.1)
    keeper.step(1, new_state())
    with pytest.raises(SaveFailed, match="did not end in time"):
        keeper.wait()
    held.released.set()
    keeper._timeout_s = WAIT_S  # this one has the time that it takes on a busy machine
    keeper.save(2, new_state())
    keeper.close()
    assert 2 in names(tmp_path)


def test_a_state_that_cannot_be_saved_is_refused_in_the_step(tmp_path):
    with Checkpointer(tmp_path, every=Every(steps=1)) as keeper:
        with pytest.raises(StateError):
            keeper.step(1, {"model": {"object": object()}})
        assert keeper.step(2, new_state()) is not None
        keeper.wait()
        keeper.step(3, {**new_state(), "more": np.ones(3)})  # another plan
        keeper.wait()
        assert load(tmp_path / "step-000000003")["model"]["more"].tolist() == [1, 1, 1]
    assert names(tmp_path) == [2, 3]


def test_the_last_are_those_that_were_saved_last_and_copies_that_fail_leave_a_good_save(tmp_path, monkeypatch, caplog):
    with Checkpointer(tmp_path, keep=Last(2), async_=False) as keeper:
        found = [keeper.save(step, new_state()) and names(tmp_path) for step in (90, 100, 60, 70, 80)]
        assert found == [[90], [90, 100], [60, 100], [60, 70], [70, 80]]  # at 60 the program had gone back by itself
    real = save_starter.replicate

    def fail(*_: object) -> None:
        monkeypatch.setattr(save_starter, "replicate", real)
        raise FerroError("no room")

    monkeypatch.setattr(save_starter, "replicate", fail)
    with Checkpointer(tmp_path, keep=Last(2), in_memory=True) as keeper:
        assert keeper.resume(into=new_state()) == 80
        keeper.save(20, new_state())
        keeper.wait()
        assert "step 20 was saved as" in caplog.text
        assert "copies in the ranks' memories were not made: no room" in caplog.text
        assert names(tmp_path) == [20, 80]
        keeper.save(30, new_state())
        keeper.wait()
        assert names(tmp_path) == [20, 30]
        assert keeper._starter.memory.whole.name == "step-000000030"
    agree = write._agree

    def cut(*arguments: object) -> object:
        if arguments[-1] == "committing it":
            raise FerroError("cut.")
        return agree(*arguments)

    monkeypatch.setattr(write, "_agree", cut)
    with Checkpointer(None, in_memory=True) as keeper:
        keeper.save(1, new_state())
        with pytest.raises(SaveFailed, match=r"cut\. .*: Checkpointer\.resume\(\) returns it if it was"):
            keeper.wait()


AT_EXIT = """
import sys, threading, numpy as np
from ferro import PeerLost
from ferro_checkpoint import Checkpointer, Every, SaveFailed
from ferro_checkpoint.errors import SaveLostPeer
from ferro_checkpoint.checkpointer import save_starter
real = save_starter.write_checkpoint
def write(plan, source, storage, name, *arguments, **options):
    import time
    time.sleep(0.3)
    if name.endswith("2"):
        full = SaveFailed("the disk is full", path=name)
        raise full if sys.argv[3] == "by code" else SaveLostPeer("rank 1 is lost", path=name, lost=PeerLost("lost"))
    real(plan, source, storage, name, *arguments, **options)
save_starter.write_checkpoint = write
state = {"model": {"w": np.ones(100_000)}}
for directory, step in zip(sys.argv[1:], (1, 2)):
    keeper = Checkpointer(directory, every=Every(steps=1))
    keeper.step(step, state)
if sys.argv[3] == "by code":
    raise SystemExit(5)
raise PeerLost("rank 1 is lost")
"""


def test_at_exit_saves_are_finished_and_failures_are_told(tmp_path):
    began = time.monotonic()
    command = [sys.executable, "-c", AT_EXIT, str(tmp_path / "a"), str(tmp_path / "b"), "by code"]
    ended = subprocess.run(command, capture_output=True, text=True, timeout=WAIT_S, check=False)
    assert ended.returncode == 5, ended.stderr
    assert names(tmp_path / "a") == [1], ended.stderr
    assert "ferro-checkpoint: step 2 was not saved as" in ended.stderr
    assert "the disk is full" in ended.stderr
    assert "Traceback" not in ended.stderr
    assert time.monotonic() - began < WAIT_S
    command[3:] = [str(tmp_path / "c"), str(tmp_path / "d"), "by a loss"]
    lost = subprocess.run(command, capture_output=True, text=True, timeout=WAIT_S, check=False)
    assert (lost.stderr.count("rank 1 is lost"), lost.stderr.count("was not saved")) == (1, 0), lost.stderr


def test_the_loss_of_a_rank_says_what_it_ended(tmp_path, monkeypatch):
    def lost(*_: object, **__: object) -> None:
        raise PeerLost("rank 1 is gone.", peer=1, host="b")

    with Checkpointer(tmp_path) as keeper:
        with monkeypatch.context() as patched:
            patched.setattr(resuming, "_candidates", lost)
            with pytest.raises(PeerLost, match=rf"resuming from {tmp_path} failed.*changed: rank 1 is gone") as caught:
                keeper.resume(into=new_state())
        monkeypatch.setattr(save_starter, "plan_save", lost)
        with pytest.raises(SaveFailed, match=r"step-000000001 failed: rank 1 is gone\. Nothing was saved") as failed:
            keeper.save(1, new_state())
    assert isinstance(failed.value, PeerLost)
    assert [(error.value.peer, error.value.host) for error in (caught, failed)] == [(1, "b")] * 2
