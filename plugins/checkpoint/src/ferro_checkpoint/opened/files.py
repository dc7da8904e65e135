"""The files of a checkpoint that is open for reading: their handles, and whether they have changed since."""

from __future__ import annotations

import contextlib
import threading
from collections.abc import Iterator, Mapping
from typing import Protocol, runtime_checkable

from ferro_checkpoint.errors import CheckpointDamaged, CheckpointError
from ferro_checkpoint.layout.record import FileRecord
from ferro_checkpoint.storage.storage import ReadableFile, Storage

_MOST_HANDLES = 200  # a checkpoint may have more files than a process may have open


@runtime_checkable
class _Identified(Protocol):
    """A file that its storage can tell from any other one, and from itself before it was written to."""

    def identity(self) -> object: ...


class CheckpointFiles:
    """The files of one checkpoint: opened when first used, and compared with the record.

    Several threads may use it. Up to 200 files stay open; each further one is opened anew for every use.
    """

    def __init__(self, storage: Storage, name: str, records: Mapping[str, FileRecord]) -> None:
        self.path = f"{storage.path}/{name}"
        self._storage = storage
        self._name = name
        self._records = records
        self._handles: dict[str, ReadableFile] = {}
        self._identities: dict[str, object] = {}
        self._lock = threading.Lock()

    def path_of(self, file: str) -> str:
        """Return a file's path, for messages."""
        return f"{self.path}/{file}"

    @contextlib.contextmanager
    def opened(self, file: str) -> Iterator[ReadableFile]:
        """Open a file, or take its handle. An OSError of what is done with it becomes a CheckpointError.

        Raises:
            CheckpointDamaged: there is none, it has not the length that the record says, or it is another file than
                the one that was opened first.
            CheckpointError: it cannot be read.
        """
        try:
            with self._lock:
                handle = self._handles.get(file)
                stays = handle is not None or len(self._handles) < _MOST_HANDLES
                if handle is None:
                    handle = self._open(file)
                    if stays:
                        self._handles[file] = handle
            try:
                yield handle
            finally:
                if not stays:
                    handle.close()
        except OSError as error:
            path = self.path_of(file)
            raise CheckpointError(f"{path} cannot be read: {error.strerror or error}", path=path) from error

    def check_unchanged(self) -> None:
        """Check that no file that was opened has been written to since.

        Raises:
            CheckpointDamaged: one has, or is gone.
        """
        with self._lock:
            files = list(self._identities)
        for file in files:
            with self.opened(file) as handle:
                self._check_identity(file, handle)

    def close(self) -> None:
        """Close all files."""
        with self._lock:
            handles = list(self._handles.values())
            self._handles.clear()
        for handle in handles:
            handle.close()

    def _open(self, file: str) -> ReadableFile:
        path = self.path_of(file)
        try:
            handle = self._storage.open_file(self._name, file)
        except FileNotFoundError as error:
            text = f"{path}: the record lists this file, and it is not there: load an older checkpoint"
            raise CheckpointDamaged(text, path=path) from error
        try:
            expected = self._records[file].nbytes
            if handle.nbytes != expected:
                text = f"{path}: the file has {handle.nbytes} bytes, and had {expected}: load an older checkpoint"
                raise CheckpointDamaged(text, path=path)
            self._check_identity(file, handle)
        except BaseException:
            handle.close()
            raise
        return handle

    def _check_identity(self, file: str, handle: ReadableFile) -> None:
        if isinstance(handle, _Identified):
            identity = handle.identity()
            if self._identities.setdefault(file, identity) != identity:
                path = self.path_of(file)
                raise CheckpointDamaged(
                    f"{path}: the file was changed while it was read: see who writes to it, and read it again",
                    path=path,
                )
