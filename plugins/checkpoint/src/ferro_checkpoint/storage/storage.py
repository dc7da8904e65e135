"""Storage: what a place for checkpoints must be able to do.

A directory is written under a temporary name, and gets its own in one step, when everything in it is on disk
(`NewDirectory.commit`). A store that cannot rename writes under the directory's own name; there, and everywhere, the
commit record is the last file written, and a directory without it is no checkpoint.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Protocol

Bytes = memoryview
"""Bytes of memory: contiguous, of format "B"."""


class ReadableFile(Protocol):
    """A file that is open for reading."""

    nbytes: int

    def read_into(self, destinations: Sequence[Bytes], offset: int) -> None:
        """Fill these, one after the other, with the file's bytes from `offset` on.

        Raises:
            CheckpointDamaged: the file ends before.
        """

    def close(self) -> None: ...  # noqa: D102


class WritableFile(Protocol):
    """A file of a new directory that is open for writing, by one rank or several, each with its own ranges."""

    def write(self, sources: Sequence[Bytes], offset: int) -> None:
        """Write these, one after the other, from `offset` on. Where `Storage.writes_ranges` is False: in order."""

    def sync(self) -> None:
        """Wait until all that this rank has written is on disk. Where that cannot be: until the store has it."""

    def close(self) -> None: ...  # noqa: D102


class NewDirectory(Protocol):
    """A directory that is being written. Rank 0 makes it, every rank opens it, rank 0 commits or discards it."""

    path: str

    def create(self, name: str, nbytes: int) -> None:
        """Create a file of this size; rank 0 does so before others write. Raises OSError if the disk is full."""

    def open(self, name: str, nbytes: int) -> WritableFile:
        """Open a file that has been created."""

    def write_file(self, name: str, content: bytes) -> None:
        """Write a small file as a whole, and wait until it is on disk."""

    def commit(self, record: bytes, *, overwrite: bool) -> None:
        """Write the commit record, make the directory durable, and give it its name."""

    def discard(self) -> None:
        """Remove it, as far as that is possible. Does not raise an error."""


class Storage(Protocol):
    """A directory in which checkpoints are directories.

    Attributes:
        path: for messages.
        writes_ranges: whether several ranks may write ranges of one file, in any order.
    """

    path: str
    writes_ranges: bool

    def names(self) -> list[str]:
        """List the directories in it, but no temporary ones; [] if it is not there."""

    def exists(self, name: str) -> bool:
        """Say whether a directory, or a file, has this name."""

    def read_file(self, name: str, file: str, most_bytes: int) -> bytes:
        """Read a small file of a directory as a whole.

        Raises:
            FileNotFoundError: there is none.
            CheckpointDamaged: it has more than `most_bytes`.
        """

    def open_file(self, name: str, file: str) -> ReadableFile:
        """Open a file of a directory for reading."""

    def new_directory(self, name: str, token: str) -> NewDirectory:
        """Describe a directory that is to get this name. `token` is the same on all ranks, and new.

        Touches no disk; `create_directory` of one rank does.
        """

    def create_directory(self, directory: NewDirectory) -> None:
        """Make it, and in it a file that has the token; one rank calls this. Stale ones of other tokens go away."""

    def sees(self, directory: NewDirectory) -> bool:
        """Say whether this rank sees the directory that another one made: False where the path is another disk's."""

    def remove(self, name: str) -> None:
        """Remove a directory so that at no point a part of it looks like a checkpoint: the record first."""
