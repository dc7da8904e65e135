"""Files on a disk: read and written by as few system calls as there can be, straight from and into the caller's memory.

A file that is written is on its way to the disk while more is written: the kernel would begin only after seconds, or
when the file is synced, and keep the disk idle until then. 1 GiB in writes of 4 MiB (ext4, medians of interleaved
pairs) took 0.53 of the time that writes followed by one fsync take; from two processes, 0.57. Advice about reads
(posix_fadvise) has brought nothing.

A call writes at most 1 MiB. For a longer one the kernel looks for as many consecutive pages at once, and once memory is
in pieces it has to move others for that: 256 MiB in calls of 4 MiB took 0.51 s of processor time (ext4, Linux 6,
median of 30), in calls of 1 MiB 0.15 s, and 0.29 of the time until all was on disk.
"""

from __future__ import annotations

import os
import stat
import threading
from collections.abc import Sequence

from ferro_checkpoint.errors import CheckpointDamaged
from ferro_checkpoint.storage import system_calls
from ferro_checkpoint.storage.failures import reading, writing
from ferro_checkpoint.storage.storage import Bytes

_BUFFERS = min(os.sysconf("SC_IOV_MAX"), 1024) if hasattr(os, "sysconf") else 16  # of one call
_WRITE_BYTES = 1 << 20  # of one call
_WRITE_BACK_BYTES = 4 << 20
_LEAST_BYTES = 256 << 10


class LocalReadableFile:
    """A file that is open for reading."""

    def __init__(self, path: str, directory: int | None = None) -> None:
        """Open it.

        Args:
            path: of the file.
            directory: the descriptor of its directory, whatever has the directory's path by now; None: by the path.

        Raises:
            FileNotFoundError: it is not there.
            CheckpointDamaged: it is no file.
        """
        self.path = path
        with reading(path):
            name = path if directory is None else os.path.basename(path)
            flags = os.O_RDONLY | os.O_CLOEXEC | os.O_NONBLOCK  # does not wait at a pipe
            self._fd = os.open(name, flags, dir_fd=directory)
            about = os.fstat(self._fd)
        self.nbytes = about.st_size
        if not stat.S_ISREG(about.st_mode):
            self.close()
            raise CheckpointDamaged(f"{path}: this is no file", path=path)

    def read_into(self, destinations: Sequence[Bytes], offset: int) -> None:
        """Fill these, one after the other, with the file's bytes from `offset` on; see `ReadableFile`."""
        waiting = [one for one in destinations if one.nbytes]
        first = 0
        while first < len(waiting):
            with reading(self.path):
                count = os.preadv(self._fd, waiting[first : first + _BUFFERS], offset)
            if count == 0:
                text = f"{self.path}: the file ends at byte {offset}: it was cut off, or has changed while it was read"
                raise CheckpointDamaged(text, path=self.path)
            offset += count
            first = _advance(waiting, first, count)

    def identity(self) -> object:
        """Identify this file with its contents: the same unless somebody has written to it or replaced it.

        The time of the last change of its entry (st_ctime) is no part: it changes when the file is removed or linked.
        """
        with reading(self.path):
            about = os.fstat(self._fd)
        return about.st_dev, about.st_ino, about.st_size, about.st_mtime_ns

    def close(self) -> None:
        """Close it; a second call has no effect."""
        fd, self._fd = self._fd, -1
        if fd >= 0:
            os.close(fd)

    def __enter__(self) -> LocalReadableFile:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()


class LocalWritableFile:
    """A file that is open for writing at any place; several threads may write at the same time."""

    def __init__(self, path: str, fd: int) -> None:
        """Take over an open file."""
        self.path = path
        self._fd = fd
        self._lock = threading.Lock()
        self._begin = self._end = 0  # a range that was written, and is not yet on its way to the disk

    def write(self, sources: Sequence[Bytes], offset: int) -> None:
        """Write these, one after the other, from `offset` on."""
        waiting = [one for one in sources if one.nbytes]
        first, end = 0, offset
        while first < len(waiting):
            with writing(self.path):
                count = system_calls.write(self._fd, _first_bytes(waiting, first), end)
            end += count
            first = _advance(waiting, first, count)
        self._write_back(offset, end)

    def _write_back(self, begin: int, end: int) -> None:
        """Note that a range was written, and have the kernel begin to write to disk what is enough by now."""
        ranges = []
        with self._lock:
            if begin != self._end:
                ranges.append((self._begin, self._end))
                self._begin = begin
            self._end = end
            if end - self._begin >= _WRITE_BACK_BYTES:
                ranges.append((self._begin, end))
                self._begin = end
        for first, last in ranges:
            if last - first >= _LEAST_BYTES:  # a lesser one waits for `sync`
                system_calls.start_writing_back(self._fd, first, last - first)

    def sync(self) -> None:
        """Wait until all that was written is on disk."""
        with writing(self.path):
            system_calls.sync_data(self._fd)

    def close(self) -> None:
        """Close it; a second call has no effect."""
        fd, self._fd = self._fd, -1
        if fd >= 0:
            with writing(self.path):  # where the file system tells of a failure as late as here
                os.close(fd)

    def __enter__(self) -> LocalWritableFile:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()


def _first_bytes(waiting: list[Bytes], first: int) -> list[Bytes]:
    """Return the buffers from `first` on that one call writes, the last of them cut off."""
    chosen, left = [], _WRITE_BYTES
    for one in waiting[first : first + _BUFFERS]:
        chosen.append(one[:left])
        left -= chosen[-1].nbytes
        if not left:
            break
    return chosen


def _advance(waiting: list[Bytes], first: int, count: int) -> int:
    """Cut off the `count` bytes that were moved; return the index of the first buffer that is not yet done."""
    while count and count >= waiting[first].nbytes:
        count -= waiting[first].nbytes
        first += 1
    if count:
        waiting[first] = waiting[first][count:]
    return first
