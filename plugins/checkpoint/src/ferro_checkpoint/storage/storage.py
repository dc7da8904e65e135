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
        """Fill these, one after the other, with the file's bytes from `offset` on. Several threads may do so.

        Raises:
            CheckpointDamaged: the file ends before.
        """

    def close(self) -> None: ...  # noqa: D102


class WritableFile(Protocol):
    """A file of a new directory that is open for writing, by one rank or several, each with its own ranges."""

    def write(self, sources: Sequence[Bytes], offset: int) -> None:
        """Write these, one after the other, from `offset` on.

        Where `Storage.writes_ranges` is True, several threads may do so; elsewhere one does, in order.
        """

    def sync(self) -> None:
        """Wait until all that this rank has written is on disk. Where that cannot be: until the store has it."""

    def close(self) -> None: ...  # noqa: D102


class NewDirectory(Protocol):
    """A directory that is being written. Rank 0 makes it, every rank opens it, rank 0 commits or discards it.

    Whatever fails is a CheckpointError that says what to do, with the system's error as its cause. After an error of
    `commit` the directory has not got its name, and an older one of this name is as it was.
    """

    path: str

    def create(self, name: str, nbytes: int) -> None:
        """Create a file of this size, before any rank writes to it. A full disk is found here, if it can be."""

    def open(self, name: str, nbytes: int) -> WritableFile:
        """Open a file that has been created. A file that is closed and was not synced is none."""

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
        found_by: the call that finds a checkpoint in it, for messages.
    """

    path: str
    writes_ranges: bool
    found_by: str

    def names(self) -> list[str]:
        """List the directories in it, but no temporary ones; [] if it is not there."""

    def exists(self, name: str) -> bool:
        """Say whether a directory, or a file, has this name."""

    def files(self, name: str) -> list[str]:
        """List what is in a directory; [] if it is not there."""

    def read_file(self, name: str, file: str, most_bytes: int) -> bytes:
        """Read a small file of a directory as a whole.

        Raises:
            FileNotFoundError: there is none.
            CheckpointDamaged: it has more than `most_bytes`, or is no file.
            CheckpointError: it cannot be read.
        """

    def open_file(self, name: str, file: str) -> ReadableFile:
        """Open a file of a directory for reading. Raises the errors of `read_file`."""

    def new_directory(self, name: str, token: str) -> NewDirectory:
        """Describe a directory that is to get this name. `token` is the same on all ranks, and new.

        Touches no disk; `create_directory` of one rank does.
        """

    def create_directory(self, directory: NewDirectory, *, overwrite: bool = False) -> None:
        """Make it, and in it a file that has the token; one rank calls this.

        What saves have left that were killed is put back or removed, but never what a running one writes.

        Args:
            directory: of `new_directory`.
            overwrite: whether a checkpoint of this name may be replaced, as it will be told to `commit`.

        Raises:
            CheckpointError: it cannot be made there, or the name is taken; nothing was written.
        """

    def sees(self, directory: NewDirectory) -> bool:
        """Say whether this rank sees the directory that another one made: False where the path is another disk's.

        Waits up to two seconds for it, since network file systems show it so late.
        """

    def remove(self, name: str) -> None:
        """Remove a directory so that at no point a part of it looks like a checkpoint: the record first."""
