"""The files of a checkpoint that is open for reading: their handles, and whether they have changed since."""

from __future__ import annotations

import contextlib
import threading
from collections.abc import Iterator, Mapping
from typing import Protocol, runtime_checkable

from ferro_checkpoint.errors import CheckpointDamaged, CheckpointError
from ferro_checkpoint.layout.record import FileRecord
from ferro_checkpoint.storage.reading import ReadableDirectory
from ferro_checkpoint.storage.storage import ReadableFile

_MOST_HANDLES = 200  # a checkpoint may have more files than a process may have open


class CheckpointReplaced(CheckpointError):
    """Another checkpoint has got the name, or the checkpoint was removed, while it was read. It was not damaged."""


@runtime_checkable
class _Identified(Protocol):
    """A file that its storage can tell from any other one, and from itself before it was written to."""

    def identity(self) -> object: ...


class CheckpointFiles:
    """The files of one checkpoint: opened when first used, and compared with the record.

    Several threads may use it. Up to 200 files stay open; each further one is opened anew for every use.
    """

    def __init__(self, directory: ReadableDirectory, path: str, records: Mapping[str, FileRecord]) -> None:
        """Take over an open directory.

        Args:
            directory: where the record was read.
            path: of the directory, for messages.
            records: what the record says of the files.
        """
        self.path = path
        self._directory = directory
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
            CheckpointReplaced: the checkpoint has been replaced or removed, and therefore there is no such file.
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
        except CheckpointReplaced:
            raise
        except (OSError, CheckpointError) as error:
            self.check_current(error)
            if isinstance(error, CheckpointError):
                raise
            path = self.path_of(file)
            raise CheckpointError(f"{path} cannot be read: {error.strerror or error}", path=path) from error

    def check_current(self, error: BaseException | None = None) -> None:
        """Check that the checkpoint still has its name; called after `error`, if there was one.

        Raises:
            CheckpointReplaced: it has not.
        """
        if not self._directory.is_current():
            text = f"{self.path}: the checkpoint was replaced or removed while it was read: read it again"
            raise CheckpointReplaced(text, path=self.path) from error

    def check_same(self) -> None:
        """Check that all files that were opened until now are of the checkpoint whose record was read.

        Raises:
            CheckpointReplaced: they may be of another one.
        """
        if not self._directory.is_held:
            self.check_current()

    def check_unchanged(self) -> None:
        """Check that no file that was opened has been written to since.

        Raises:
            CheckpointDamaged: one has, or is gone.
            CheckpointReplaced: what was read may be of another checkpoint, or its files have gone.
        """
        self.check_same()
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
        self._directory.close()

    def _open(self, file: str) -> ReadableFile:
        path = self.path_of(file)
        try:
            handle = self._directory.open_file(file)
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
