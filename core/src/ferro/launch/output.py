"""The ranks' output on its way to the terminal and to the logs."""

from __future__ import annotations

from pathlib import Path
from typing import BinaryIO

from ferro.launch.segments import Segments
from ferro.launch.tracebacks import HeldTraceback


class Console:
    """The launcher's own stdout and stderr, shared by all ranks a segment at a time."""

    def __init__(self, world_size: int, stdout: BinaryIO, stderr: BinaryIO) -> None:
        """Write prefixes as wide as the largest of `world_size` ranks; none for a world of one."""
        self.prefixed = world_size > 1
        self._width = len(str(world_size - 1))
        self._stdout = stdout
        self._stderr = stderr
        self._at_line_start = True

    def prefix(self, rank: int) -> bytes:
        """What stands before each of a rank's lines."""
        return b"[%*d] " % (self._width, rank) if self.prefixed else b""

    def write(self, data: bytes, *, to_stderr: bool) -> None:
        """Write at once."""
        stream = self._stderr if to_stderr else self._stdout
        stream.write(data)
        stream.flush()
        self._at_line_start = data.endswith(b"\n")

    def say(self, message: str) -> None:
        """A line of the launcher's own, below whatever a rank left unfinished."""
        start = b"" if self._at_line_start else b"\n"
        self.write(start + f"ferro run: {message}\n".encode(), to_stderr=True)


class Stream:
    """One of a rank's two streams."""

    def __init__(self, console: Console, rank: int, *, is_stderr: bool, log: BinaryIO | None):
        self._console = console
        self._prefix = console.prefix(rank)
        self._is_stderr = is_stderr
        self._log = log
        self._segments = Segments()
        self._after_return = False

    def receive(self, data: bytes) -> list[bytes]:
        """Log what arrived; return what is to be shown of it."""
        if self._log is not None:
            self._log.write(data)
        return self._segments.feed(data) if self._console.prefixed else [data]

    def rest(self) -> bytes:
        """The unfinished last line."""
        return self._segments.flush()

    def show(self, segment: bytes) -> None:
        r"""Write a segment with its prefix; one without an end gets a "\n"."""
        if not self._console.prefixed:
            self._console.write(segment, to_stderr=self._is_stderr)
            return
        if not segment.endswith((b"\n", b"\r")):
            segment += b"\n"
        # A lone "\r" shows nothing, and a "\n" may be the second half of an "\r\n".
        bare = segment == b"\r" or (segment == b"\n" and self._after_return)
        self._after_return = segment.endswith(b"\r")
        self._console.write(segment if bare else self._prefix + segment, to_stderr=self._is_stderr)


class RankOutput:
    """What one rank writes: stdout as it comes, stderr with tracebacks held back.

    Attributes:
        traceback: the state of the latest traceback.
    """

    def __init__(self, console: Console, rank: int, *, log_dir: Path | None = None, append: bool = False) -> None:
        """Open the logs.

        Args:
            console: where lines are shown.
            rank: the rank, for prefixes and file names.
            log_dir: where to write `rank<r>.out` and `rank<r>.err`, without prefixes.
            append: keep what an earlier attempt logged.
        """
        self.traceback = HeldTraceback()
        self._logs: list[BinaryIO] = []
        if log_dir is not None:
            mode = "ab" if append else "wb"
            self._logs = [
                (log_dir / f"rank{rank}.{end}").open(mode, buffering=0)  # type: ignore[misc]
                for end in ("out", "err")
            ]
        out, err = self._logs or (None, None)
        self._out = Stream(console, rank, is_stderr=False, log=out)
        self._err = Stream(console, rank, is_stderr=True, log=err)
        # Alone, nobody else's failure can hide the traceback.
        self._holds = console.prefixed

    def close(self) -> None:
        """Close the logs."""
        for log in self._logs:
            log.close()

    def receive_out(self, data: bytes) -> None:
        """Show bytes of the rank's stdout."""
        for segment in self._out.receive(data):
            self._out.show(segment)

    def receive_err(self, data: bytes, now: float) -> None:
        """Show bytes of the rank's stderr, or hold them."""
        for segment in self._err.receive(data):
            self._show_or_hold(segment, now)

    def finish(self, now: float) -> None:
        """Show the unfinished last lines; what is held stays held."""
        if rest := self._out.rest():
            self._out.show(rest)
        if rest := self._err.rest():
            self._show_or_hold(rest, now)

    def release(self) -> bool:
        """Show what is held; return whether there was anything."""
        held = self.traceback.release()
        for segment in held:
            self._err.show(segment)
        return bool(held)

    def release_due(self, now: float) -> None:
        """Show what is held once it was held long enough."""
        due = self.traceback.release_at()
        if due is not None and due <= now:
            self.release()

    def _show_or_hold(self, segment: bytes, now: float) -> None:
        for shown in self.traceback.take(segment, now) if self._holds else [segment]:
            self._err.show(shown)
