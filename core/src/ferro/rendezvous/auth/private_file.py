"""Files that only this user can have written: how they are created, checked and read."""

from __future__ import annotations

import os
import secrets
import stat
from collections.abc import Callable
from pathlib import Path


class NotPrivateError(Exception):
    """Another user owns this file, or can reach it; the callers in this package add the remedy."""


def make_directory(path: Path) -> None:
    """Create a directory for this user alone; NotPrivateError says that others can reach an existing one."""
    path.mkdir(mode=0o700, exist_ok=True)
    found = path.lstat()
    if not stat.S_ISDIR(found.st_mode):
        raise NotPrivateError(f"{path} is not a directory")
    _check(path, found)


def write(path: Path, content: bytes, put: Callable[[Path, Path], None]) -> None:
    """Write a draft for this user alone, then `put` it in place by os.link or os.replace: readers see it whole."""
    draft = path.with_name(f"{path.name}.{secrets.token_hex(8)}")
    flags = os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_NOFOLLOW | os.O_CLOEXEC
    try:
        with open(os.open(draft, flags, 0o600), "wb") as file:
            file.write(content)
        put(draft, path)
    finally:
        draft.unlink(missing_ok=True)


def read(path: Path, limit_bytes: int) -> bytes:
    """Read a small file; NotPrivateError says that it is too long, or no plain file of this user alone."""
    if path.is_symlink():
        raise NotPrivateError(f"{path} is a symbolic link")
    # O_NOFOLLOW: the path may have become a link since; O_NONBLOCK: opening a pipe must not block.
    flags = os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC
    with open(os.open(path, flags), "rb") as file:
        found = os.fstat(file.fileno())
        if not stat.S_ISREG(found.st_mode):
            raise NotPrivateError(f"{path} is not a plain file")
        _check(path, found)
        content = file.read(limit_bytes + 1)
    if len(content) > limit_bytes:
        raise NotPrivateError(f"{path} is longer than {limit_bytes} bytes")
    return content


def _check(path: Path, found: os.stat_result) -> None:
    if found.st_uid != os.getuid():
        raise NotPrivateError(f"{path} belongs to user id {found.st_uid}, not to {os.getuid()}")
    mode = stat.S_IMODE(found.st_mode)
    if mode & 0o077:
        raise NotPrivateError(f"{path} is open to other users (mode {mode:04o})")
