"""Objects that are read by ranges, or written from the first byte to the last."""

from __future__ import annotations

import importlib
from collections.abc import Sequence
from contextlib import suppress
from typing import Any

from ferro_checkpoint.errors import CheckpointDamaged, CheckpointError
from ferro_checkpoint.storage.object_calls import call_store, told
from ferro_checkpoint.storage.storage import Bytes

_READ_BYTES = 16 << 20
_PART_BYTES = 16 << 20
_MOST_PARTS = 9_000  # S3 takes 10,000


class ObjectReadableFile:
    """An object that is read by ranges; each read is a request of its own."""

    def __init__(self, store: Any, key: str, path: str, nbytes: int) -> None:
        """Describe it."""
        self.nbytes = nbytes
        self._store, self._key, self._path = store, key, path

    def read_into(self, destinations: Sequence[Bytes], offset: int) -> None:
        """Fill these, one after the other, with the object's bytes from `offset` on; see `ReadableFile`."""
        total = sum(one.nbytes for one in destinations)
        if offset + total > self.nbytes:
            raise self._ends(self.nbytes)
        waiting = [one for one in destinations if one.nbytes]
        for begin in range(offset, offset + total, _READ_BYTES):
            end = min(begin + _READ_BYTES, offset + total)
            content = memoryview(self._read(begin, end))
            if content.nbytes != end - begin:
                raise self._ends(begin + content.nbytes)
            while content.nbytes:
                count = min(content.nbytes, waiting[0].nbytes)
                waiting[0][:count] = content[:count]
                content, waiting[0] = content[count:], waiting[0][count:]
                if not waiting[0].nbytes:
                    del waiting[0]

    def _read(self, begin: int, end: int) -> bytes:
        def read() -> bytes:
            return bytes(self._store.cat_file(self._key, start=begin, end=end))

        return call_store("read", self._path, read)

    def _ends(self, where: int) -> CheckpointDamaged:
        text = f"{self._path}: the file ends at byte {where}: it was cut off, or has changed while it was read"
        return CheckpointDamaged(text, path=self._path)

    def close(self) -> None:
        """Do nothing: nothing is open."""


class ObjectWritableFile:
    """An object that is being written in order. It is there after `sync`; without it, it is given up."""

    def __init__(self, store: Any, key: str, path: str, nbytes: int) -> None:
        """Begin it."""
        self._store, self._key, self._path, self._nbytes = store, key, path, nbytes
        self._written = 0
        part_bytes = max(_PART_BYTES, -(-nbytes // _MOST_PARTS))
        self._file: Any = call_store("written", path, lambda: store.open(key, "wb", block_size=part_bytes))

    def write(self, sources: Sequence[Bytes], offset: int) -> None:
        """Write these, one after the other, where the last call has ended."""
        if offset != self._written:
            text = f"{self._path}: a store takes bytes in order, the next one is {self._written}, and not {offset}"
            raise CheckpointError(text, path=self._path)
        for source in sources:
            try:
                self._file.write(source)
            except Exception as error:
                raise told("written", self._path, error) from error
            self._written += source.nbytes

    def sync(self) -> None:
        """Wait until the store has all of it; nothing is written afterwards."""
        if self._file is None:
            return
        if self._written != self._nbytes:
            text = f"{self._path}: {self._written} bytes were written, where {self._nbytes} were to be"
            raise CheckpointError(text, path=self._path)
        try:
            self._file.close()
        except Exception as error:
            raise told("written", self._path, error) from error
        self._file = None

    def close(self) -> None:
        """Give the object up, if it was not synced."""
        file, self._file = self._file, None
        if file is None:
            return
        with suppress(Exception):  # each store has errors of its own, and the object is given up anyway
            if isinstance(file, importlib.import_module("fsspec.spec").AbstractBufferedFile):
                file.discard()
                file.closed = True  # its finalizer would upload what there is
            else:
                file.close()
        with suppress(Exception):
            self._store.rm_file(self._key)
