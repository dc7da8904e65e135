"""How a job under `ferro run` ends: time to save, survivors that go on, and processes that would stay behind."""

import os
import signal
import socket
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

from .conftest import TIMEOUT_S, alive, ferro, until

Script = Callable[[str], Path]

# A program that takes longer to save than descendants have after their rank's end.
SAVES = """
import signal, time
def save(*_):
    open(os.path.join({directory!r}, f"saving{{rank}}"), "w")
    time.sleep({seconds})
    print("saved", flush=True)
    sys.exit(0)
signal.signal(signal.SIGTERM, save)
open(os.path.join({directory!r}, f"ready{{rank}}"), "w")
"""
WAIT = """
deadline = time.monotonic() + 60
while time.monotonic() < deadline: time.sleep(0.1)
"""


def test_a_signal_leaves_the_ranks_time_to_save_and_its_duplicate_does_not_hurry_them(
    script: Script, tmp_path: Path, start: Callable
) -> None:
    process = start("run", "-n", 2, script(SAVES.format(directory=str(tmp_path), seconds=3.0) + WAIT))
    until(lambda: len(list(tmp_path.glob("ready*"))) == 2, "the ranks to start")
    for _ in range(2):  # as GNU timeout does
        os.kill(process.pid, signal.SIGTERM)
    out, err = process.communicate(timeout=TIMEOUT_S)
    assert sorted(out.decode().splitlines()) == ["[0] saved", "[1] saved"]
    assert process.returncode == 143
    assert "waiting up to 30 s (--grace-s) for ranks 0, 1 to end" in err.decode()


def test_a_survivor_saves_while_the_failure_is_shown(script: Script, tmp_path: Path, start: Callable) -> None:
    """The survivor ends only when the other rank's traceback has been seen."""
    saves = SAVES.replace("time.sleep({seconds})", "sys.stdin.read()").format(directory=str(tmp_path))
    program = script(f"""
        {"import time"}
        if rank == 1:
            deadline = time.monotonic() + 20
            while not os.path.exists({str(tmp_path / "ready0")!r}) and time.monotonic() < deadline: time.sleep(0.01)
            raise KeyError("the cause")
        """)
    program.write_text(program.read_text() + saves + WAIT)
    process = start("run", "-n", 2, program, stdin=True)
    lines = iter(process.stderr.readline, b"")
    assert any(b"KeyError: 'the cause'" in line for line in lines)
    assert b"rank 1 failed first: exit code 1; waiting up to 30 s (--grace-s) for rank 0 to end" in next(lines)
    process.stdin.close()
    assert process.wait(TIMEOUT_S) == 1
    assert process.stdout.read() == b"[0] saved\n"
    assert b"ended rank 0." in process.stderr.read()


SHRINK = """
import signal, ferro
group = ferro.init("gloo", timeout_s=20)
group.barrier()
if rank == 1: os.kill(os.getpid(), signal.SIGKILL)
try:
    group.all_reduce(1)
except ferro.PeerLost:
    print("sum", group.shrink(timeout_s=10).all_reduce(1))
"""


def test_survivors_go_on_with_a_smaller_group(script: Script) -> None:
    result = ferro("run", "-n", 3, "--keep-going", script(SHRINK))
    assert sorted(result.stdout.splitlines()) == ["[0] sum 2", "[2] sum 2"]
    assert result.returncode == 0
    assert [line for line in result.stderr.splitlines() if line.startswith("ferro run: ")] == [
        "ferro run: lost rank 1: killed by SIGKILL, maybe out of memory; the others go on (--keep-going)",
        "ferro run: lost rank 1; ranks 0, 2 went on and ended well.",
    ]


def test_a_job_whose_ranks_were_all_lost_has_failed(script: Script) -> None:
    result = ferro("run", "-n", 2, "--keep-going", script("sys.exit(3 + rank)"))
    assert result.returncode in (3, 4)
    assert "failed first" in result.stderr


def test_the_option_is_named_where_a_rank_was_killed(script: Script) -> None:
    program = script("import signal, time\nif rank: os.kill(os.getpid(), signal.SIGKILL)\ntime.sleep(60)")
    result = ferro("run", "-n", 2, program)
    assert result.returncode == 137
    assert "--keep-going" in result.stderr


def test_a_rank_that_ended_early_with_exit_code_0_is_named(script: Script) -> None:
    program = script("import ferro\ngroup = ferro.init('gloo', timeout_s=20)\nif rank == 1: sys.exit(0)\n"
                     "group.all_reduce(1)")  # fmt: skip
    result = ferro("run", "-n", 2, program)
    assert result.returncode == 1
    (line,) = (line for line in result.stderr.splitlines() if line.startswith("ferro run: "))
    assert "rank 1 ended with exit code 0 after" in line
    assert line.index("rank 1 ended") < line.index("rank 0 failed first")


@pytest.mark.parametrize("end", ["well", "badly", "signal"])
def test_no_descendant_stays_behind_in_a_session_of_its_own(
    script: Script, tmp_path: Path, start: Callable, end: str
) -> None:
    daemon = f"import os, time; open(f'{tmp_path}/pid{{os.getpid()}}', 'w'); time.sleep(60)"
    program = script(f"""
        import glob, subprocess, time
        if os.fork() == 0:  # the daemon's own parent ends at once, and it keeps neither environment nor session
            subprocess.Popen([sys.executable, "-c", {daemon!r}], start_new_session=True, env={{}})
            os._exit(0)
        while not glob.glob("{tmp_path}/pid*"): time.sleep(0.01)
        if {end == "signal"}: time.sleep(60)
        sys.exit({int(end == "badly")})
        """)
    process = start("run", "-n", 1, program)
    until(lambda: len(list(tmp_path.glob("pid*"))) == 1, "the daemon to start")
    (pid,) = (int(path.name.removeprefix("pid")) for path in tmp_path.glob("pid*"))
    if end == "signal":
        process.terminate()
    assert process.wait(TIMEOUT_S) == {"well": 0, "badly": 1, "signal": 143}[end]
    assert not alive(pid)


def test_a_process_that_is_no_descendant_is_left_alone(script: Script, tmp_path: Path) -> None:
    """The launcher takes the place of a shell that had started a program in the background."""
    shell = f"sleep 60 & echo $! > {tmp_path}/pid; exec {sys.executable} -m ferro run {script('pass')}"
    subprocess.run(["sh", "-c", shell], check=True, timeout=TIMEOUT_S, stdout=subprocess.DEVNULL)
    pid = int((tmp_path / "pid").read_text())
    try:
        assert alive(pid)
    finally:
        os.kill(pid, signal.SIGKILL)


def test_ctrl_z_stops_the_ranks_too_until_the_job_goes_on(script: Script, tmp_path: Path, start: Callable) -> None:
    program = script(f"""
        import time
        open("{tmp_path}/pid" + str(os.getpid()), "w")
        while not os.path.exists("{tmp_path}/over"): time.sleep(0.01)
        """)
    process = start("run", "-n", 2, program)
    until(lambda: len(list(tmp_path.glob("pid*"))) == 2, "the ranks to start")
    pids = [process.pid, *(int(path.name.removeprefix("pid")) for path in tmp_path.glob("pid*"))]

    def states() -> str:
        return "".join(Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] for pid in pids)

    process.send_signal(signal.SIGTSTP)
    until(lambda: states() == "TTT", "all to stop")
    process.send_signal(signal.SIGCONT)
    until(lambda: "T" not in states(), "all to go on")
    (tmp_path / "over").touch()
    assert process.wait(TIMEOUT_S) == 0


def test_a_signal_to_one_launcher_gives_the_ranks_of_all_nodes_time_to_save_at_once(
    script: Script, tmp_path: Path, start: Callable
) -> None:
    """Each rank has saved only when the other is saving, too."""
    both = f"""
deadline = time.monotonic() + 20
def save(*_):
    open("{tmp_path}/saving" + str(rank), "w")
    while not os.path.exists(f"{tmp_path}/saving{{1 - rank}}") and time.monotonic() < deadline: time.sleep(0.01)
    print("saved", time.monotonic() < deadline, flush=True)
    sys.exit(0)
signal.signal(signal.SIGTERM, save)
open("{tmp_path}/ready" + str(rank), "w")
"""
    program = script("import signal, time\n" + both + WAIT)
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        endpoint = f"127.0.0.1:{probe.getsockname()[1]}"
    nodes = [
        start(
            *("run", "--nnodes", 2, "--keep-going", "--node-rank", r, "--rdzv-endpoint", endpoint, program),
            FERRO_SECRET="5e" * 32,
        )
        for r in range(2)
    ]
    until(lambda: len(list(tmp_path.glob("ready*"))) == 2, "the ranks to start")
    nodes[0].send_signal(signal.SIGTERM)
    for rank, node in enumerate(nodes):
        out, err = node.communicate(timeout=TIMEOUT_S)
        assert out.decode() == f"[{rank}] saved True\n"
        assert "the launcher of node 0 was stopped by SIGTERM" in err.decode()
        assert node.returncode == 143
