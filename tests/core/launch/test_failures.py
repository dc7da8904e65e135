"""`ferro run` when something fails: who is blamed, and that nothing is left behind."""

import os
import re
import signal
from collections.abc import Callable
from pathlib import Path

import pytest

from .conftest import TIMEOUT_S, alive, ferro, until

Script = Callable[[str], Path]

SLEEP = """
import signal, time
def sleep():
    deadline = time.monotonic() + 60
    while time.monotonic() < deadline: time.sleep(0.1)
"""


def launcher_lines(stderr: str) -> list[str]:
    return [line for line in stderr.splitlines() if line.startswith("ferro run: ")]


def pids(directory: Path, count: int) -> list[int]:
    """Process ids that ranks and their children left as file names."""
    until(lambda: len(list(directory.iterdir())) == count, f"{count} processes to start")
    return [int(path.name) for path in directory.iterdir()]


@pytest.fixture
def started(tmp_path: Path) -> Path:
    directory = tmp_path / "started"
    directory.mkdir()
    return directory


def test_first_failure_is_reported_first_and_ends_the_others(script: Script) -> None:
    program = script(SLEEP + "if rank == 2: raise ValueError('boom')\nsleep()")
    result = ferro("run", "-n", 4, program)
    lines = result.stderr.splitlines()
    assert result.returncode == 1
    assert lines[0] == "[2] Traceback (most recent call last):"
    assert lines[-2] == "[2] ValueError: boom"
    assert re.fullmatch(
        r"ferro run: rank 2 failed first: exit code 1 after \d+\.\d s; ended ranks 0, 1, 3\.", lines[-1]
    )


def test_those_who_lost_a_peer_are_not_blamed(script: Script, tmp_path: Path) -> None:
    # Rank 1 fails of a lost peer before the peer says anything; its last line names the class.
    flag = tmp_path / "flag"
    program = script(f"""
        import time
        from pathlib import Path
        from ferro.errors import GroupClosed, PeerLost
        flag = Path({str(flag)!r})
        if rank == 1:
            try: raise PeerLost("rank 2 left")
            finally: flag.touch()
        deadline = time.monotonic() + 20
        while not flag.exists() and time.monotonic() < deadline: time.sleep(0.01)
        if rank == 0: raise GroupClosed("closed")
        time.sleep(0.2)
        raise KeyError("the cause")
        """)
    result = ferro("run", "-n", 3, program)
    lines = result.stderr.splitlines()
    assert lines[0] == "[2] Traceback (most recent call last):"
    assert "[2] KeyError: 'the cause'" in lines
    first, *later = launcher_lines(result.stderr)
    assert first.startswith("ferro run: rank 2 failed first: exit code 1")
    assert later == [
        "ferro run: rank 0 failed later: exit code 1: ferro.errors.GroupClosed: closed",
        "ferro run: rank 1 failed later: exit code 1: ferro.errors.PeerLost: rank 2 left",
    ]
    assert result.stderr.count("Traceback") == 1


def test_verbose_shows_all_tracebacks(script: Script, tmp_path: Path) -> None:
    # Rank 0's cause comes when rank 1 has written its own error and only its end is missing.
    flag = tmp_path / "flag"
    program = script(f"""
        import time, traceback
        from ferro.errors import PeerLost
        if rank:
            try: raise PeerLost("gone")
            except PeerLost: traceback.print_exc()
            open({str(flag)!r}, "w")
            sys.exit(1)
        deadline = time.monotonic() + 20
        while not os.path.exists({str(flag)!r}) and time.monotonic() < deadline: time.sleep(0.01)
        raise KeyError("the cause")
        """)
    result = ferro("run", "-n", 2, "-v", program)
    lines = result.stderr.splitlines()
    cause, report, lost = (
        next(i for i, line in enumerate(lines) if text in line)
        for text in ("[0] KeyError", "rank 0 failed first", "[1] ferro.errors.PeerLost: gone")
    )
    assert cause < report < lost
    assert result.stderr.count("Traceback") == 2


@pytest.mark.parametrize("code", [1, 7, 255])
def test_exit_code_is_the_ranks(script: Script, code: int) -> None:
    result = ferro("run", "-n", 2, script(f"sys.exit({code} if rank else 0)"))
    assert result.returncode == code
    assert f"rank 1 failed first: exit code {code}" in result.stderr


def test_a_world_of_one_fails_plainly(script: Script) -> None:
    result = ferro("run", script("raise KeyError('k')"))
    assert result.returncode == 1
    assert result.stderr.startswith("Traceback")
    assert re.search(r"^ferro run: rank 0 failed: exit code 1 after .* s\.$", result.stderr, re.M)


def test_killed_rank(script: Script) -> None:
    program = script(SLEEP + "if rank == 1: os.kill(os.getpid(), signal.SIGKILL)\nsleep()")
    result = ferro("run", "-n", 2, program)
    assert result.returncode == 128 + signal.SIGKILL
    assert "rank 1 failed first: killed by SIGKILL, maybe out of memory" in result.stderr
    assert "ended rank 0." in result.stderr


def test_ranks_that_ignore_sigterm_are_killed(script: Script, started: Path) -> None:
    program = script(f"""
        {"import signal, time"}
        from pathlib import Path
        signal.signal(signal.SIGTERM, signal.SIG_IGN)
        here = Path({str(started)!r})
        (here / str(os.getpid())).touch()
        deadline = time.monotonic() + 60
        while time.monotonic() < deadline:
            if rank == 1 and len(list(here.iterdir())) == 2: sys.exit(3)
            time.sleep(0.01)
        """)
    result = ferro("run", "-n", 2, "--grace-s", 0.5, program)
    assert result.returncode == 3
    assert "rank 0 did not end in time and had to be killed (--grace-s 0.5)" in result.stderr
    assert not any(map(alive, pids(started, 2)))


GRANDCHILD = """
import subprocess, time
code = "import os, signal, sys, time; " \\
    "signal.signal(signal.SIGTERM, signal.SIG_IGN) if {stubborn} else None; " \\
    "open(os.path.join({directory!r}, str(os.getpid())), 'w'); time.sleep(60)"
subprocess.Popen([sys.executable, "-c", code])
open(os.path.join({directory!r}, str(os.getpid())), "w")
"""


@pytest.mark.parametrize("end", ["sys.exit(4 if rank else 0)", "time.sleep(60) if rank else None"])
def test_grandchildren_are_ended(script: Script, started: Path, start: Callable, end: str) -> None:
    program = script(
        GRANDCHILD.format(directory=str(started), stubborn=False)
        + f"""
while len(os.listdir({str(started)!r})) < 4: time.sleep(0.01)
{end}
"""
    )
    process = start("run", "-n", 2, program)
    found = pids(started, 4)
    if "60" in end:
        process.terminate()
    assert process.wait(TIMEOUT_S) == (143 if "60" in end else 4)
    assert not any(map(alive, found))


def note_signal(signum: signal.Signals, started: Path) -> str:
    """A program that says that it is there, and ends well when it gets the signal."""
    return (
        SLEEP
        + f"""
def note(number, frame):
    print("got", signal.Signals(number).name)
    sys.exit(0)
signal.signal({int(signum)}, note)
open(os.path.join({str(started)!r}, str(os.getpid())), "w")
sleep()
"""
    )


@pytest.mark.usefixtures("default_sigint")
@pytest.mark.parametrize("signum", [signal.SIGINT, signal.SIGTERM, signal.SIGHUP, signal.SIGQUIT])
def test_signals_are_passed_on(script: Script, started: Path, start: Callable, signum: signal.Signals) -> None:
    program = script(note_signal(signum, started))
    process = start("run", "-n", 2, program)
    found = pids(started, 2)
    process.send_signal(signum)
    out, err = process.communicate(timeout=TIMEOUT_S)
    assert process.returncode == 128 + signum
    assert sorted(out.decode().splitlines()) == [f"[{r}] got {signum.name}" for r in (0, 1)]
    assert f"ferro run: the launcher was stopped by {signum.name}" in err.decode()
    assert not any(map(alive, found))


@pytest.mark.parametrize("signum", [signal.SIGUSR1, signal.SIGUSR2])
def test_signals_that_are_the_programs_own_reach_every_rank_and_end_nothing(
    script: Script, started: Path, start: Callable, signum: signal.Signals
) -> None:
    program = script(note_signal(signum, started))
    process = start("run", "-n", 2, program)
    pids(started, 2)
    process.send_signal(signum)
    out, _ = process.communicate(timeout=TIMEOUT_S)
    assert process.returncode == 0
    assert sorted(out.decode().splitlines()) == [f"[{r}] got {signum.name}" for r in (0, 1)]


@pytest.mark.usefixtures("default_sigint")
def test_a_second_signal_does_not_wait(script: Script, started: Path, start: Callable) -> None:
    """The launcher waits for longer between SIGINT and SIGKILL than the test does."""
    program = script(
        SLEEP
        + f"""
def note(number, frame): open(os.path.join({str(started)!r}, f"9{{os.getpid()}}"), "w")
signal.signal(signal.SIGINT, note)
open(os.path.join({str(started)!r}, str(os.getpid())), "w")
sleep()
"""
    )
    process = start("run", "-n", 1, "--grace-s", 3600, program)
    (rank,) = pids(started, 1)
    process.send_signal(signal.SIGINT)
    pids(started, 2)
    process.send_signal(signal.SIGINT)
    assert process.wait(TIMEOUT_S) == 130
    assert not alive(rank)


def test_all_die_with_a_launcher_that_is_killed(script: Script, started: Path, start: Callable) -> None:
    program = script(GRANDCHILD.format(directory=str(started), stubborn=True) + "time.sleep(60)")
    process = start("run", "-n", 2, program)
    found = pids(started, 4)
    process.kill()
    process.wait(TIMEOUT_S)
    until(lambda: not any(map(alive, found)), "ranks and grandchildren to die")


class TestRestarts:
    def test_until_it_works(self, script: Script, tmp_path: Path) -> None:
        program = script("""
            print("attempt", os.environ["FERRO_RESTART"], os.environ["FERRO_SECRET"])
            if rank == 1 and os.environ["FERRO_RESTART"] < "2": sys.exit(5)
            """)
        result = ferro("run", "-n", 2, "--max-restarts", 3, "--log-dir", tmp_path, program)
        assert result.returncode == 0
        assert [line for line in launcher_lines(result.stderr) if "again" in line] == [
            f"ferro run: starting all ranks again: restart {k} of 3" for k in (1, 2)
        ]
        logged = [line.split() for line in (tmp_path / "rank1.out").read_text().splitlines()]
        assert [words[1] for words in logged] == ["0", "1", "2"]
        assert len({words[2] for words in logged}) == 3

    def test_not_for_ever(self, script: Script) -> None:
        result = ferro("run", "-n", 2, "--max-restarts", 1, script("sys.exit(6)"))
        assert result.returncode == 6
        assert result.stderr.count("failed first") == 2

    def test_not_after_a_signal(self, script: Script, started: Path, start: Callable) -> None:
        program = script(SLEEP + f"open(os.path.join({str(started)!r}, str(os.getpid())), 'w')\n"
                         "sleep()")  # fmt: skip
        process = start("run", "-n", 2, "--max-restarts", 5, program)
        pids(started, 2)
        os.kill(process.pid, signal.SIGTERM)
        assert process.wait(TIMEOUT_S) == 143
        assert len(list(started.iterdir())) == 2
