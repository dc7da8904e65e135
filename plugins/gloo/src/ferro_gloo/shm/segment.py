"""Shared-memory segments: memory that several processes of one host map, and that never leaks.

A segment is a file in /dev/shm without a name, of mode 0600. Its owner gives it a name of 128 random bits only while
the others open it; then the name is unlinked, and Linux never gives the file another. Linux frees a nameless segment
with the last process that maps it, even if that process is killed. A name stays behind only if all processes that know
it are killed while the segment has it. The next job removes such names: every process that has a segment open holds a
lock on it, and a stale segment has no lock.
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

from ferro_gloo.shm.mapping import Mapping

SHM_DIRECTORY = Path("/dev/shm")  # noqa: S108 - shared by design; random names of mode 0600
NAME_BYTES = 16
_PREFIX = "ferro-gloo-"
_MODE = 0o600
_HUGE_BYTES = 2 << 20
_POPULATE_WRITE = 23  # MADV_POPULATE_WRITE of Linux 5.14, which Python does not name


class ShmSegment:
    """Shared memory that this process has mapped.

    Memory must be reserved before it is used: otherwise SIGBUS ends the process where no memory is left.

    Attributes:
        memory: its bytes.
        nbytes: its size.
    """

    def __init__(self, descriptor: int, nbytes: int) -> None:
        """Map an open file; this object closes the descriptor."""
        self._descriptor = descriptor
        self._name: bytes | None = None
        self._pid = os.getpid()
        self.nbytes = nbytes
        fcntl.flock(descriptor, fcntl.LOCK_SH | fcntl.LOCK_NB)
        self._mapping = Mapping(descriptor, nbytes)
        self.memory = self._mapping.memory
        # A core dump would read, and so allocate, memory that is not reserved.
        self._mapping.advise(mmap.MADV_DONTDUMP, 0, nbytes)
        if nbytes >= _HUGE_BYTES:
            with suppress(OSError):  # a kernel without huge pages refuses
                self._mapping.advise(mmap.MADV_HUGEPAGE, 0, nbytes)

    def __del__(self) -> None:
        self.close_file()

    def close_file(self) -> None:
        """Remove the name, and close the file; views of the memory stay as they are. Idempotent."""
        self.unlink()
        descriptor, self._descriptor = self._descriptor, -1
        if descriptor >= 0:
            os.close(descriptor)

    def close(self) -> None:
        """Close the file and give its memory back, whoever has views of it: see `Mapping.release`. Idempotent."""
        self.close_file()
        self._mapping.release()

    @classmethod
    def create(cls, nbytes: int) -> ShmSegment:
        """Create a segment, none of whose memory is reserved yet.

        Raises:
            OSError: there is no shared memory.
        """
        descriptor = os.open(SHM_DIRECTORY, os.O_TMPFILE | os.O_RDWR | os.O_CLOEXEC, _MODE)
        try:
            os.ftruncate(descriptor, nbytes)
        except OSError:
            os.close(descriptor)
            raise
        return cls(descriptor, nbytes)

    @classmethod
    def open(cls, name: bytes, nbytes: int) -> ShmSegment:
        """Map the segment that another process has exposed.

        Raises:
            OSError: this host has no such segment, or it is another user's.
        """
        descriptor = os.open(_path(name), os.O_RDWR | os.O_NOFOLLOW | os.O_CLOEXEC)
        found = os.fstat(descriptor)
        if not _is_own_segment(found) or found.st_size != nbytes:
            os.close(descriptor)
            raise OSError(f"{_path(name)} is not the segment that was offered")
        return cls(descriptor, nbytes)

    def reserve(self, offset: int, nbytes: int) -> None:
        """Reserve memory that is not reserved yet; `offset` is a multiple of the page size.

        Raises:
            OSError: there is not enough.
        """
        if nbytes > free_bytes():
            raise OSError(f"{SHM_DIRECTORY} has less than the {nbytes >> 10} KiB needed")
        try:
            self._mapping.advise(_POPULATE_WRITE, offset, nbytes)
        except OSError as error:
            if error.errno == errno.EINVAL:  # a kernel before 5.14 does not know it
                os.posix_fallocate(self._descriptor, offset, nbytes)
                return
            self._mapping.advise(mmap.MADV_REMOVE, offset, nbytes)
            raise OSError(f"{SHM_DIRECTORY} is full, or this process may not use more memory") from error

    def prefault(self, offset: int, nbytes: int) -> None:
        """Map reserved memory at once, rather than page by page when it is used."""
        with suppress(OSError):  # a kernel before 5.14 does not know it
            self._mapping.advise(_POPULATE_WRITE, offset, nbytes)

    def expose(self) -> bytes:
        """Name the file, so that other processes can open it, and return the name; call it at most once.

        Raises:
            OSError: the system refuses.
        """
        name = secrets.token_bytes(NAME_BYTES)
        # Python follows the link in /proc only where it is given `src_dir_fd`.
        directory = os.open("/proc/self/fd", os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
        try:
            os.link(str(self._descriptor), _path(name), src_dir_fd=directory)
        finally:
            os.close(directory)
        self._name = name
        return name

    def unlink(self) -> None:
        """Remove the file's name, if it has one; a forked child leaves that to its parent."""
        name, self._name = self._name, None
        if name is not None and self._pid == os.getpid():
            unlink_name(name)


def free_bytes() -> int:
    """Return the number of bytes of shared memory that are left.

    Raises:
        OSError: there is no shared memory.
    """
    found = os.statvfs(SHM_DIRECTORY)
    if found.f_blocks == 0:  # a tmpfs of size 0 is bounded by the machine only
        return os.sysconf("SC_AVPHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    return found.f_bavail * found.f_frsize


def unlink_name(name: bytes) -> None:
    """Remove the name of any process's segment, if it is still there."""
    _path(name).unlink(missing_ok=True)


def remove_stale_names() -> None:
    """Remove the names that killed jobs of this user have left."""
    for path in SHM_DIRECTORY.glob(_PREFIX + "[0-9a-f]" * 2 * NAME_BYTES):
        # The name may go meanwhile, or be in use; opening another user's file could block.
        with suppress(OSError):
            if _is_own_segment(path.lstat()):
                _remove_unless_locked(path)


def _remove_unless_locked(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY | os.O_NOFOLLOW | os.O_CLOEXEC)
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        path.unlink()
    finally:
        os.close(descriptor)


def _path(name: bytes) -> Path:
    return SHM_DIRECTORY / f"{_PREFIX}{name.hex()}"


def _is_own_segment(found: os.stat_result) -> bool:
    mine = stat.S_ISREG(found.st_mode) and found.st_uid == os.geteuid()
    return mine and stat.S_IMODE(found.st_mode) == _MODE
