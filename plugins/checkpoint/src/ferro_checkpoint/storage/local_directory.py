"""A new directory on a disk: written under a temporary name, and renamed in one step when all of it is on disk."""

from __future__ import annotations

import os
from contextlib import suppress
from pathlib import Path

from ferro_checkpoint.errors import CheckpointError
from ferro_checkpoint.layout.record import RECORD_NAME, is_file_name
from ferro_checkpoint.storage import system_calls
from ferro_checkpoint.storage.failures import failed, writing
from ferro_checkpoint.storage.local_files import LocalWritableFile
from ferro_checkpoint.storage.names import old_name, temporary_name
from ferro_checkpoint.storage.removal import remove_tree
from ferro_checkpoint.storage.saver import MOST_TOKEN_BYTES, TOKEN_NAME, Saver


class LocalDirectory:
    """A directory that is being written."""

    def __init__(self, parent: str, name: str, token: str) -> None:
        """Describe it; nothing is touched."""
        self.parent = parent
        self.name = name
        self.token = token
        self.path = os.path.join(parent, temporary_name(name, token))
        self.final_path = os.path.join(parent, name)
        self._made = False

    def make(self) -> None:
        """Make it, with its token file."""
        with writing(self.path):
            system_calls.make_directory(self.path)
            self._made = True
        self._write(TOKEN_NAME, Saver.this(self.token).encode(), durable=False)

    def has_token(self, path: str) -> bool:
        """Say whether the directory at `path` is the one that this save has made."""
        try:
            with open(os.path.join(path, TOKEN_NAME), "rb") as file:
                saver = Saver.decode(file.read(MOST_TOKEN_BYTES))
        except OSError:
            return False
        return saver is not None and saver.token == self.token

    def create(self, name: str, nbytes: int) -> None:
        """Create a file of this size, with its place on disk; see `NewDirectory`."""
        path = self._file(name)
        with writing(path):
            fd = system_calls.create_file(path)
            try:
                system_calls.reserve(fd, nbytes)
            finally:
                os.close(fd)

    def open(self, name: str, nbytes: int) -> LocalWritableFile:
        """Open a file that has been created; see `NewDirectory`."""
        path = self._file(name)
        with writing(path):
            fd = os.open(path, os.O_WRONLY | os.O_CLOEXEC | os.O_NOFOLLOW)
            found = os.fstat(fd).st_size
        if found != nbytes:
            os.close(fd)
            text = f"{path} has {found} bytes, where {nbytes} were to be: another program has changed it"
            raise CheckpointError(text, path=path)
        return LocalWritableFile(path, fd)

    def write_file(self, name: str, content: bytes) -> None:
        """Write a small file as a whole, and wait until it is on disk."""
        self._file(name)
        self._write(name, content, durable=True)

    def commit(self, record: bytes, *, overwrite: bool) -> None:
        """Write the commit record, make the directory durable, and give it its name; see `NewDirectory`.

        An error means that it has not got its name.
        """
        self._write(RECORD_NAME, record, durable=True)
        sync_directory(self.path)
        replaced = self._take_name(overwrite)
        try:
            sync_directory(self.parent)
        except CheckpointError:
            with suppress(OSError):
                self._give_up_name(replaced)
            raise
        with suppress(OSError):  # it is committed, and the next save removes what is left
            system_calls.remove_file(os.path.join(self.final_path, TOKEN_NAME))
        if replaced:
            with suppress(OSError):
                old = os.path.join(self.parent, old_name(self.name, self.token))
                if replaced != old:
                    system_calls.rename(replaced, old)
                remove_tree(old)

    def discard(self) -> None:
        """Remove it, as far as that is possible; not another one that has got its name meanwhile."""
        with suppress(OSError):
            if self.has_token(self.path) or (self._made and not Path(self.path, RECORD_NAME).exists()):
                remove_tree(self.path)

    def _take_name(self, overwrite: bool) -> str | None:
        """Give the directory its name; return where the one is that had the name before, or None."""
        if not os.path.lexists(self.final_path):
            with writing(self.final_path):
                system_calls.rename(self.path, self.final_path)
            return None
        check_replaceable(self.final_path, overwrite)
        with writing(self.final_path):
            if system_calls.exchange(self.path, self.final_path):
                return self.path
            # A kill between these two leaves the older one under its other name, where `LocalStorage` finds it.
            old = os.path.join(self.parent, old_name(self.name, self.token))
            system_calls.rename(self.final_path, old)
            try:
                system_calls.rename(self.path, self.final_path)
            except OSError:
                system_calls.rename(old, self.final_path)
                raise
            return old

    def _give_up_name(self, replaced: str | None) -> None:
        """Undo `_take_name`."""
        if replaced == self.path:
            system_calls.exchange(self.path, self.final_path)
            return
        system_calls.rename(self.final_path, self.path)
        if replaced:
            system_calls.rename(replaced, self.final_path)

    def _file(self, name: str) -> str:
        """Return the path of a file in it."""
        if not is_file_name(name) or name == TOKEN_NAME:
            raise CheckpointError(f"{name!r} cannot be the name of a checkpoint's file", path=self.path)
        return os.path.join(self.path, name)

    def _write(self, name: str, content: bytes, *, durable: bool) -> None:
        path = os.path.join(self.path, name)
        with writing(path):
            file = LocalWritableFile(path, system_calls.create_file(path))
        with file:
            file.write([memoryview(content)], 0)
            if durable:
                file.sync()


def check_replaceable(path: str, overwrite: bool) -> None:
    """Check that a new checkpoint may take the name of what is there, if anything is.

    Raises:
        CheckpointError: it is there and must stay.
    """
    if not os.path.lexists(path):
        return
    if os.path.islink(path):
        raise CheckpointError(f"{path} is a link: save to the path that it leads to, or remove it", path=path)
    if not os.path.isdir(path):
        raise CheckpointError(f"{path} is a file: choose another path, or remove it", path=path)
    try:
        empty = not os.listdir(path)
    except OSError as error:
        raise failed("read", path, error) from error
    if empty:
        return
    if not overwrite:
        text = f"{path} is there already: choose another path, or replace it with overwrite=True"
        raise CheckpointError(text, path=path)
    if not os.path.lexists(os.path.join(path, RECORD_NAME)):
        text = f"{path} is there, and is no checkpoint that was written to its end: choose another path, or remove it"
        raise CheckpointError(text, path=path)


def sync_directory(path: str) -> None:
    """Wait until a directory's entries are on disk."""
    with writing(path):
        fd = os.open(path, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
        try:
            system_calls.sync_directory(fd)
        finally:
            os.close(fd)
