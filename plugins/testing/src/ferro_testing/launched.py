"""The ranks of one `run_ranks` under a launcher such as mpiexec: started by it, not by us.

A launcher passes no pipes on and mixes what its ranks print. So every rank leaves notes in the
job's private folder, named by its rank: its process id, its output and its report. The ranks meet
as they would under the launcher alone: no FERRO_STORE tells them where.
"""

from __future__ import annotations

import contextlib
import os
import re
import secrets
import signal
import subprocess
import tempfile
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from types import TracebackType
from typing import Any, Self

from ferro.rendezvous import codec
from ferro.runtime.environment import LaunchInfo, child_environment
from ferro_testing.outcome import Outcome
from ferro_testing.processes import GRACE_S, REAP_S, tail

_LOOK_S = 0.02
# What tells a process its place, and the ranks are to be told by their launcher.
_PLACE = (
    *("RANK", "WORLD_SIZE", "LOCAL_RANK", "LOCAL_WORLD_SIZE", "FERRO_STORE"),
    *("MASTER_ADDR", "MASTER_PORT", "FERRO_MASTER_PORT", "FERRO_RESTART"),
)


class LaunchedJob:
    """The ranks of one run, and the launcher that started them.

    Args:
        task: what each does.
        world_size: number of ranks.
        launcher: the command that starts a program on so many ranks, up to that program.
        python: the ranks' interpreter.
        variables: what is set in the launcher's environment besides this process's own.
        timeout_s: deadline of all of it in seconds.
    """

    def __init__(
        self,
        task: Mapping[str, object],
        world_size: int,
        launcher: Sequence[str],
        python: str,
        variables: Mapping[str, str],
        timeout_s: float,
    ) -> None:
        encoded = codec.encode(dict(task))
        self._timeout_s = timeout_s
        self._deadline = time.monotonic() + timeout_s
        self._directory = tempfile.TemporaryDirectory(prefix="ferro-ranks-")
        self._folder = Path(self._directory.name)
        (self._folder / "task").write_bytes(encoded)
        self._words = self._folder / "launcher"
        self._late: set[int] = set()
        self._ranks = range(world_size)
        rank = ("-m", "ferro_testing.rank", str(self._folder / "task"), str(self._folder))
        try:
            with self._words.open("wb") as words:
                self._launcher = subprocess.Popen(  # noqa: S603 - as the caller asked
                    [*launcher, python, *rank],
                    env={**_environment(world_size, timeout_s), **variables},
                    stdin=subprocess.DEVNULL,
                    stdout=words,
                    stderr=subprocess.STDOUT,
                    start_new_session=True,
                )
        except BaseException:
            self._directory.cleanup()
            raise

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, _kind: type[BaseException] | None, _error: BaseException | None, _trace: TracebackType | None
    ) -> None:
        self._end()
        self._directory.cleanup()

    def outcomes(self, *, stop_on_failure: bool) -> list[Outcome]:
        """Wait for the launcher to end, at most until the deadline; tell what became of its ranks.

        Args:
            stop_on_failure: once a rank has failed, give the others only a few seconds.
        """
        deadline = self._deadline
        failed = False
        while not self._ends_within(_LOOK_S) and time.monotonic() < deadline:
            if stop_on_failure and not failed and any(map(self._failed, self._ranks)):
                failed = True
                deadline = min(deadline, time.monotonic() + GRACE_S)
        if self._launcher.poll() is None:
            self._late = {rank for rank in self._ranks if not self._report(rank)}
            self._signal_ranks(signal.SIGABRT)  # so that every stack is in its output
            self._ends_within(REAP_S)
        self._end()
        why = (
            f"was ended {GRACE_S:g} s after another rank had failed"
            if failed
            else f"did not end within {self._timeout_s:g} s"
        )
        reports = [self._report(rank) for rank in self._ranks]
        well = all("result" in report for report in reports)
        return [self._outcome(rank, reports[rank], why, all_well=well) for rank in self._ranks]

    def _outcome(self, rank: int, report: dict[str, Any], why_late: str, *, all_well: bool) -> Outcome:
        """Return what became of a rank, as well as can be told without its exit status.

        Where the launcher failed and no rank says that it did, each may have.
        """
        code = self._launcher.returncode
        kind, text = str(report.get("error_type", "")), str(report.get("error_text", ""))
        ended_by, words = "", ""
        exit_code: int | None = 1 if kind else 0
        if rank in self._late:
            kind, text, exit_code = "Late", f"{why_late}. {text}", None
        elif not kind and ("result" not in report or (code and all_well)):
            words = tail(self._words)
            ended_by = _signal_in(code, words)
            kind, text, exit_code = "Exited", f"the launcher left with exit status {code}", code
            if ended_by:
                kind, text, exit_code = "Killed", f"the launcher tells of {ended_by}", None
        raw = report.get("result")
        return Outcome(
            rank=rank,
            result=codec.decode(raw) if isinstance(raw, bytes) and not kind else None,
            error_type=kind,
            error_text=text,
            exit_code=exit_code,
            signal=ended_by,
            ended_s=float(report.get("ended_s", time.monotonic())),
            output=tail(self._folder / f"output{rank}") + words,
        )

    def _failed(self, rank: int) -> bool:
        return "error_type" in self._report(rank)

    def _report(self, rank: int) -> dict[str, Any]:
        """Return the last report of a rank, {} where it has made none."""
        try:
            found = codec.decode((self._folder / f"report{rank}").read_bytes())
        except FileNotFoundError:
            return {}
        return found if isinstance(found, dict) else {}

    def _ends_within(self, seconds: float) -> bool:
        try:
            self._launcher.wait(seconds)
        except subprocess.TimeoutExpired:
            return False
        return True

    def _end(self) -> None:
        """End what is left: the launcher ends its ranks when it is asked to, or else we do."""
        if self._launcher.poll() is None:
            with contextlib.suppress(ProcessLookupError):
                os.killpg(self._launcher.pid, signal.SIGTERM)
            if not self._ends_within(REAP_S):
                self._signal_ranks(signal.SIGKILL)
        with contextlib.suppress(ProcessLookupError, PermissionError):
            os.killpg(self._launcher.pid, signal.SIGKILL)
        self._launcher.wait(REAP_S)

    def _signal_ranks(self, signum: signal.Signals) -> None:
        """Send a signal to ranks that have not reported. While the launcher lives, ids are theirs.

        Launchers put ranks into process groups, even sessions, of their own.
        """
        for rank in self._ranks:
            with contextlib.suppress(FileNotFoundError, ProcessLookupError, PermissionError):
                pid = int((self._folder / f"pid{rank}").read_bytes())
                if not self._report(rank) or signum == signal.SIGKILL:
                    os.kill(pid, signum)


def _environment(world_size: int, timeout_s: float) -> dict[str, str]:
    """Return what the ranks of `run_ranks` are always given, but for their places."""
    info = LaunchInfo(
        rank=0,
        world_size=world_size,
        local_rank=0,
        local_world_size=world_size,
        launcher="",
        secret=secrets.token_bytes(32),
    )
    env = child_environment(info, timeout_s=timeout_s)
    return {name: value for name, value in env.items() if name not in _PLACE}


def _signal_in(code: int | None, words: str) -> str:
    """Return the signal that ended a rank, from the launcher's exit status or its words."""
    if code is not None and code > 128:
        number = code - 128
    elif found := re.search(r"signal (\d+)", words):
        number = int(found[1])
    else:
        return ""
    return signal.Signals(number).name if number in set(signal.Signals) else ""
