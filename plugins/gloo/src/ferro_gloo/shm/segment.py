"""Segment: memory that several processes of one host map, and that none of them can leave behind.

A segment is a file in /dev/shm without a name, of mode 0600. It is given a name, of 128 random
bits, only while it is handed over: its owner offers it, the others open it, the name goes, and
Linux gives the file no other. A process that is killed takes its nameless segments with it; a
name that is left because all who knew it were killed in that moment is swept away by the next
job. Who has a segment has a lock on it, from before it gets a name, so that the sweeper can tell.
"""

from __future__ import annotations

import errno
import fcntl
import mmap
import os
import secrets
import stat
from contextlib import suppress
from pathlib import Path

FOLDER = Path("/dev/shm")  # noqa: S108 - memory shared by design; names are random, modes 0600
NAME_BYTES = 16
_PREFIX = "ferro-gloo-"
_MODE = 0o600
_HUGE_BYTES = 2 << 20
_POPULATE_WRITE = 23  # MADV_POPULATE_WRITE of Linux 5.14, which Python does not name


class Segment:
    """A piece of shared memory, mapped here.

    What is not reserved must not be touched: it would end the process with SIGBUS if there is no
    memory left.

    Attributes:
        memory: the mapping.
        nbytes: its size.
    """

    def __init__(self, descriptor: int, nbytes: int) -> None:
        """Map an open file; the descriptor is this object's from now on."""
        self._descriptor = descriptor
        self._name: bytes | None = None
        self._pid = os.getpid()
        self.nbytes = nbytes
        fcntl.flock(descriptor, fcntl.LOCK_SH | fcntl.LOCK_NB)
        self.memory = mmap.mmap(descriptor, nbytes)
        # A dump would take in, and so allocate, what is not reserved.
        self.memory.madvise(mmap.MADV_DONTDUMP)
        if nbytes >= _HUGE_BYTES:
            with suppress(OSError):  # of a kernel without huge pages
                self.memory.madvise(mmap.MADV_HUGEPAGE)

    def __del__(self) -> None:
        self.withdraw()
        os.close(self._descriptor)

    @classmethod
    def create(cls, nbytes: int) -> Segment:
        """Make a segment. None of its memory is reserved yet.

        Raises:
            OSError: there is no shared memory.
        """
        descriptor = os.open(FOLDER, os.O_TMPFILE | os.O_RDWR | os.O_CLOEXEC, _MODE)
        try:
            os.ftruncate(descriptor, nbytes)
        except OSError:
            os.close(descriptor)
            raise
        return cls(descriptor, nbytes)

    @classmethod
    def open(cls, name: bytes, nbytes: int) -> Segment:
        """Map what another process offers.

        Raises:
            OSError: there is no such segment here, or it is not this user's.
        """
        descriptor = os.open(_path(name), os.O_RDWR | os.O_NOFOLLOW | os.O_CLOEXEC)
        found = os.fstat(descriptor)
        if not _is_ours(found) or found.st_size != nbytes:
            os.close(descriptor)
            raise OSError(f"{_path(name)} is not the segment that was offered")
        return cls(descriptor, nbytes)

    def reserve(self, offset: int, nbytes: int) -> None:
        """Reserve memory that was not yet.

        Args:
            offset: a multiple of the page size.
            nbytes: how much.

        Raises:
            OSError: there is not enough.
        """
        if nbytes > room():
            raise OSError(f"{FOLDER} has less than the {nbytes >> 10} KiB needed")
        try:
            self.memory.madvise(_POPULATE_WRITE, offset, nbytes)
        except OSError as error:
            if error.errno == errno.EINVAL:  # which a kernel before 5.14 says
                os.posix_fallocate(self._descriptor, offset, nbytes)
                return
            self.memory.madvise(mmap.MADV_REMOVE, offset, nbytes)
            raise OSError(f"{FOLDER} is full, or this process may not use more memory") from error

    def prepare(self, offset: int, nbytes: int) -> None:
        """Map what has been reserved now, all at once, and not page by page when it is used."""
        with suppress(OSError):  # of a kernel before 5.14
            self.memory.madvise(_POPULATE_WRITE, offset, nbytes)

    def offer(self) -> bytes:
        """Give it a name for others to open, once in its life; return the name.

        Raises:
            OSError: it cannot be given one.
        """
        name = secrets.token_bytes(NAME_BYTES)
        # With `src_dir_fd`, for only then does Python follow the link that /proc shows.
        folder = os.open("/proc/self/fd", os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
        try:
            os.link(str(self._descriptor), _path(name), src_dir_fd=folder)
        finally:
            os.close(folder)
        self._name = name
        return name

    def withdraw(self) -> None:
        """Take the name away, if it has one; a forked child leaves it to its parent."""
        name, self._name = self._name, None
        if name is not None and self._pid == os.getpid():
            remove(name)


def room() -> int:
    """Return how many bytes of shared memory are left.

    Raises:
        OSError: there is no shared memory.
    """
    found = os.statvfs(FOLDER)
    if found.f_blocks == 0:  # a tmpfs of size 0 has no bound but the machine's
        return os.sysconf("SC_AVPHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    return found.f_bavail * found.f_frsize


def remove(name: bytes) -> None:
    """Remove a name that was offered, whoever did, if it is still there."""
    _path(name).unlink(missing_ok=True)


def sweep() -> None:
    """Remove names that killed jobs of this user left."""
    for path in FOLDER.glob(_PREFIX + "[0-9a-f]" * 2 * NAME_BYTES):
        # It may go meanwhile, or be held; opening what another user has put there could block.
        with suppress(OSError):
            if _is_ours(path.lstat()):
                _remove_unless_held(path)


def _remove_unless_held(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY | os.O_NOFOLLOW | os.O_CLOEXEC)
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        path.unlink()
    finally:
        os.close(descriptor)


def _path(name: bytes) -> Path:
    return FOLDER / f"{_PREFIX}{name.hex()}"


def _is_ours(found: os.stat_result) -> bool:
    mine = stat.S_ISREG(found.st_mode) and found.st_uid == os.geteuid()
    return mine and stat.S_IMODE(found.st_mode) == _MODE
