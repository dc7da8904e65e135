"""The ranks' output on its way to the terminal and to the logs: by lines, with tracebacks held back.

When one rank fails, the others lose their peer and fail a moment later, too; printed at once, their tracebacks would
bury the one that matters. So a rank's stderr is held back from the first line of a traceback on: until the launcher's
report, until the rank ends well, or for a moment, since a program may only log a traceback. A line that is not
complete (a prompt, a row of dots) is shown after a moment, too, and goes on where it stopped unless another was shown.
"""

from __future__ import annotations

import re
import time
from collections.abc import Sequence
from dataclasses import dataclass
from typing import IO, Protocol

from ferro.launch.processes import ChildProcess

HOLD_S = 1.0
CONSEQUENCE_HOLD_S = 3.0  # for a traceback that names another rank's failure, whose own should come first
MAX_HELD_BYTES = 1024 * 1024
MAX_LINE_BYTES = 16 * 1024 * 1024
PARTIAL_S = 0.1  # a short line that does not end is shown after so long
LONG_PARTIAL_S = 2.0  # one that is still being written is shown once nothing more came for so long
_SHORT_BYTES = 4096

_HEADER = re.compile(rb"(?:  \+ Exception Group )?Traceback \(most recent call last\)")
_CONSEQUENCES = re.compile(r"(?:ferro\.errors\.)?(?:PeerLost|GroupClosed|CollectiveTimeout|RendezvousError)\b")


class OutputStream(Protocol):
    """A binary stream, as far as it is written to."""

    def write(self, data: bytes, /) -> object: ...

    def flush(self) -> object: ...


@dataclass(frozen=True, slots=True)
class _OpenLine:
    """The unfinished last line of a stream."""

    source: object  # the output that it belongs to
    returned: bool  # the cursor is at its beginning, after "\r"
    overwritable: bool  # it is one state of a progress bar


class Console:
    """The launcher's own stdout and stderr, shared by all ranks."""

    def __init__(self, world_size: int, stdout: OutputStream, stderr: OutputStream) -> None:
        """Write prefixes as wide as the largest of `world_size` ranks; none for a world of one.

        Where both streams are one object, their lines share a screen.
        """
        self.prefixed = world_size > 1
        self.rank_width = len(str(world_size - 1))
        self._streams = (stdout, stderr)
        self._open: dict[int, _OpenLine] = {}  # by the stream's id
        self._interrupted: set[tuple[int, object]] = set()  # sources whose unfinished line another one ended

    def write(self, data: bytes, *, to_stderr: bool, source: object = None, prefix: bytes = b"") -> None:
        """Write a line, or a piece of one, with the prefix where it begins a line.

        The unfinished line of another source is ended first, unless both are states of progress bars, which overwrite
        one another.
        """
        stream = self._streams[to_stderr]
        if (id(stream), source) in self._interrupted:
            self._interrupted.remove((id(stream), source))
            if data in (b"\n", b"\r\n"):
                return  # the line has ended already
        line = self._open.pop(id(stream), None)
        own = line is not None and line.source is source
        # A lone "\r" shows nothing, and a "\n" may be the second half of an "\r\n".
        start = b"" if data == b"\r" or (data == b"\n" and own) else prefix
        if line is not None and own and not line.returned:
            start = b""
        elif line is not None and not own and not (line.overwritable and data.endswith(b"\r")):
            start = b"\n" + start
            if not line.returned:
                self._interrupted.add((id(stream), line.source))
        elif line is not None and not own and not line.returned and start:
            start = b"\r" + start
        if not data.endswith(b"\n"):
            overwritable = b"\r" in data or (line is not None and own and line.overwritable)
            self._open[id(stream)] = _OpenLine(source, data.endswith(b"\r"), overwritable)
        stream.write(start + data)
        stream.flush()

    def end_line(self, source: object, *, to_stderr: bool) -> None:
        """End the line that a source left unfinished."""
        line = self._open.get(id(self._streams[to_stderr]))
        if line is not None and line.source is source and not line.returned:
            self.write(b"\n", to_stderr=to_stderr, source=source)

    def forget_lines(self) -> None:
        """Take all lines as ended, after the user ended one at the terminal."""
        self._open.clear()

    def say(self, message: str) -> None:
        """Write a line of the launcher's own, below whatever a rank left unfinished."""
        self.write(f"ferro run: {message}\n".encode(errors="replace"), to_stderr=True, source=self)


class LineSplitter:
    r"""Cuts a stream after each "\n" and after each "\r" (which ends each state of a progress bar).

    No byte is lost or changed. A "\r\n" that arrives in one piece ends one line; a "\r" at the end of a piece ends one,
    too, since a progress bar must not wait for the next piece. A line of more than 16 MiB comes in pieces.
    """

    def __init__(self) -> None:
        self._partial: list[bytes] = []
        self._size = 0
        self._began = self._grew = 0.0
        self._in_block = False  # it ended a large piece: a full buffer was written, and the rest is to come

    def feed(self, data: bytes, now: float = 0.0) -> list[bytes]:
        """Take a piece that came `now`; return the lines that are complete, each with its end."""
        lines = data.splitlines(keepends=True)
        rest = lines.pop() if lines and not lines[-1].endswith((b"\n", b"\r")) else b""
        if lines:
            lines[0] = self.flush() + lines[0]
        if rest:
            self._began = self._began if self._partial else now
            self._grew = now
            self._in_block = len(data) >= _SHORT_BYTES
            self._partial.append(rest)
            self._size += len(rest)
        return [*lines, self.flush()] if self._size > MAX_LINE_BYTES else lines

    def partial_due(self) -> float | None:
        """Return the time at which the unfinished last line is to be shown; None if there is none."""
        if not self._partial:
            return None
        is_short = self._size < _SHORT_BYTES and not self._in_block
        return self._began + PARTIAL_S if is_short else self._grew + LONG_PARTIAL_S

    def flush(self) -> bytes:
        """Return the unfinished last line."""
        rest = b"".join(self._partial)
        self._partial, self._size = [], 0
        return rest


class HeldTraceback:
    """One rank's stderr, passed through until a traceback begins."""

    def __init__(self) -> None:
        self.holding = False  # the traceback, and the lines that followed it, have not been shown
        self.began: float | None = None  # `time.monotonic()` of the latest traceback
        self.error = ""  # its line after the frames, such as "ValueError: no such key"
        self._held: list[bytes] = []
        self._held_bytes = 0
        self._held_since = 0.0

    def take(self, line: bytes, now: float) -> list[bytes]:
        """Take a line; return the lines to be shown now."""
        if _HEADER.match(line):
            self._held_since = self._held_since if self.holding else now
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
        if not self.holding:
            return None
        return self._held_since + (CONSEQUENCE_HOLD_S if self.is_consequence() else HOLD_S)

    def is_consequence(self) -> bool:
        """Say whether the traceback names another rank's failure as its cause."""
        return _CONSEQUENCES.match(self.error) is not None


class _Stream:
    """One of a rank's two streams: stderr if there is a `traceback`, which holds lines back."""

    def __init__(self, console: Console, rank: int, log: IO[bytes] | None, traceback: HeldTraceback | None) -> None:
        self._console = console
        self._prefix = b"[%*d] " % (console.rank_width, rank)
        self._log = log
        self._log_failed = False
        self._traceback = traceback
        self._splitter = LineSplitter()

    def receive(self, data: bytes) -> None:
        """Log a piece, and show or hold its lines; the only rank of a job shows it at once.

        Without other ranks, no other failure can bury the traceback.
        """
        if self._log is not None:
            self._write_log(self._log, data)
        if not self._console.prefixed:
            self._console.write(data, to_stderr=self._traceback is not None)
            return
        for line in self._splitter.feed(data, time.monotonic()):
            self._show_or_hold(line)

    def finish(self) -> None:
        """Show or hold the unfinished last line, and end it."""
        if rest := self._splitter.flush():
            self._show_or_hold(rest + b"\n")
        elif self._console.prefixed:
            self._console.end_line(self, to_stderr=self._traceback is not None)

    def due(self) -> float | None:
        """Return the time at which more is to be shown, whether or not more comes."""
        held_until = None if self._traceback is None else self._traceback.release_at()
        return self._splitter.partial_due() if held_until is None else held_until

    def show_due(self) -> None:
        """Show the lines that were held long enough, and an unfinished line after a while."""
        due = self.due()
        if due is None or due > time.monotonic():
            return
        if not self.release():
            self._show_or_hold(self._splitter.flush())

    def release(self) -> bool:
        """Show the held lines; return whether there were any."""
        held = self._traceback.release() if self._traceback is not None else []
        for line in held:
            self._show(line)
        return bool(held)

    def _write_log(self, log: IO[bytes], data: bytes) -> None:
        """Write to the log; one that cannot be written, on a full disk, does not end the job."""
        try:
            while data:
                data = data[log.write(data) :]
        except OSError as exc:
            if not self._log_failed:
                self._console.say(f"{log.name} cannot be written, and has gaps: {exc.strerror}; the job goes on")
            self._log_failed = True

    def _show_or_hold(self, line: bytes) -> None:
        for shown in [line] if self._traceback is None else self._traceback.take(line, time.monotonic()):
            self._show(shown)

    def _show(self, line: bytes) -> None:
        self._console.write(line, to_stderr=self._traceback is not None, source=self, prefix=self._prefix)


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
        return self.err.release()

    def due(self) -> float | None:
        """Return the time at which `release_due` has something to show; None if more must come first."""
        return min((due for due in (self.out.due(), self.err.due()) if due is not None), default=None)

    def release_due(self) -> None:
        """Show lines that were held long enough, and unfinished ones."""
        self.out.show_due()
        self.err.show_due()
