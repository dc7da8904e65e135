"""The ranks' output on its way to the terminal and to the logs: by lines, with tracebacks held back.

When one rank fails, the others lose their peer and fail a moment later, too; printed at once, their tracebacks would
bury the one that matters. So a rank's stderr is held back from the first line of a traceback on: until the launcher's
report, until the rank ends well, or for one second, since a program may only log a traceback.
"""

from __future__ import annotations

import re
import time
from collections.abc import Sequence
from typing import IO, BinaryIO

from ferro.launch.processes import ChildProcess

HOLD_S = 1.0
MAX_HELD_BYTES = 1024 * 1024
MAX_LINE_BYTES = 64 * 1024

_HEADER = re.compile(rb"(?:  \+ Exception Group )?Traceback \(most recent call last\)")
_CONSEQUENCES = re.compile(r"(?:ferro\.errors\.)?(?:PeerLost|GroupClosed|CollectiveTimeout)\b")


class Console:
    """The launcher's own stdout and stderr, shared by all ranks a line at a time."""

    def __init__(self, world_size: int, stdout: BinaryIO, stderr: BinaryIO) -> None:
        """Write prefixes as wide as the largest of `world_size` ranks; none for a world of one."""
        self.prefixed = world_size > 1
        self.rank_width = len(str(world_size - 1))
        self._stdout = stdout
        self._stderr = stderr
        self._at_line_start = True

    def write(self, data: bytes, *, to_stderr: bool) -> None:
        stream = self._stderr if to_stderr else self._stdout
        stream.write(data)
        stream.flush()
        self._at_line_start = data.endswith(b"\n")

    def say(self, message: str) -> None:
        """Write a line of the launcher's own, below whatever a rank left unfinished."""
        start = b"" if self._at_line_start else b"\n"
        self.write(start + f"ferro run: {message}\n".encode(), to_stderr=True)


class LineSplitter:
    r"""Cuts a stream after each "\n", after each "\r" (which ends each state of a progress bar), and after 64 KiB.

    No byte is lost or changed. A "\r\n" that arrives in one piece ends one line; a "\r" at the end of a piece ends one,
    too, since a progress bar must not wait for the next piece.
    """

    def __init__(self) -> None:
        self._partial = b""

    def feed(self, data: bytes) -> list[bytes]:
        """Take a piece; return the lines that are complete, each with its end."""
        data = self._partial + data
        lines = [
            line[start : start + MAX_LINE_BYTES]
            for line in data.splitlines(keepends=True)
            for start in range(0, len(line), MAX_LINE_BYTES)
        ]
        complete = not lines or lines[-1].endswith((b"\n", b"\r"))
        self._partial = b"" if complete else lines.pop()
        return lines

    def flush(self) -> bytes:
        """Return the unfinished last line."""
        rest, self._partial = self._partial, b""
        return rest


class HeldTraceback:
    """One rank's stderr, passed through until a traceback begins."""

    def __init__(self) -> None:
        self.holding = False  # the traceback, and the lines that followed it, have not been shown
        self.began: float | None = None  # `time.monotonic()` of the latest traceback
        self.error = ""  # its line after the frames, such as "ValueError: no such key"
        self._held: list[bytes] = []
        self._held_bytes = 0

    def take(self, line: bytes, now: float) -> list[bytes]:
        """Take a line; return the lines to be shown now."""
        if _HEADER.match(line):
            self.began = now
            self.error = ""
            self.holding = True
        elif self.began is not None and not self.error and line.strip() and not line[:1].isspace():
            # Frames are indented: the first line that is not names the exception.
            self.error = line.decode(errors="replace").strip()
        if not self.holding:
            return [line]
        self._held.append(line)
        self._held_bytes += len(line)
        return self.release() if self._held_bytes > MAX_HELD_BYTES else []

    def release(self) -> list[bytes]:
        """Return the held lines; from now on lines pass through until the next traceback."""
        held, self._held = self._held, []
        self._held_bytes = 0
        self.holding = False
        return held

    def release_at(self) -> float | None:
        """Return the time at which held lines are to be shown if the rank has not failed by then."""
        return self.began + HOLD_S if self.holding and self.began is not None else None

    def is_consequence(self) -> bool:
        """Say whether the traceback names another rank's failure as its cause."""
        return _CONSEQUENCES.match(self.error) is not None


class _Stream:
    """One of a rank's two streams: stderr if there is a `traceback`, which holds lines back."""

    def __init__(self, console: Console, rank: int, log: IO[bytes] | None, traceback: HeldTraceback | None) -> None:
        self._console = console
        self._prefix = b"[%*d] " % (console.rank_width, rank)
        self._log = log
        self._traceback = traceback
        self._after_return = False
        self._splitter = LineSplitter()

    def receive(self, data: bytes) -> None:
        """Log a piece, and show or hold its lines; the only rank of a job shows it at once.

        Without other ranks, no other failure can bury the traceback.
        """
        if self._log is not None:
            self._log.write(data)
        if not self._console.prefixed:
            self.show(data)
            return
        for line in self._splitter.feed(data):
            self._show_or_hold(line)

    def finish(self) -> None:
        """Show or hold the unfinished last line."""
        if rest := self._splitter.flush():
            self._show_or_hold(rest)

    def _show_or_hold(self, line: bytes) -> None:
        for shown in [line] if self._traceback is None else self._traceback.take(line, time.monotonic()):
            self.show(shown)

    def show(self, line: bytes) -> None:
        r"""Write a line with its prefix; one without an end gets a "\n"."""
        if self._console.prefixed:
            if not line.endswith((b"\n", b"\r")):
                line += b"\n"
            # A lone "\r" shows nothing, and a "\n" may be the second half of an "\r\n".
            bare = line == b"\r" or (line == b"\n" and self._after_return)
            self._after_return = line.endswith(b"\r")
            line = line if bare else self._prefix + line
        self._console.write(line, to_stderr=self._traceback is not None)


class RankOutput:
    """One rank's output: stdout as it comes, stderr with tracebacks held back; logs without prefixes, if any."""

    def __init__(self, console: Console, rank: int, logs: Sequence[IO[bytes]] = ()) -> None:
        out, err = logs or (None, None)
        self.traceback = HeldTraceback()
        self.out = _Stream(console, rank, out, None)
        self.err = _Stream(console, rank, err, self.traceback)

    def finish(self, process: ChildProcess) -> None:
        """Show the unfinished last lines of a rank that has ended; held lines only where it ended well."""
        self.out.finish()
        self.err.finish()
        if process.returncode == 0:
            self.release()

    def release(self) -> bool:
        """Show the held lines; return whether there were any."""
        held = self.traceback.release()
        for line in held:
            self.err.show(line)
        return bool(held)

    def release_due(self) -> None:
        """Show lines that were held long enough."""
        due = self.traceback.release_at()
        if due is not None and due <= time.monotonic():
            self.release()
