"""Files that are read by ranges: the length of each is known, and it must not change meanwhile."""

from __future__ import annotations

import os
import stat
from collections.abc import Callable
from typing import Any

import numpy as np
from numpy.typing import NDArray

from ferro_checkpoint.errors import CheckpointDamaged, CheckpointError
from ferro_checkpoint.layout.header import MOST_HEADER_BYTES

BUFFER_BYTES = 4 << 20  # of what is read before it is put where it belongs
_MOST_OPEN_FILES = 64


class InputFile:
    """A regular file, open for reading.

    Attributes:
        path: as it was given.
        nbytes: the length it had when it was opened.
    """

    def __init__(self, path: str) -> None:
        self.path = path
        try:
            self._descriptor = os.open(path, os.O_RDONLY | os.O_CLOEXEC | os.O_NONBLOCK)
        except OSError as error:
            raise CheckpointError(f"{path}: {error.strerror}", path=path) from error
        status = os.fstat(self._descriptor)
        if not stat.S_ISREG(status.st_mode):
            self.close()
            raise CheckpointError(f"{path} is no regular file", path=path)
        self.nbytes = status.st_size
        self._changed_at = status.st_mtime_ns

    @property
    def version(self) -> tuple[int, int]:
        """Return length and time of the last change; they differ when the file was changed."""
        return self.nbytes, self._changed_at

    def read_into(self, memory: memoryview, offset: int) -> None:
        """Fill this memory with the file's bytes from `offset` on.

        Raises:
            CheckpointDamaged: the file ends before, or was changed after it had been opened.
        """
        done = 0
        while done < len(memory):
            try:
                count = os.preadv(self._descriptor, [memory[done:]], offset + done)
            except OSError as error:
                raise CheckpointError(f"{self.path}: {error.strerror}", path=self.path) from error
            if count == 0:
                text = f"{self.path} ends at byte {offset + done}, and {len(memory) - done} more belong to it"
                raise CheckpointDamaged(text, path=self.path)
            done += count
        status = os.fstat(self._descriptor)
        if (status.st_size, status.st_mtime_ns) != self.version:
            raise CheckpointDamaged(f"{self.path} was changed while it was being read", path=self.path)

    def read(self, offset: int, nbytes: int) -> bytes:
        """Read a few bytes; see `read_into`."""
        if not 0 <= offset <= offset + nbytes <= self.nbytes:
            text = f"{self.path} has {self.nbytes} bytes, and its bytes {offset} to {offset + nbytes} are asked for"
            raise CheckpointDamaged(text, path=self.path)
        memory = bytearray(nbytes)
        self.read_into(memoryview(memory), offset)
        return bytes(memory)

    def close(self) -> None:
        """Close it; a second call does nothing."""
        if self._descriptor >= 0:
            os.close(self._descriptor)
            self._descriptor = -1


class InputFiles:
    """The files of a directory, each opened when it is first asked for."""

    def __init__(self, directory: str) -> None:
        self.directory = directory
        self._open: dict[str, InputFile] = {}
        self._versions: dict[str, tuple[int, int]] = {}

    def open(self, name: str) -> InputFile:
        """Return a file; what was returned before may be closed by then."""
        if name not in self._open:
            if len(self._open) >= _MOST_OPEN_FILES:  # thousands of files must not use up this process's descriptors
                self.close()
            file = self._open[name] = InputFile(os.path.join(self.directory, name))
            if self._versions.setdefault(name, file.version) != file.version:
                raise CheckpointDamaged(f"{file.path} was changed while it was being read", path=file.path)
        return self._open[name]

    def close(self) -> None:
        """Close all that are open; they open again if they are asked for."""
        while self._open:
            self._open.popitem()[1].close()


def read_whole(path: str, most_bytes: int = MOST_HEADER_BYTES) -> bytes:
    """Read a small file, of at most so many bytes."""
    file = InputFile(path)
    try:
        if file.nbytes > most_bytes:
            text = f"{path} has {file.nbytes} bytes, and a file of its kind at most {most_bytes}"
            raise CheckpointDamaged(text, path=path)
        return file.read(0, file.nbytes)
    finally:
        file.close()


def read_elements(
    file: InputFile, offset: int, target: NDArray[Any], seen: Callable[[memoryview], None] | None = None
) -> None:
    """Read an array's elements, which are in C order in the file, into `target`, which may have any strides.

    Args:
        file: to read from.
        offset: of the first element.
        target: for all of them.
        seen: is called with the bytes as they are read, in the file's order.
    """
    if target.size == 0:
        return
    if target.flags.c_contiguous and (seen is None or target.nbytes <= BUFFER_BYTES):
        memory = target.reshape(-1).view(np.uint8).data
        file.read_into(memory, offset)
        if seen is not None:
            seen(memory)
    elif target.nbytes <= BUFFER_BYTES:
        buffer = np.empty(target.shape, target.dtype)
        read_elements(file, offset, buffer, seen)
        target[...] = buffer
    else:
        row_bytes = target.nbytes // len(target)
        rows = max(1, BUFFER_BYTES // row_bytes)
        for begin in range(0, len(target), rows):
            part = target[begin : begin + rows] if rows > 1 else target[begin]
            read_elements(file, offset + begin * row_bytes, part, seen)
