"""A directory that is open for reading: all that is read is of one checkpoint, also while another takes its name.

On a disk the directory itself is held open, whatever its name is by then. A store has nothing to hold: there the
commit record is read again, and tells whether it is still the same checkpoint.
"""

from __future__ import annotations

import errno
import os
from contextlib import suppress
from typing import Protocol, runtime_checkable

from ferro_checkpoint.errors import CheckpointDamaged
from ferro_checkpoint.layout.record import MOST_RECORD_BYTES, RECORD_NAME
from ferro_checkpoint.storage.failures import reading
from ferro_checkpoint.storage.local_files import LocalReadableFile
from ferro_checkpoint.storage.storage import ReadableFile, Storage

_SEARCHABLE = getattr(os, "O_PATH", os.O_RDONLY) | os.O_DIRECTORY | os.O_CLOEXEC


class ReadableDirectory(Protocol):
    """A directory of a storage.

    Attributes:
        is_held: whether files that are opened later are of the same checkpoint in any case.
    """

    is_held: bool

    def read_file(self, file: str, most_bytes: int) -> bytes:
        """Read a small file as a whole; see `Storage.read_file`."""

    def open_file(self, file: str) -> ReadableFile:
        """Open a file; see `Storage.open_file`."""

    def is_current(self) -> bool:
        """Say whether it still has its name, and the commit record that was read.

        Raises:
            CheckpointError: the record cannot be read again.
        """

    def close(self) -> None: ...  # noqa: D102


@runtime_checkable
class HoldsDirectories(Protocol):
    """A storage that can hold a directory open."""

    def open_directory(self, name: str) -> ReadableDirectory:
        """Open a directory for reading.

        Raises:
            FileNotFoundError: there is none.
        """


def open_directory(storage: Storage, name: str) -> ReadableDirectory:
    """Open a directory of any storage for reading.

    Raises:
        FileNotFoundError: there is none; some storages say so when a file of it is opened.
        CheckpointError: it cannot be read.
    """
    return storage.open_directory(name) if isinstance(storage, HoldsDirectories) else _NamedDirectory(storage, name)


class LocalReadableDirectory:
    """A directory on a disk, held open."""

    is_held = True

    def __init__(self, path: str) -> None:
        """Open it."""
        self.path = path
        self._had_record = False
        with reading(path):
            self._fd = os.open(path, _SEARCHABLE)

    def read_file(self, file: str, most_bytes: int) -> bytes:
        """See `ReadableDirectory`."""
        with LocalReadableFile(os.path.join(self.path, file), self._fd) as opened:
            content = read_all(opened, opened.path, most_bytes)
        self._had_record |= file == RECORD_NAME
        return content

    def open_file(self, file: str) -> ReadableFile:
        """See `ReadableDirectory`."""
        return LocalReadableFile(os.path.join(self.path, file), self._fd)

    def is_current(self) -> bool:
        """See `ReadableDirectory`; a directory is removed record first."""
        try:
            own, named = os.fstat(self._fd), os.stat(self.path)
            if self._had_record:
                os.stat(RECORD_NAME, dir_fd=self._fd)
        except OSError as error:
            return error.errno not in (errno.ENOENT, errno.ENOTDIR, errno.ESTALE)
        return os.path.samestat(own, named)

    def close(self) -> None:
        """Close it; files that are open stay so."""
        fd, self._fd = self._fd, -1
        if fd >= 0:
            os.close(fd)


class _NamedDirectory:
    """A directory of which each file is opened by its name."""

    is_held = False

    def __init__(self, storage: Storage, name: str) -> None:
        self._storage = storage
        self._name = name
        self._record: bytes | None = None

    def read_file(self, file: str, most_bytes: int) -> bytes:
        content = self._storage.read_file(self._name, file, most_bytes)
        if file == RECORD_NAME:
            self._record = content
        return content

    def open_file(self, file: str) -> ReadableFile:
        return self._storage.open_file(self._name, file)

    def is_current(self) -> bool:
        with suppress(FileNotFoundError, NotADirectoryError):
            return self._storage.read_file(self._name, RECORD_NAME, MOST_RECORD_BYTES) == self._record
        return self._record is None

    def close(self) -> None:
        """Nothing is open."""


def read_all(opened: ReadableFile, path: str, most_bytes: int) -> bytes:
    """Read a small file as a whole.

    Raises:
        CheckpointDamaged: it has more than `most_bytes`.
    """
    if opened.nbytes > most_bytes:
        text = f"{path} has {opened.nbytes} bytes, and cannot have more than {most_bytes}"
        raise CheckpointDamaged(text, path=path)
    content = bytearray(opened.nbytes)
    opened.read_into([memoryview(content)], 0)
    return bytes(content)
