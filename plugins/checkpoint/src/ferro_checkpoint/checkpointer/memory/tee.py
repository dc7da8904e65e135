"""Tee: a storage that writes to a disk and into the ranks' memories at once, so that the bytes are prepared once."""

from __future__ import annotations

from collections.abc import Sequence

from ferro_checkpoint.storage.storage import Bytes, NewDirectory, ReadableFile, Storage, WritableFile


class TeeStorage(Storage):
    """Writes to two storages; all questions are answered by the first."""

    def __init__(self, first: Storage, second: Storage) -> None:
        self.path = first.path
        self.writes_ranges = first.writes_ranges
        self.found_by = first.found_by
        self._first, self._second = first, second

    def names(self) -> list[str]:
        """See `Storage.names`."""
        return self._first.names()

    def exists(self, name: str) -> bool:
        """See `Storage.exists`."""
        return self._first.exists(name)

    def files(self, name: str) -> list[str]:
        """See `Storage.files`."""
        return self._first.files(name)

    def read_file(self, name: str, file: str, most_bytes: int) -> bytes:
        """See `Storage.read_file`."""
        return self._first.read_file(name, file, most_bytes)

    def open_file(self, name: str, file: str) -> ReadableFile:
        """See `Storage.open_file`."""
        return self._first.open_file(name, file)

    def new_directory(self, name: str, token: str) -> NewDirectory:
        """See `Storage.new_directory`."""
        return _TeeDirectory(self._first.new_directory(name, token), self._second.new_directory(name, token))

    def create_directory(self, directory: NewDirectory, *, overwrite: bool = False) -> None:
        """See `Storage.create_directory`."""
        assert isinstance(directory, _TeeDirectory)
        self._first.create_directory(directory.first, overwrite=overwrite)
        self._second.create_directory(directory.second, overwrite=overwrite)

    def sees(self, directory: NewDirectory) -> bool:
        """See `Storage.sees`."""
        assert isinstance(directory, _TeeDirectory)
        return self._first.sees(directory.first)

    def remove(self, name: str) -> None:
        """See `Storage.remove`."""
        self._first.remove(name)


class _TeeDirectory(NewDirectory):
    def __init__(self, first: NewDirectory, second: NewDirectory) -> None:
        self.path = first.path
        self.first, self.second = first, second

    def create(self, name: str, nbytes: int) -> None:
        self.first.create(name, nbytes)
        self.second.create(name, nbytes)

    def open(self, name: str, nbytes: int) -> WritableFile:
        return _TeeFile(self.first.open(name, nbytes), self.second.open(name, nbytes))

    def write_file(self, name: str, content: bytes) -> None:
        self.first.write_file(name, content)
        self.second.write_file(name, content)

    def commit(self, record: bytes, *, overwrite: bool) -> None:
        self.first.commit(record, overwrite=overwrite)
        self.second.commit(record, overwrite=overwrite)

    def discard(self) -> None:
        self.first.discard()
        self.second.discard()


class _TeeFile(WritableFile):
    def __init__(self, first: WritableFile, second: WritableFile) -> None:
        self._first, self._second = first, second

    def write(self, sources: Sequence[Bytes], offset: int) -> None:
        self._second.write(sources, offset)
        self._first.write(sources, offset)

    def sync(self) -> None:
        self._first.sync()

    def close(self) -> None:
        self._first.close()
        self._second.close()
