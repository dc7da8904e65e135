"""Writing plain safetensors files from any source: all of them appear at once, when they are whole and on disk."""

from __future__ import annotations

import contextlib
import os
import secrets
import shutil
from collections.abc import Callable, Iterable

from ferro.errors import UsageError
from ferro_checkpoint.command.new_files import NewFiles
from ferro_checkpoint.errors import SaveFailed
from ferro_checkpoint.layout.bundle import SUFFIX


def is_file(out: str) -> bool:
    """Say whether a path is to be a file, and not a directory of files."""
    return out.endswith(SUFFIX)


def check_out(out: str, *, overwrite: bool) -> None:
    """Check that files can be written there.

    Raises:
        UsageError: something is there that must not be replaced, or there is no directory to write in.
    """
    if not os.path.lexists(out):
        if not os.path.isdir(_parent(out)):
            raise UsageError(f"{out}: its directory is not there")
        return
    if not overwrite:
        raise UsageError(f"{out} is there: choose another path, or give --overwrite")
    if is_file(out) == os.path.isdir(out):
        raise UsageError(f"{out} is {'a' if is_file(out) else 'no'} directory, and is not replaced: remove it first")
    others = [] if is_file(out) else sorted(it for it in os.listdir(out) if SUFFIX not in it)
    if others:
        raise UsageError(f"{out} has {others[0]!r} in it, which --overwrite does not remove: choose another path")


def write_plain(out: str, new: NewFiles, *, overwrite: bool, progress: Callable[[int], None]) -> None:
    """Write a file, if the path ends in .safetensors, or a directory with all files and indexes.

    Raises:
        UsageError: see `check_out`.
        SaveFailed: the file system failed; nothing is left of it.
    """
    check_out(out, overwrite=overwrite)
    temporary = os.path.join(_parent(out), f".tmp-{os.path.basename(out.rstrip('/'))}-{secrets.token_hex(8)}")
    try:
        if is_file(out):
            (file,) = new.files
            _write(temporary, new.content(file), progress)
        else:
            os.mkdir(temporary)
            for file in new.files:
                _write(f"{temporary}/{file.name}", new.content(file), progress)
            for name, content in new.indexes.items():
                _write(f"{temporary}/{name}", [memoryview(content)], progress)
            _sync_directory(temporary)
        _take_name(temporary, out.rstrip("/"))
    except OSError as error:
        raise SaveFailed(f"{out} was not written: {error.strerror or error}", path=out) from error
    finally:
        with contextlib.suppress(FileNotFoundError):
            shutil.rmtree(temporary) if os.path.isdir(temporary) else os.unlink(temporary)


def _write(path: str, content: Iterable[memoryview], progress: Callable[[int], None]) -> None:
    with open(path, "xb", buffering=0) as file:
        for part in content:
            done = 0
            while done < part.nbytes:
                done += file.write(part[done:])
            progress(part.nbytes)
        os.fsync(file.fileno())


def _take_name(temporary: str, out: str) -> None:
    """Rename; what was there before is replaced, and a directory has another name for a moment."""
    aside = None
    if os.path.isdir(out):
        aside = f"{temporary}-replaced"
        os.rename(out, aside)
    try:
        os.rename(temporary, out)
    except OSError:
        if aside is not None:
            os.rename(aside, out)
        raise
    _sync_directory(_parent(out))
    if aside is not None:
        shutil.rmtree(aside, ignore_errors=True)


def _sync_directory(path: str) -> None:
    fd = os.open(path, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
    try:
        os.fsync(fd)
    finally:
        os.close(fd)


def _parent(out: str) -> str:
    return os.path.dirname(out.rstrip("/")) or "."
