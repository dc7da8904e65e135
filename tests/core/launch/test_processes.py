"""The supervisor of processes: groups, output, ends, and processes that do not outlive it."""

import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from ferro.launch.processes import Supervisor

from .conftest import TIMEOUT_S, alive, until

STUBBORN = "import signal, time; signal.signal(signal.SIGTERM, signal.SIG_IGN); print('up', flush=True); time.sleep(60)"


def python(program: str) -> list[str]:
    return [sys.executable, "-c", program]


def test_output_is_received_and_ends_are_noticed() -> None:
    received: list[bytes] = []
    errors: list[bytes] = []
    ended: list[object] = []
    with Supervisor() as supervisor:
        child = supervisor.start(
            python("import sys; print('out'); print('err', file=sys.stderr); sys.exit(3)"),
            stdout=received.append,
            stderr=errors.append,
            on_end=lambda it: ended.append((it, b"".join(received), b"".join(errors))),
        )
        assert supervisor.wait_all(TIMEOUT_S)
        assert (child.returncode, child.signalled_at) == (3, None)
    assert ended == [(child, b"out\n", b"err\n")]


def test_output_goes_into_a_file(tmp_path: Path) -> None:
    with Supervisor() as supervisor, (tmp_path / "output").open("wb") as output:
        supervisor.start(python("import sys; print('out', flush=True); print('err', file=sys.stderr)"), stdout=output)
        assert supervisor.wait_all(TIMEOUT_S)
    assert (tmp_path / "output").read_text() == "out\nerr\n"


@pytest.mark.parametrize("grace_s", [0.1, 60.0])
def test_a_process_that_ignores_the_signal_is_killed(grace_s: float) -> None:
    """After the grace, or at once where the caller is in a hurry."""
    received: list[bytes] = []
    with Supervisor() as supervisor:
        child = supervisor.start(python(STUBBORN), stdout=received.append)
        deadline = time.monotonic() + TIMEOUT_S
        while not received and time.monotonic() < deadline:
            supervisor.wait(1.0)
        supervisor.end(grace_s=grace_s, hurry=lambda: grace_s == 60.0)
        assert child.returncode == -signal.SIGKILL
        assert child.group_gone


@pytest.mark.parametrize("grace_s", [0.0, 60.0])
def test_after_the_supervisors_death_processes_are_killed_or_may_leave_in_order(tmp_path: Path, grace_s: float) -> None:
    """The process notices the death of its parent, and says goodbye if it is given the time."""
    child = f"""
import os, pathlib, time
folder, parent = pathlib.Path({str(tmp_path)!r}), os.getppid()
(folder / "up").write_text(str(os.getpid()))
while os.getppid() == parent: time.sleep(0.01)
time.sleep(0.5)
(folder / "goodbye").touch()
"""
    program = f"""
import time
from ferro.launch.processes import Supervisor
with Supervisor(orphan_grace_s={grace_s}) as supervisor:
    supervisor.start([{sys.executable!r}, "-c", {child!r}], stdout=open("/dev/null", "wb"))
    time.sleep(60)
"""
    with subprocess.Popen(python(program)) as parent:
        until(lambda: (tmp_path / "up").exists() and (tmp_path / "up").read_text() != "", "the child to start")
        pid = int((tmp_path / "up").read_text())
        parent.kill()
    until(lambda: not alive(pid), "the child to end")
    assert (tmp_path / "goodbye").exists() == (grace_s > 0)
