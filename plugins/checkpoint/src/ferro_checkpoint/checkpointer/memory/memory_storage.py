"""MemoryStorage: a storage whose files are spread over the memories of the ranks.

Each rank holds what it has written, and a copy of what one other rank has written (see `neighbour`). The commit record
and other small files are on all ranks. Two checkpoints fit: the last whole one, and the one that is being written.
"""

from __future__ import annotations

from collections.abc import Sequence

from ferro_checkpoint.checkpointer.memory.held import HeldCheckpoint
from ferro_checkpoint.errors import CheckpointDamaged
from ferro_checkpoint.layout.record import RECORD_NAME
from ferro_checkpoint.storage.storage import Bytes, NewDirectory, ReadableFile, Storage, WritableFile

PATH = "memory"


class MemoryStorage(Storage):
    """The memory of one rank as a storage: each rank writes its ranges into its own.

    Attributes:
        whole: the last checkpoint that all ranks have agreed to hold.
        other: the one that is being written, or an earlier one.
    """

    writes_ranges = True
    found_by = "Checkpointer.resume()"

    def __init__(self) -> None:
        self.path = PATH
        self.whole = HeldCheckpoint()
        self.other = HeldCheckpoint()

    @property
    def nbytes(self) -> int:
        """How much memory this rank gives."""
        return self.whole.nbytes + self.other.nbytes

    def held(self) -> list[HeldCheckpoint]:
        """List the checkpoints of which this rank holds something and knows the record."""
        return [one for one in (self.whole, self.other) if one.key]

    def agree_on(self, held: HeldCheckpoint) -> None:
        """Note that this one is whole, so that the next save takes the place of the other."""
        if held is self.other:
            self.whole, self.other = self.other, self.whole

    def drop_others(self, held: HeldCheckpoint | None) -> None:
        """Forget all but this one: training goes on from it, or from another place when None."""
        for one in (self.whole, self.other):
            if one is not held:
                one.begin("")
        if held is not None:
            self.agree_on(held)

    def release(self) -> None:
        """Hold nothing."""
        self.whole.release()
        self.other.release()

    def names(self) -> list[str]:
        """See `Storage.names`."""
        return [one.name for one in self.held()]

    def exists(self, name: str) -> bool:
        """See `Storage.exists`; a checkpoint in memory may be replaced by one of the same step."""
        return False

    def files(self, name: str) -> list[str]:
        """See `Storage.files`."""
        return sorted(self._find(name).sizes)

    def read_file(self, name: str, file: str, most_bytes: int) -> bytes:
        """See `Storage.read_file`."""
        content = self._find(name).small.get(file)
        if content is None:
            raise FileNotFoundError(f"{PATH}/{name}/{file}")
        if len(content) > most_bytes:
            path = f"{PATH}/{name}/{file}"
            raise CheckpointDamaged(f"{path} has more than {most_bytes} bytes", path=path)
        return content

    def open_file(self, name: str, file: str) -> ReadableFile:
        """See `Storage.open_file`."""
        return _HeldFile(self._find(name), file)

    def new_directory(self, name: str, token: str) -> NewDirectory:
        """See `Storage.new_directory`."""
        return _MemoryDirectory(self.other, name)

    def create_directory(self, directory: NewDirectory, *, overwrite: bool = False) -> None:
        """See `Storage.create_directory`; each rank's memory is there."""

    def sees(self, directory: NewDirectory) -> bool:
        """See `Storage.sees`."""
        return True

    def remove(self, name: str) -> None:
        """See `Storage.remove`."""
        self._find(name).begin("")

    def _find(self, name: str) -> HeldCheckpoint:
        for one in (self.whole, self.other):
            if one.name == name:
                return one
        raise FileNotFoundError(f"{PATH}/{name}")


class _MemoryDirectory(NewDirectory):
    """A checkpoint that is being written; the first call on a rank forgets what was in its place."""

    def __init__(self, held: HeldCheckpoint, name: str) -> None:
        self.path = f"{PATH}/{name}"
        self._held = held
        held.begin(name)

    def create(self, name: str, nbytes: int) -> None:
        """See `NewDirectory.create`."""
        self._held.set_size(name, nbytes)

    def open(self, name: str, nbytes: int) -> WritableFile:
        """See `NewDirectory.open`."""
        self._held.set_size(name, nbytes)
        return _WrittenFile(self._held, name)

    def write_file(self, name: str, content: bytes) -> None:
        """See `NewDirectory.write_file`."""
        self._held.set_size(name, len(content))
        self._held.small[name] = bytes(content)

    def commit(self, record: bytes, *, overwrite: bool) -> None:
        """See `NewDirectory.commit`; the other ranks get the record with the copies."""
        self.write_file(RECORD_NAME, record)

    def discard(self) -> None:
        """See `NewDirectory.discard`."""
        self._held.begin("")


class _WrittenFile(WritableFile):
    def __init__(self, held: HeldCheckpoint, name: str) -> None:
        self._held = held
        self._name = name

    def write(self, sources: Sequence[Bytes], offset: int) -> None:
        self._held.write(self._name, sources, offset)

    def sync(self) -> None:
        """Memory needs none."""

    def close(self) -> None:
        """Nothing is open."""


class _HeldFile(ReadableFile):
    def __init__(self, held: HeldCheckpoint, name: str) -> None:
        self.nbytes = held.size_of(name)
        self._held = held
        self._name = name

    def read_into(self, destinations: Sequence[Bytes], offset: int) -> None:
        self._held.read_into(self._name, destinations, offset, f"{PATH}/{self._held.name}")

    def close(self) -> None:
        """Nothing is open."""
