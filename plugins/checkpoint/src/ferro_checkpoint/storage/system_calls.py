"""Each call that changes the disk, as a function: local storage makes no other, so that tests can make any one fail.

Three of them are not in Python's `os`: they are called in the C library where there are such, and have a substitute.
"""

from __future__ import annotations

import ctypes
import errno
import os
import sys
from collections.abc import Sequence
from functools import cache

_START_WRITING = 2  # SYNC_FILE_RANGE_WRITE
_EXCHANGE = 2  # RENAME_EXCHANGE
_AT_FDCWD = -100
_NOT_THERE = frozenset({errno.ENOSYS, errno.EINVAL, errno.EOPNOTSUPP, errno.EPERM})  # EPERM: of some sandboxes


@cache
def _library() -> ctypes.CDLL | None:
    """Return the C library of a 64-bit Linux, or None."""
    if sys.platform != "linux" or sys.maxsize < 1 << 32:
        return None
    try:
        return ctypes.CDLL(None, use_errno=True)
    except OSError:
        return None


def _call(name: str, types: Sequence[type], *arguments: object) -> int:
    """Call a function of the C library; return its error, ENOSYS where there is no such function, 0 for success."""
    function = getattr(_library(), name, None)
    if function is None:
        return errno.ENOSYS
    function.argtypes = types
    while function(*arguments) != 0:
        error = ctypes.get_errno()
        if error != errno.EINTR:
            return error
    return 0


def make_directory(path: str) -> None:
    """Make a directory whose parent is there."""
    os.mkdir(path)


def create_file(path: str) -> int:
    """Create a file that is not there, also not as a link, and open it for writing."""
    return os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o666)


def reserve(fd: int, nbytes: int) -> None:
    """Give an empty file its size and its place on disk, so that no later write finds the disk full.

    The C library's posix_fallocate would write to every block where the file system cannot reserve; there, this
    function compares with the free space and sets the size alone.
    """
    types = (ctypes.c_int, ctypes.c_int, ctypes.c_int64, ctypes.c_int64)
    error = _call("fallocate", types, fd, 0, 0, nbytes) if nbytes else 0
    if error in _NOT_THERE:
        about = os.fstatvfs(fd)
        if nbytes > about.f_bavail * about.f_frsize:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        os.ftruncate(fd, nbytes)
    elif error:
        raise OSError(error, os.strerror(error))


def write(fd: int, buffers: Sequence[memoryview], offset: int) -> int:
    """Write buffers, at most as many as one call takes; return how many bytes were written."""
    return os.pwritev(fd, buffers, offset)


def start_writing_back(fd: int, offset: int, nbytes: int) -> None:
    """Ask the kernel to begin to write this range to disk, without waiting; an error is told by `sync_data`."""
    types = (ctypes.c_int, ctypes.c_int64, ctypes.c_int64, ctypes.c_uint)
    _call("sync_file_range", types, fd, offset, nbytes, _START_WRITING)


def sync_data(fd: int) -> None:
    """Wait until a file's content and size are on disk."""
    getattr(os, "fdatasync", os.fsync)(fd)


def sync_directory(fd: int) -> None:
    """Wait until a directory's entries are on disk, where the file system can say so."""
    try:
        os.fsync(fd)
    except OSError as error:
        if error.errno not in _NOT_THERE:
            raise


def rename(source: str, destination: str) -> None:
    """Rename a file or directory; a directory takes the place of an empty one."""
    os.rename(source, destination)


def exchange(one: str, other: str) -> bool:
    """Exchange the names of two directories in one step; return False, with nothing done, where that cannot be."""
    types = (ctypes.c_int, ctypes.c_char_p, ctypes.c_int, ctypes.c_char_p, ctypes.c_uint)
    paths = (os.fsencode(one), os.fsencode(other))
    error = _call("renameat2", types, _AT_FDCWD, paths[0], _AT_FDCWD, paths[1], _EXCHANGE)
    if error in _NOT_THERE:
        return False
    if error:
        raise OSError(error, os.strerror(error), one, None, other)
    return True


def remove_file(path: str) -> None:
    """Remove a file, or a link itself."""
    os.unlink(path)


def remove_directory(path: str) -> None:
    """Remove an empty directory."""
    os.rmdir(path)
