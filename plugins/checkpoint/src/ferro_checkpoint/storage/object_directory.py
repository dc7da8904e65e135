"""A new directory in an object store: written under its own name, and a checkpoint when its record is there."""

from __future__ import annotations

from contextlib import suppress
from typing import Any

from ferro_checkpoint.errors import CheckpointError
from ferro_checkpoint.layout.record import RECORD_NAME, is_file_name
from ferro_checkpoint.storage.object_calls import call_store, remove_objects
from ferro_checkpoint.storage.object_files import ObjectWritableFile
from ferro_checkpoint.storage.saver import TOKEN_NAME, Saver

_BUCKETS = frozenset({"s3", "s3a", "gs", "gcs", "az", "abfs", "abfss", "oss", "oci", "r2"})
"""Stores without directories; there, "making" one would make a bucket, which is not what a mistyped path asks for."""


class ObjectDirectory:
    """A directory that is being written."""

    def __init__(self, store: Any, key: str, path: str, token: str) -> None:
        """Describe it."""
        self.path = path
        self._store, self._key, self._token = store, key, token

    def make(self) -> None:
        """Write the token object."""
        protocols = self._store.protocol
        if not _BUCKETS & set([protocols] if isinstance(protocols, str) else protocols):
            call_store("made", self.path, lambda: self._store.makedirs(self._key, exist_ok=True))
        self._put(TOKEN_NAME, Saver.this(self._token).encode())

    def has_token(self) -> bool:
        """Say whether the directory is the one that this save has begun."""
        try:
            self._store.invalidate_cache()
            text = call_store("read", self.path, lambda: bytes(self._store.cat_file(f"{self._key}/{TOKEN_NAME}")))
        except FileNotFoundError:
            return False
        saver = Saver.decode(text)
        return saver is not None and saver.token == self._token

    def create(self, name: str, nbytes: int) -> None:
        """Check the name: an object is there when its last byte is."""
        self._check(name)

    def open(self, name: str, nbytes: int) -> ObjectWritableFile:
        """Begin an object of this size; one rank writes all of it."""
        self._check(name)
        return ObjectWritableFile(self._store, f"{self._key}/{name}", f"{self.path}/{name}", nbytes)

    def write_file(self, name: str, content: bytes) -> None:
        """Write a small object as a whole."""
        self._check(name)
        self._put(name, content)

    def commit(self, record: bytes, *, overwrite: bool) -> None:
        """Write the commit record; see `NewDirectory`."""
        if not self.has_token():
            text = f"{self.path}: another save has begun to write there meanwhile: let one at a time write a checkpoint"
            raise CheckpointError(text, path=self.path)
        self._put(RECORD_NAME, record)
        with suppress(Exception):  # it is committed; the token object does no harm
            self._store.rm_file(f"{self._key}/{TOKEN_NAME}")

    def discard(self) -> None:
        """Remove what was written, as far as that is possible; not what another save has written there."""
        with suppress(Exception):  # each store has errors of its own
            if self.has_token():
                self._store.invalidate_cache()
                entries = self._store.ls(self._key, detail=False)
                remove_objects(
                    self._store, self._key, self.path, [one.rstrip("/").rsplit("/", 1)[-1] for one in entries]
                )

    def _put(self, name: str, content: bytes) -> None:
        call_store("written", f"{self.path}/{name}", lambda: self._store.pipe_file(f"{self._key}/{name}", content))

    def _check(self, name: str) -> None:
        if not is_file_name(name) or name == TOKEN_NAME:
            raise CheckpointError(f"{name!r} cannot be the name of a checkpoint's file", path=self.path)
