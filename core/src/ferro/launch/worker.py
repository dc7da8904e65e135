"""One rank as a process: its group, its pipes, its end."""

from __future__ import annotations

import contextlib
import os
import signal
import subprocess
import time
from collections.abc import Callable, Mapping, Sequence

from ferro.launch.output import RankOutput

_READ_BYTES = 64 * 1024
_REAP_S = 5.0  # a killed process ends at once, unless the kernel holds it
_DRAIN_READS = 64  # more than a pipe holds, yet an end where a grandchild goes on writing


class Worker:
    """A rank that was started in a session, and so in a process group, of its own.

    Attributes:
        rank: the rank.
        group: its process group's id, which is also its process id.
        output: where its output goes.
        code: its exit code, negative for a signal's number; None while it runs.
        ended_at: `time.monotonic()` when its end was noticed.
        told_at: when the launcher first sent it a signal, or None if it ended before that.
        gone: no process of its group is left; the group's number may belong to others now.
    """

    def __init__(self, rank: int, command: Sequence[str], env: Mapping[str, str], output: RankOutput) -> None:
        """Start the process.

        Raises:
            OSError: it could not be started.
        """
        self.rank = rank
        self.output = output
        self.code: int | None = None
        self.ended_at = 0.0
        self.told_at: float | None = None
        self.gone = False
        self._process = subprocess.Popen(  # noqa: S603 - the user's own program
            command,
            env=env,
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            start_new_session=True,
            bufsize=0,
        )
        self.group = self._process.pid
        assert self._process.stdout is not None
        assert self._process.stderr is not None
        self._pipes: dict[int, Callable[[bytes], None]] = {
            self._process.stdout.fileno(): output.receive_out,
            self._process.stderr.fileno(): self._receive_err,
        }
        for pipe in self._pipes:
            os.set_blocking(pipe, False)

    def pipes(self) -> list[int]:
        """File descriptors to read from, with `read`."""
        return list(self._pipes)

    def read(self, pipe: int) -> int | None:
        """Move what is there; return how many bytes: 0 at the end, None when there is nothing."""
        try:
            data = os.read(pipe, _READ_BYTES)
        except BlockingIOError:
            return None
        if data:
            self._pipes[pipe](data)
        return len(data)

    def notice_end(self) -> bool:
        """Whether it has ended since the last call; if so, takes its last words."""
        if self.code is not None:
            return False
        self.code = self._process.poll()
        if self.code is None:
            return False
        self.ended_at = time.monotonic()
        self.drain()
        self.output.finish(self.ended_at)
        if self.code == 0:
            self.output.release()
        self.check_gone()
        return True

    def drain(self) -> None:
        """Move what is in the pipes now."""
        for pipe in self._pipes:
            for _ in range(_DRAIN_READS):
                if not self.read(pipe):
                    break

    def pass_on(self, signum: signal.Signals) -> None:
        """Hand the rank itself a signal that is not to end it."""
        if self.code is None:
            with contextlib.suppress(ProcessLookupError):
                self._process.send_signal(signum)

    def signal(self, signum: signal.Signals) -> None:
        """Send a signal to the rank and its descendants, as far as they share its group."""
        if self.gone:
            return
        if self.code is None and self.told_at is None:
            self.told_at = time.monotonic()
        with contextlib.suppress(ProcessLookupError, PermissionError):
            os.killpg(self.group, signum)

    def check_gone(self) -> bool:
        """Look whether the rank and all descendants in its group have ended."""
        if not self.gone and self.code is not None:
            try:
                os.killpg(self.group, 0)
            except (ProcessLookupError, PermissionError):  # the latter: zombies, on macOS
                self.gone = True
        return self.gone

    def close(self) -> None:
        """Reap a process that was killed, and close the pipes and logs."""
        with contextlib.suppress(subprocess.TimeoutExpired):
            self._process.wait(_REAP_S)
        self.output.close()
        for pipe in (self._process.stdout, self._process.stderr):
            assert pipe is not None
            pipe.close()

    def _receive_err(self, data: bytes) -> None:
        self.output.receive_err(data, time.monotonic())
