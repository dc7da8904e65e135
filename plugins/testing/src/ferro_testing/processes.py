"""The processes of one `run_ranks`: started, watched until all have ended, ended by force."""

from __future__ import annotations

import contextlib
import os
import secrets
import selectors
import signal
import subprocess
import tempfile
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from types import TracebackType
from typing import Any, Self

from ferro.rendezvous import StoreServer, codec
from ferro.runtime.environment import LaunchInfo, child_environment
from ferro_testing.outcome import Outcome

GRACE_S = 5.0  # for the others to end by themselves when one has failed
REAP_S = 5.0  # for a process to end after its pipe has closed, or after a signal
_OUTPUT_BYTES = 8 * 1024
_READ_BYTES = 64 * 1024


class Job:
    """The ranks of one run, and the store at which they meet.

    Args:
        task: what each does.
        variables: for every rank what is set in its environment besides this process's own.
        timeout_s: deadline of all of it in seconds.
        python: the ranks' interpreter.
    """

    def __init__(
        self, task: Mapping[str, object], variables: Sequence[Mapping[str, str]], timeout_s: float, python: str
    ) -> None:
        encoded = codec.encode(dict(task))
        self._timeout_s = timeout_s
        self._deadline = time.monotonic() + timeout_s
        self._ranks: list[_Rank] = []
        self._directory = tempfile.TemporaryDirectory(prefix="ferro-ranks-")
        folder = Path(self._directory.name)
        (folder / "task").write_bytes(encoded)
        secret = secrets.token_bytes(32)
        self._server = StoreServer(secret=secret)
        try:
            for rank, extra in enumerate(variables):
                info = LaunchInfo(
                    rank=rank,
                    world_size=len(variables),
                    local_rank=rank,
                    local_world_size=len(variables),
                    launcher="ferro",
                    store=self._server.address,
                    secret=secret,
                )
                env = {**child_environment(info, timeout_s=timeout_s), **extra}
                self._ranks.append(_Rank(rank, folder, env, python))
        except BaseException:
            self._end()
            raise

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, _kind: type[BaseException] | None, _error: BaseException | None, _trace: TracebackType | None
    ) -> None:
        self._end()

    def outcomes(self, *, stop_on_failure: bool) -> list[Outcome]:
        """Wait for all ranks to end, at most until the deadline; return what became of them.

        Args:
            stop_on_failure: once a rank has failed, give the others only a few seconds.
        """
        deadline = self._deadline
        failed = False
        with selectors.DefaultSelector() as selector:
            for rank in self._ranks:
                selector.register(rank.pipe, selectors.EVENT_READ, rank)
            while selector.get_map() and (left := deadline - time.monotonic()) > 0:
                for key, _ in selector.select(left):
                    rank = key.data
                    if rank.read():
                        continue
                    selector.unregister(rank.pipe)
                    rank.reap()
                    if stop_on_failure and not failed and rank.failed():
                        failed = True
                        deadline = min(deadline, time.monotonic() + GRACE_S)
            late = [key.data for key in selector.get_map().values()]
        for rank in late:
            rank.late = True
            rank.signal(signal.SIGABRT)
        for rank in late:
            rank.reap()
        why = (
            f"was ended {GRACE_S:g} s after another rank had failed"
            if failed
            else f"did not end within {self._timeout_s:g} s"
        )
        return [rank.outcome(why) for rank in self._ranks]

    def _end(self) -> None:
        for rank in self._ranks:
            rank.close()
        self._server.close()
        self._directory.cleanup()


class _Rank:
    """One process, with its report's pipe and its output's file."""

    def __init__(self, number: int, folder: Path, env: Mapping[str, str], python: str) -> None:
        self.late = False
        self._ended_s = 0.0
        self._number = number
        self._received = bytearray()
        self._output = folder / f"output{number}"
        self.pipe, theirs = os.pipe()
        try:
            with self._output.open("wb") as output:
                self._process = subprocess.Popen(  # noqa: S603 - our own entry point
                    [python, "-m", "ferro_testing.rank", str(folder / "task"), str(theirs)],
                    env=env,
                    stdin=subprocess.DEVNULL,
                    stdout=output,
                    stderr=subprocess.STDOUT,
                    pass_fds=(theirs,),
                    start_new_session=True,
                )
        except BaseException:
            os.close(self.pipe)
            raise
        finally:
            os.close(theirs)

    def read(self) -> bool:
        """Take what has come; say whether more may follow."""
        data = os.read(self.pipe, _READ_BYTES)
        self._received += data
        return bool(data)

    def signal(self, signum: signal.Signals) -> None:
        """Send a signal to the process and its descendants."""
        with contextlib.suppress(ProcessLookupError, PermissionError):
            os.killpg(self._process.pid, signum)

    def reap(self) -> None:
        """Wait a moment for the process to end; then make it."""
        try:
            self._process.wait(REAP_S)
        except subprocess.TimeoutExpired:
            self.late = True
            self.signal(signal.SIGKILL)
            self._process.wait(REAP_S)
        self.signal(signal.SIGKILL)  # what it may have started and left behind
        self._ended_s = time.monotonic()

    def failed(self) -> bool:
        """Say whether the process, which has ended, did so badly."""
        return self._process.returncode != 0 or "result" not in self._report()

    def outcome(self, why_late: str) -> Outcome:
        """Return what became of it."""
        report, code = self._report(), self._process.returncode
        ended_by = signal.Signals(-code).name if code is not None and code < 0 else ""
        kind, text = str(report.get("error_type", "")), str(report.get("error_text", ""))
        if self.late:
            kind, text, ended_by = "Late", f"{why_late}. {text}", ""
        elif not kind and ended_by:
            kind, text = "Killed", f"ended by {ended_by}"
        elif not kind and (code or "result" not in report):
            kind, text = "Exited", f"left with exit status {code}"
        raw = report.get("result")
        return Outcome(
            rank=self._number,
            result=codec.decode(raw) if isinstance(raw, bytes) and not kind else None,
            error_type=kind,
            error_text=text,
            exit_code=code if code is not None and code >= 0 else None,
            signal=ended_by,
            ended_s=float(report.get("ended_s", self._ended_s)),
            output=tail(self._output),
        )

    def close(self) -> None:
        """End what is left of it."""
        if self._process.poll() is None:
            self.signal(signal.SIGKILL)
            self._process.wait(REAP_S)
        os.close(self.pipe)

    def _report(self) -> dict[str, Any]:
        """Return the last whole report that came, {} when none did."""
        found: Any = {}
        data = memoryview(self._received)
        while len(data) >= 8 and len(data) >= 8 + (size := int.from_bytes(data[:8], "big")):
            found = codec.decode(data[8 : 8 + size])
            data = data[8 + size :]
        return found if isinstance(found, dict) else {}


def tail(output: Path) -> str:
    """Return the end of what was printed into a file, "" where there is none."""
    data = output.read_bytes() if output.exists() else b""
    text = data[-_OUTPUT_BYTES:].decode(errors="replace")
    return f"… {text}" if len(data) > _OUTPUT_BYTES else text
