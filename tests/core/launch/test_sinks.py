"""Where the launcher's output goes, and where its input comes from: pipes, terminals, full disks, nothing at all."""

import os
import pty
import signal
import subprocess
import time
import tty
from collections.abc import Callable
from pathlib import Path

import pytest

from .conftest import TIMEOUT_S, alive, clean_environment, ferro_command, until

Script = Callable[[str], Path]


def shell(command: str, *arguments: object) -> subprocess.CompletedProcess[bytes]:
    """Run a shell command in which "$@" stands for `ferro run` with these arguments."""
    whole = ["sh", "-c", command, "sh", *ferro_command("run", *arguments)]
    return subprocess.run(whole, capture_output=True, env=clean_environment(), timeout=TIMEOUT_S, check=False)


@pytest.mark.parametrize("end", ["signal", "death"])
def test_a_reader_that_does_not_read_makes_the_launcher_deaf_to_nothing(
    script: Script, tmp_path: Path, end: str
) -> None:
    """The ranks write until their pipes are full; one that ends itself then has its end noticed, too."""
    program = script(f"""
        import signal, threading, time
        open("{tmp_path}/pid" + str(os.getpid()), "w")
        def die():
            while not os.path.exists("{tmp_path}/die"): time.sleep(0.01)
            os.kill(os.getpid(), signal.SIGKILL)
        if rank: threading.Thread(target=die, daemon=True).start()
        while True: os.write(1, b"y" * 1000 + b"\\n")
        """)
    reader, writer = os.pipe()
    with subprocess.Popen(ferro_command("run", "-n", 2, program), stdout=writer, env=clean_environment()) as process:
        os.close(writer)
        try:
            until(lambda: len(list(tmp_path.glob("pid*"))) == 2, "the ranks to start")
            ranks = [int(path.name.removeprefix("pid")) for path in tmp_path.glob("pid*")]

            def written() -> list[str]:
                return [Path(f"/proc/{pid}/io").read_text() for pid in ranks]

            def blocked() -> bool:
                before = written()
                time.sleep(0.2)
                return written() == before

            until(blocked, "the ranks to wait for a reader")
            if end == "signal":
                process.send_signal(signal.SIGTERM)
                assert process.wait(TIMEOUT_S) == 143
            else:
                (tmp_path / "die").touch()
            until(lambda: not any(map(alive, ranks)), "the ranks to end")
        finally:
            os.close(reader)
    assert process.returncode == (143 if end == "signal" else 137)


def test_a_full_disk_and_closed_outputs_do_not_end_the_job(script: Script, tmp_path: Path) -> None:
    program = script(f"print('out', flush=True); open('{tmp_path}/done' + str(rank), 'w')")
    result = shell('"$@" > /dev/full', "-n", 2, program)
    assert (result.returncode, result.stderr.count(b"No space left on device")) == (0, 1)
    result = shell('"$@" >&- <&- 2>&-', "-n", 2, program)
    assert (result.returncode, result.stdout, result.stderr) == (0, b"", b"")
    assert {path.name for path in tmp_path.glob("done*")} == {"done0", "done1"}


def test_long_lines_bars_and_dots_come_through_whole(script: Script) -> None:
    program = script(r"""
        import time
        if rank == 0:
            sys.stdout.write("x" * 2_000_000 + "\n")
            for _ in range(3): sys.stdout.write("."); time.sleep(0.15)
            sys.stdout.write("\n")
            for k in range(3): sys.stdout.write(f"\r{k}"); time.sleep(0.15)
        """)
    result = shell('"$@"', "-n", 2, program)
    assert result.stdout == b"[0] " + b"x" * 2_000_000 + b"\n[0] ...\n\r[0] 0\r[0] 1\r[0] 2\n"


@pytest.mark.parametrize("ranks", [1, 2])
def test_input_goes_to_rank_0(script: Script, ranks: int) -> None:
    program = script("print(sum(1 for _ in sys.stdin))")
    prefix = (lambda rank: f"[{rank}] ") if ranks > 1 else (lambda _: "")
    expected = sorted(f"{prefix(rank)}{200_000 if rank == 0 else 0}" for rank in range(ranks))
    result = shell('seq 200000 | "$@"', "-n", ranks, program)
    assert sorted(result.stdout.decode().splitlines()) == expected


def test_input_that_no_rank_reads_is_left_to_others(script: Script) -> None:
    """The input of a shell's loop is not eaten by the programs that it runs."""
    result = shell('seq 3 | while read k; do "$@"; done', script("print('ran')"))
    assert result.stdout == b"ran\n" * 3


class TestTerminal:
    """The launcher's input is a terminal, which may be that of an interactive shell."""

    PROGRAM = "name = input('name? ') if rank == 0 else 'nobody'\nprint('hello', name)"

    def test_what_is_typed_reaches_a_prompt(self, script: Script) -> None:
        ours, theirs = pty.openpty()
        tty.setraw(theirs)
        command = ferro_command("run", "-n", 2, script(self.PROGRAM))
        with subprocess.Popen(
            command, stdin=theirs, stdout=subprocess.PIPE, env=clean_environment(), start_new_session=True
        ) as process:
            os.close(theirs)
            assert process.stdout is not None
            shown = b""
            while b"[0] name? " not in shown:
                shown += os.read(process.stdout.fileno(), 100)
            os.write(ours, b"bob\n")
            shown += process.stdout.read()
            assert process.wait(TIMEOUT_S) == 0
        os.close(ours)
        assert sorted(shown.replace(b"name? ", b"name? \n").splitlines()) == [
            b"[0] hello bob",
            b"[0] name? ",
            b"[1] hello nobody",
        ]

    def test_a_background_job_is_not_stopped_and_leaves_the_input_to_the_shell(self, script: Script) -> None:
        """`set -m` gives the job a process group of its own, as an interactive shell does."""
        program = script("import time; time.sleep(0.5); print('end', flush=True)")
        launcher = " ".join(map(str, ferro_command("run", "-n", 2, program)))
        pid, terminal = pty.fork()
        if pid == 0:
            commands = f"set -m; {launcher} & sleep 0.2; read x; echo got $x; wait %1; echo rc $?"
            os.execvpe("bash", ["bash", "-c", commands], clean_environment())
        shown = b""
        os.write(terminal, b"line\n")
        try:
            while chunk := os.read(terminal, 1000):
                shown += chunk
        except OSError:  # how Linux reports the end of a terminal
            pass
        os.waitpid(pid, 0)
        os.close(terminal)
        assert b"got line" in shown
        assert shown.count(b"] end") == 2
        assert b"rc 0" in shown
