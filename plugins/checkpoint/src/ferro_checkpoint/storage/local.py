"""Checkpoints on a local or shared file system."""

from __future__ import annotations

import errno
import os
import time
from contextlib import suppress

from ferro_checkpoint.errors import CheckpointDamaged, CheckpointError
from ferro_checkpoint.layout.record import RECORD_NAME
from ferro_checkpoint.storage import system_calls
from ferro_checkpoint.storage.failures import failed, writing
from ferro_checkpoint.storage.leftovers import find_old, settle_leftovers
from ferro_checkpoint.storage.local_directory import LocalDirectory, check_replaceable, sync_directory
from ferro_checkpoint.storage.local_files import LocalReadableFile
from ferro_checkpoint.storage.names import check_name, check_within, is_temporary, old_name, split_old
from ferro_checkpoint.storage.reading import LocalReadableDirectory, ReadableDirectory, read_all
from ferro_checkpoint.storage.removal import remove_tree
from ferro_checkpoint.storage.saver import TOKEN_NAME
from ferro_checkpoint.storage.storage import NewDirectory, ReadableFile

SEEN_S = 2.0  # a network file system shows another host's new directory so late
_ATTEMPTS = 3
_REMOVED = "removed"  # takes the place of a token


class LocalStorage:
    """A directory of checkpoints on a disk.

    A checkpoint that is to be replaced is there until the new one has its name: the two exchange their names in one
    step where the file system can do so (Linux, all common local ones). Elsewhere the older one is `.old-NAME-TOKEN`
    for a moment; if the save is killed just then, readers find the older one under that name, as if it was `NAME`, and
    the next save gives it its name again. Readers never change anything.
    """

    writes_ranges = True
    found_by = "latest()"

    def __init__(self, path: str) -> None:
        """Describe it; the directory need not be there."""
        self.path = os.path.join(os.getcwd(), path)  # a later chdir has no effect

    def names(self) -> list[str]:
        """List the directories in it, but no temporary ones and no links; [] if it is not there."""
        try:
            with os.scandir(self.path) as entries:
                found = {entry.name for entry in entries if entry.is_dir(follow_symlinks=False)}
        except FileNotFoundError:
            return []
        except OSError as error:
            raise failed("listed", self.path, error) from error
        taken_away = {split[0] for name in found if (split := split_old(name))}
        found |= {name for name in taken_away - found if find_old(self.path, name)}
        return sorted(name for name in found if not is_temporary(name))

    def exists(self, name: str) -> bool:
        """Say whether a directory, or a file, has this name."""
        check_within(name)
        return os.path.lexists(os.path.join(self.path, name)) or find_old(self.path, name) is not None

    def files(self, name: str) -> list[str]:
        """List what is in a directory; [] if it is not there."""
        check_within(name)
        path = os.path.join(self.path, self._directory(name))
        try:
            return sorted(os.listdir(path))
        except (FileNotFoundError, NotADirectoryError):
            return []
        except OSError as error:
            raise failed("listed", path, error) from error

    def read_file(self, name: str, file: str, most_bytes: int) -> bytes:
        """Read a small file of a directory as a whole; see `Storage`."""
        with LocalReadableFile(self._file(name, file)) as opened:
            return read_all(opened, opened.path, most_bytes)

    def open_file(self, name: str, file: str) -> ReadableFile:
        """Open a file of a directory for reading; see `Storage`."""
        return LocalReadableFile(self._file(name, file))

    def open_directory(self, name: str) -> ReadableDirectory:
        """Open a directory for reading; see `HoldsDirectories`."""
        check_within(name)
        for _ in range(_ATTEMPTS):
            with suppress(FileNotFoundError):  # between two of the system calls of a save
                return LocalReadableDirectory(os.path.join(self.path, self._directory(name)))
        raise FileNotFoundError(errno.ENOENT, os.strerror(errno.ENOENT), os.path.join(self.path, name))

    def new_directory(self, name: str, token: str) -> NewDirectory:
        """Describe a directory that is to get this name; see `Storage`."""
        check_name(name, token)
        return LocalDirectory(self.path, name, token)

    def create_directory(self, directory: NewDirectory, *, overwrite: bool = False) -> None:
        """Make it, with its token file, and settle what saves that were killed have left; see `Storage`."""
        own = _own(directory)
        self._make_parents()
        check_replaceable(own.final_path, overwrite)
        own.make()
        with suppress(OSError):
            settle_leftovers(self.path, os.stat(os.path.join(own.path, TOKEN_NAME)).st_mtime)

    def sees(self, directory: NewDirectory) -> bool:
        """Say whether this rank sees the directory that another one made; waits up to `SEEN_S` for it."""
        own = _own(directory)
        give_up, pause_s = time.monotonic() + SEEN_S, 0.01
        while not own.has_token(own.path):
            if time.monotonic() > give_up:
                return False
            time.sleep(pause_s)
            pause_s = min(2 * pause_s, 0.25)
            with suppress(OSError):
                os.listdir(self.path)  # makes a network file system look again
        return True

    def remove(self, name: str) -> None:
        """Remove a directory: it loses its name, then its record, and then its files.

        After a kill at any point it is either whole, or nothing has its name and the next save removes the rest.
        """
        check_name(name)
        found = self._directory(name)
        path = os.path.join(self.path, found)
        if os.path.islink(path):
            raise CheckpointError(f"{path} is a link, and is not removed: remove the directory it leads to", path=path)
        with writing(path):
            if found == name:
                old = os.path.join(self.path, old_name(name, _REMOVED))
                remove_tree(old)  # of a removal that was killed
                with suppress(OSError):  # somebody else removes it as well, or a part of one is in the way
                    system_calls.rename(path, old)
                    path = old
            with suppress(FileNotFoundError):
                system_calls.remove_file(os.path.join(path, RECORD_NAME))
            sync_directory(path)
            remove_tree(path)

    def _directory(self, name: str) -> str:
        """Return the directory's present name."""
        if os.path.lexists(os.path.join(self.path, name)):
            return name
        return find_old(self.path, name) or name

    def _file(self, name: str, file: str) -> str:
        check_within(name)
        if file in ("", ".", "..") or "/" in file or "\0" in file:
            path = os.path.join(self.path, name)
            raise CheckpointDamaged(f"{path}: {file!r} is no name of a file in it", path=path)
        return os.path.join(self.path, self._directory(name), file)

    def _make_parents(self) -> None:
        """Make the directory of checkpoints, and those that it is in."""
        missing = []
        path = self.path.rstrip("/") or "/"
        while not os.path.isdir(path):
            if os.path.lexists(path):
                what = "a link that leads nowhere" if os.path.islink(path) else "a file"
                text = f"{path} is {what}, and is to be a directory: choose another path, or remove it"
                raise CheckpointError(text, path=path)
            missing.append(path)
            path = os.path.dirname(path)
        for path in reversed(missing):
            try:
                system_calls.make_directory(path)
            except FileExistsError:
                continue  # made by another process meanwhile
            except OSError as error:
                raise failed("made", path, error) from error
            if os.access(os.path.dirname(path), os.R_OK):  # what cannot be read cannot be opened to be synced
                sync_directory(os.path.dirname(path))


def _own(directory: NewDirectory) -> LocalDirectory:
    if not isinstance(directory, LocalDirectory):
        raise TypeError(f"{directory.path} is a directory of another kind of storage")
    return directory
