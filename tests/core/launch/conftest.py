"""Run `ferro run` as a user does: a real process, with real ranks below it."""

import os
import subprocess
import sys
import textwrap
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

TIMEOUT_S = 30.0


def clean_environment(**extra: str) -> dict[str, str]:
    """This process's environment without any launcher's variables."""
    prefixes = ("FERRO_", "OMPI_", "PMI_", "PET_", "SLURM_", "MASTER_", "OMP_", "TORCHELASTIC_")
    names = ("RANK", "WORLD_SIZE", "LOCAL_RANK", "LOCAL_WORLD_SIZE")
    kept = {k: v for k, v in os.environ.items() if k not in names and not k.startswith(prefixes)}
    return kept | extra


def ferro_command(*arguments: object) -> list[str]:
    return [sys.executable, "-m", "ferro", *map(str, arguments)]


def ferro(*arguments: object, **env: str) -> subprocess.CompletedProcess[str]:
    """Run to the end; newlines are left as they are."""
    result = subprocess.run(
        ferro_command(*arguments), capture_output=True, env=clean_environment(**env), timeout=TIMEOUT_S, check=False
    )
    return subprocess.CompletedProcess(result.args, result.returncode, result.stdout.decode(), result.stderr.decode())


def until(condition: Callable[[], bool], what: str) -> None:
    """Poll a condition that another process brings about."""
    deadline = time.monotonic() + TIMEOUT_S
    while not condition():
        assert time.monotonic() < deadline, f"{what}: not within {TIMEOUT_S} s"
        time.sleep(0.01)


def alive(pid: int) -> bool:
    """Whether a process runs; a zombie does not."""
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except OSError:
        return False


@pytest.fixture
def script(tmp_path: Path) -> Callable[[str], Path]:
    """Write a program for the ranks."""

    def write(source: str) -> Path:
        path = tmp_path / "program.py"
        path.write_text("import os, sys\nrank = int(os.environ['RANK'])\n" + textwrap.dedent(source))
        return path

    return write


@pytest.fixture
def start() -> Iterator[Callable[..., "subprocess.Popen[bytes]"]]:
    """Start `ferro` in the background, with a line of Python that patches it; end it after the test."""
    started: list[subprocess.Popen[bytes]] = []

    def begin(*arguments: object, patch: str = "", stdin: bool = False, **env: str) -> "subprocess.Popen[bytes]":
        command = ferro_command(*arguments)
        if patch:
            program = f"import sys, ferro.cli.main, ferro.launch.processes\n{patch}\nsys.exit(ferro.cli.main.main())"
            command[1:3] = ["-c", program]
        process = subprocess.Popen(
            command,
            stdin=subprocess.PIPE if stdin else subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            env=clean_environment(**env),
        )
        started.append(process)
        return process

    yield begin
    for process in started:
        with process:
            process.kill()
