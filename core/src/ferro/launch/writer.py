"""The launcher's own output, written by a thread, so that a reader that does not read delays no signal and no death."""

from __future__ import annotations

import os
import select
import threading

_ROOM_BYTES = 1024 * 1024  # with so much unwritten, the ranks' pipes are left unread
_ENDING_ROOM_BYTES = 16 * _ROOM_BYTES  # while ranks are ending, so that a rank that prints as it saves is not held up
_WRITE_BYTES = 64 * 1024


class BackgroundWriter:
    """Writes bytes to a descriptor, in the order given; bytes that cannot be written are dropped."""

    def __init__(self, descriptor: int) -> None:
        self.error: OSError | None = None  # why the latest bytes were dropped, if any were
        self.error_told = False  # the user knows of it
        self.ending = False  # the job is ending, and more may wait to be written
        self._descriptor = descriptor
        self._changed = threading.Condition()
        self._pieces: list[bytes] = []
        self._pending_bytes = 0
        threading.Thread(target=self._run, name="ferro-run-writer", daemon=True).start()

    def write(self, data: bytes) -> None:
        """Have `data` written soon."""
        with self._changed:
            if data and not self.reader_left:
                if not self._pieces:
                    self._changed.notify_all()
                self._pieces.append(data)
                self._pending_bytes += len(data)

    def flush(self) -> None:
        """Do nothing: the thread writes as soon as it can."""

    @property
    def reader_left(self) -> bool:
        """Whether the other end of the pipe was closed."""
        return isinstance(self.error, BrokenPipeError)

    def has_room(self) -> bool:
        """Say whether little enough is unwritten for more to be read."""
        return self._pending_bytes < (_ENDING_ROOM_BYTES if self.ending else _ROOM_BYTES)

    def drain(self, patience_s: float | None) -> None:
        """Wait until all is written, or until nothing more was for `patience_s`."""
        with self._changed:
            while before := self._pending_bytes:
                self._changed.wait(patience_s)
                if patience_s is not None and self._pending_bytes == before:
                    return

    def _run(self) -> None:
        while True:
            with self._changed:
                self._changed.wait_for(lambda: self._pieces)
                data = b"".join(self._pieces)
                self._pieces.clear()
            for start in range(0, len(data), _WRITE_BYTES):
                piece = data[start : start + _WRITE_BYTES]
                try:
                    self._write_all(piece)
                except OSError as error:
                    self.error = error
                with self._changed:
                    self._pending_bytes -= len(piece)
                    self._changed.notify_all()

    def _write_all(self, piece: bytes) -> None:
        while piece:
            try:
                piece = piece[os.write(self._descriptor, piece) :]
            except BlockingIOError:  # a program that shares the pipe or the terminal made it non-blocking
                select.select([], [self._descriptor], [])


def open_writers() -> tuple[BackgroundWriter, BackgroundWriter]:
    """Make the writers to stdout and stderr, which are one where both are the same file, so that the order stays.

    A standard descriptor that is closed becomes /dev/null: otherwise the next socket would take its number.
    """
    for descriptor in (0, 1, 2):
        try:
            os.fstat(descriptor)
        except OSError:
            os.open(os.devnull, os.O_RDWR)  # takes the lowest free number
    out = BackgroundWriter(1)
    return out, out if os.path.samestat(os.fstat(1), os.fstat(2)) else BackgroundWriter(2)
