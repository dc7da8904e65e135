"""What the operating system's errors are to a user: which path, and what to do about it."""

from __future__ import annotations

import errno
import os
from collections.abc import Iterator
from contextlib import contextmanager

from ferro_checkpoint.errors import CheckpointError

_ADVICE = {
    errno.ENOSPC: "free some space, or save to another disk",
    errno.EDQUOT: "the quota is used up: free some space, or save to another disk",
    errno.EFBIG: "the file system or a limit (ulimit -f) takes no file of this size",
    errno.EACCES: "check who owns the directory, and its mode",
    errno.EPERM: "check who owns the directory, and its mode",
    errno.EROFS: "save to another disk, or mount this one for writing",
    errno.ENOTDIR: "a part of the path is a file: choose another one",
    errno.ENAMETOOLONG: "choose a shorter name",
    errno.ELOOP: "a link leads to itself, or is where a file should be: remove it",
    errno.EIO: "the disk does not work: look at the kernel's log",
    errno.ESTALE: "the file server has lost the directory: mount it anew",
    errno.EMFILE: "raise the limit of open files (ulimit -n)",
    errno.ENOENT: "the directory has been removed by somebody else",
}


def failed(what: str, path: str, error: OSError) -> CheckpointError:
    """Describe an error of the operating system."""
    reason = error.strerror or str(error)
    advice = _ADVICE.get(error.errno or 0)
    return CheckpointError(f"{path} cannot be {what}: {reason}" + (f"; {advice}" if advice else ""), path=path)


@contextmanager
def writing(path: str) -> Iterator[None]:
    """Raise CheckpointError for an OSError in this block, which writes to `path`."""
    try:
        yield
    except OSError as error:
        raise failed("written", path, error) from error


@contextmanager
def reading(path: str) -> Iterator[None]:
    """Raise CheckpointError for an OSError in this block, except for FileNotFoundError with its path."""
    try:
        yield
    except (FileNotFoundError, NotADirectoryError) as error:
        raise FileNotFoundError(errno.ENOENT, os.strerror(errno.ENOENT), path) from error
    except OSError as error:
        raise failed("read", path, error) from error
