"""Checkpoints in an object store, or anything else that fsspec reaches: "memory://…", "s3://…", "gs://…", "file://…"."""

from __future__ import annotations

import importlib
import time

from ferro import PluginError
from ferro_checkpoint.errors import CheckpointDamaged, CheckpointError
from ferro_checkpoint.layout.record import RECORD_NAME, is_file_name
from ferro_checkpoint.storage.names import check_name, check_within
from ferro_checkpoint.storage.object_calls import call_store, remove_objects, told
from ferro_checkpoint.storage.object_directory import ObjectDirectory
from ferro_checkpoint.storage.object_files import ObjectReadableFile
from ferro_checkpoint.storage.reading import read_all
from ferro_checkpoint.storage.saver import TOKEN_NAME
from ferro_checkpoint.storage.storage import NewDirectory, ReadableFile

SEEN_S = 2.0


class ObjectStorage:
    """A directory of checkpoints in an object store. Such a store cannot rename; its promises are these.

    - The commit record is written last, and is one object, which is there as a whole or not at all. A directory without
      it is no checkpoint, is not loaded, and the next save of this name takes its place.
    - Each file is written by one rank, in order; a file of several parts is there only when all of them are (S3-like
      stores; `file://` and others show it growing, and it is used by nobody without the record).
    - "On disk" is what the store says is stored.
    - `overwrite=True` removes the older checkpoint, its record first, when the new one is begun, for both have one
      name: if the save fails, neither is there. Give each step a name of its own to keep the older ones.
    - Removing a checkpoint removes its record first.
    - Of two saves of one name at the same time, the one that began first fails when it is to commit.
    - Directories of killed saves stay until a save has their name, or somebody removes them: another host's save may
      still go on, and a store says nothing of processes.
    """

    writes_ranges = False
    found_by = "latest()"

    def __init__(self, path: str) -> None:
        """Describe it; the store is asked nothing, unless its fsspec implementation does so by itself.

        Raises:
            PluginError: fsspec, or the package for this kind of store, is not installed.
            CheckpointError: the address is none.
        """
        self.path = path.rstrip("/") if not path.endswith("://") else path
        try:
            fsspec = importlib.import_module("fsspec")
        except ImportError as error:
            raise PluginError(
                f"{path} is reached through fsspec, which is not installed: pip install 'ferro-checkpoint[fsspec]'"
            ) from error
        try:
            self._store, root = fsspec.core.url_to_fs(path)
        except ImportError as error:
            raise PluginError(f"{path}: {error} (fsspec needs it for this kind of address)") from error
        except ValueError as error:
            raise CheckpointError(f"{path} is no address that fsspec understands: {error}", path=path) from error
        except Exception as error:  # a file system within a file opens that at once, and has errors of its own
            raise told("opened", path, error) from error
        self._root = str(root).rstrip("/")

    def names(self) -> list[str]:
        """List the directories in it; [] if it is not there."""
        try:
            self._store.invalidate_cache()
            entries = call_store("listed", self.path, lambda: self._store.ls(self._root, detail=True))
        except FileNotFoundError:
            return []
        return sorted(entry["name"].rstrip("/").rsplit("/", 1)[-1] for entry in entries if entry["type"] == "directory")

    def exists(self, name: str) -> bool:
        """Say whether a directory of this name has objects, and more than what a save has begun."""
        files = self.files(name)
        return bool(files) and (RECORD_NAME in files or TOKEN_NAME not in files)

    def read_file(self, name: str, file: str, most_bytes: int) -> bytes:
        """Read a small object as a whole; see `Storage`."""
        return read_all(self.open_file(name, file), f"{self.path}/{name}/{file}", most_bytes)

    def open_file(self, name: str, file: str) -> ReadableFile:
        """Describe an object for reading; see `Storage`."""
        check_within(name)
        path = f"{self.path}/{name}/{file}"
        if file != RECORD_NAME and not is_file_name(file):
            raise CheckpointDamaged(f"{self.path}/{name}: {file!r} is no name of a file in it", path=path)
        key = f"{self._root}/{name}/{file}"
        about = call_store("read", path, lambda: self._store.info(key))
        if about.get("type") != "file":
            raise CheckpointDamaged(f"{path}: this is no file", path=path)
        return ObjectReadableFile(self._store, key, path, int(about["size"]))

    def new_directory(self, name: str, token: str) -> NewDirectory:
        """Describe a directory that is to get this name; see `Storage`."""
        check_name(name, token)
        return ObjectDirectory(self._store, f"{self._root}/{name}", f"{self.path}/{name}", token)

    def create_directory(self, directory: NewDirectory, *, overwrite: bool = False) -> None:
        """Write its token object; what a killed save has left under this name goes away. See `Storage`."""
        if not isinstance(directory, ObjectDirectory):
            raise TypeError(f"{directory.path} is a directory of another kind of storage")
        name = directory.path.rsplit("/", 1)[-1]
        there = self.files(name)
        if RECORD_NAME in there and not overwrite:
            text = f"{directory.path} is there already: choose another path, or replace it with overwrite=True"
            raise CheckpointError(text, path=directory.path)
        if there and RECORD_NAME not in there and TOKEN_NAME not in there:
            text = f"{directory.path} is there, and is no checkpoint: choose another path, or remove it"
            raise CheckpointError(text, path=directory.path)
        if there:
            self.remove(name)
        directory.make()

    def sees(self, directory: NewDirectory) -> bool:
        """Say whether this rank sees the token object of another one; waits up to `SEEN_S` for it."""
        if not isinstance(directory, ObjectDirectory):
            raise TypeError(f"{directory.path} is a directory of another kind of storage")
        give_up, pause_s = time.monotonic() + SEEN_S, 0.01
        while not directory.has_token():
            if time.monotonic() > give_up:
                return False
            time.sleep(pause_s)
            pause_s = min(2 * pause_s, 0.25)
        return True

    def remove(self, name: str) -> None:
        """Remove a directory, the record first."""
        check_name(name)
        remove_objects(self._store, f"{self._root}/{name}", f"{self.path}/{name}", self.files(name))

    def files(self, name: str) -> list[str]:
        """List the objects in a directory; [] if there are none."""
        check_within(name)
        try:
            self._store.invalidate_cache()
            key = f"{self._root}/{name}"
            entries = call_store("listed", f"{self.path}/{name}", lambda: self._store.ls(key, detail=True))
        except FileNotFoundError:
            return []
        return sorted(entry["name"].rstrip("/").rsplit("/", 1)[-1] for entry in entries)
