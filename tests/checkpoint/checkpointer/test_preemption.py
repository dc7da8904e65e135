"""SIGTERM: the ranks save and end within a given time, whoever was told."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path

import numpy as np
import pytest

import ferro
from ferro_checkpoint import Checkpointer, Every, Preempted, load
from ferro_checkpoint.checkpointer import background, save_starter
from ferro_testing import run_ranks_outcomes

WAIT_S = 60.0


def train(group: ferro.ProcessGroup, directory: str, told: list[int], how: str) -> None:
    """Train until SIGTERM comes, which the ranks in `told` send themselves at step 5."""
    writing = threading.Event()
    write = save_starter.write_checkpoint

    def slow(*arguments: object, **options: object) -> None:
        writing.set()
        time.sleep(0.3 if how == "in a save" else 0)
        write(*arguments, **options)

    save_starter.write_checkpoint = slow
    state = {"model": {"w": np.zeros(1000)}}
    every = Every(steps=5) if how == "in a save" else None
    with Checkpointer(directory, group, every=every, preemption_s=WAIT_S) as keeper:
        for step in range(1, 1000):
            state["model"]["w"] += group.all_reduce(1.0)
            if step == 6 and how == "in a save":
                writing.wait(WAIT_S)
            if step == 6 and group.rank in told:
                for _ in range(1 + (how == "twice")):
                    os.kill(os.getpid(), signal.SIGTERM)
            keeper.step(step, state)


@pytest.mark.parametrize(
    ("told", "how"), [([1], "in training"), ([0, 1], "twice"), ([0], "in a save")], ids=["one", "all", "in a save"]
)
def test_all_ranks_save_the_same_step_and_end(tmp_path: Path, told: list[int], how: str) -> None:
    outcomes = run_ranks_outcomes(train, 2, backend="gloo", args=(str(tmp_path), told, how), timeout_s=120)
    for outcome in outcomes:
        assert (outcome.error_type, outcome.exit_code) == ("Preempted", 143), outcome.describe()
    assert "SIGTERM: step 7 was saved as" in outcomes[0].output
    names = sorted(path.name for path in tmp_path.iterdir())
    assert names == (["step-000000005"] if how == "in a save" else []) + ["step-000000007"]
    assert load(tmp_path / "step-000000007")["model"]["w"][0] == 14


PROGRAM = """
import sys, time, numpy as np, ferro
from ferro_checkpoint import Checkpointer
state = {"model": {"w": np.zeros(1000)}}
with ferro.init() as group, Checkpointer(sys.argv[1], group, preemption_s=20) as keeper:
    first = keeper.resume(into=state) or 0
    for step in range(first + 1, 10**9):
        state["model"]["w"] += group.all_reduce(1.0)
        if step == first + 3:
            print("trains", flush=True)
        time.sleep(0.002)
        keeper.step(step, state)
"""


def test_a_job_of_ferro_run_saves_and_ends_as_the_launcher_is_told(tmp_path: Path) -> None:
    program = tmp_path / "program.py"
    program.write_text(PROGRAM)
    command = [sys.executable, "-m", "ferro", "run", "-n", "2", str(program), str(tmp_path / "run")]
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True) as job:
        try:
            assert "trains" in job.stdout.readline()
            job.send_signal(signal.SIGTERM)
            _, err = job.communicate(timeout=WAIT_S)
        finally:
            job.kill()
    assert job.returncode == 143, err
    assert "was saved as" in err
    saved = list((tmp_path / "run").glob("step-*"))
    assert len(saved) == 1
    assert load(saved[0])["model"]["w"][0] == 2 * int(saved[0].name.removeprefix("step-"))


def told_to_end(keeper: Checkpointer) -> None:
    with keeper:
        keeper.step(1, {"w": np.ones(3)})
        signal.raise_signal(signal.SIGTERM)
        keeper.step(2, {"w": np.ones(3)})
        keeper.step(3, {"w": np.ones(3)})


def test_a_save_that_cannot_end_in_time_says_so(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    released = threading.Event()

    def late(*_: object, **__: object) -> None:
        released.wait(WAIT_S)
        raise OSError("too late")

    monkeypatch.setattr(save_starter, "write_checkpoint", late)
    before = signal.getsignal(signal.SIGTERM)
    for begun in (2, 3):  # the save before is not finished in time, or that of the step itself
        keeper = Checkpointer(tmp_path, every=Every(steps=begun), preemption_s=0.2)
        with pytest.raises(Preempted, match=r"step 3 could not be saved within 0\.2 s: step . was not") as ended:
            told_to_end(keeper)
        assert (ended.value.code, ended.value.step, ended.value.path) == (143, 3, None)
        keeper.close()
    assert signal.getsignal(signal.SIGTERM) is before
    running = list(background._running)
    background._at_exit()
    released.set()
    for result in running:
        assert result.wait_ended(WAIT_S)
    background._at_exit()
    told = capsys.readouterr().err
    assert (told.count("SIGTERM: step 3"), told.count("\n"), told.count("hang")) == (2, 2, 0), told


LOST_SIGNAL = """
import os, signal, sys, threading, time
import numpy as np
from ferro_checkpoint import Checkpointer, Every
from ferro_checkpoint.checkpointer import save_starter
released = threading.Event()
save_starter.write_checkpoint = lambda *_, **__: released.wait(60)
with Checkpointer(sys.argv[1], every=Every(steps=1), preemption_s=1) as keeper:
    keeper.step(1, {"w": np.ones(3)})
    for _ in range(20):
        worker = os.fork()
        if not worker:
            signal.alarm(20)
            time.sleep(60)
        os.kill(worker, signal.SIGTERM)  # before Python works there, mostly
        assert os.waitstatus_to_exitcode(os.waitpid(worker, 0)[1]) == -signal.SIGTERM
    worker = os.fork()
    if worker:
        assert os.waitstatus_to_exitcode(os.waitpid(worker, 0)[1]) == 0
        assert keeper._opened is not None
        released.set()
        signal.raise_signal(signal.SIGTERM)
    else:
        signal.alarm(20)  # it leaves the block, and waits for no save
if not worker:
    os._exit(0)
print("no call of step() came after the signal")
"""


def test_the_earlier_handler_is_called_and_restored_and_no_signal_is_lost(tmp_path: Path) -> None:
    calls: list[int] = []
    before = signal.signal(signal.SIGTERM, lambda signum, _: calls.append(signum))
    try:
        with Checkpointer(tmp_path, every=Every(steps=5), preemption_s=5) as keeper:
            signal.raise_signal(signal.SIGTERM)
            assert keeper.step(1, {"w": np.ones(3)}) is None
            with pytest.raises(Preempted) as ended:
                keeper.step(2, {"w": np.ones(3)})
        assert ended.value.path == str(tmp_path / "step-000000002")
        signal.raise_signal(signal.SIGTERM)
        assert calls == [signal.SIGTERM] * 2
        signal.signal(signal.SIGTERM, signal.SIG_DFL)
        lost_signal = [sys.executable, "-c", LOST_SIGNAL, str(tmp_path / "lost")]
        lost = subprocess.run(lost_signal, capture_output=True, timeout=WAIT_S, check=False)
        assert (lost.returncode, lost.stdout) == (-signal.SIGTERM, b""), lost.stderr
    finally:
        signal.signal(signal.SIGTERM, before)
    refused: list[Exception] = []

    def elsewhere() -> None:
        try:
            Checkpointer(tmp_path, preemption_s=1)
        except ferro.UsageError as error:
            refused.append(error)

    thread = threading.Thread(target=elsewhere)
    thread.start()
    thread.join(WAIT_S)
    assert "only the main thread" in str(refused[0])
