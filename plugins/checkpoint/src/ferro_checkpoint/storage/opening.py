"""From a path or an address to the storage that it means."""

from __future__ import annotations

import os
import re

from ferro_checkpoint.errors import StateError
from ferro_checkpoint.layout.record import RECORD_NAME
from ferro_checkpoint.storage.local import LocalStorage
from ferro_checkpoint.storage.names import check_within
from ferro_checkpoint.storage.object_store import ObjectStorage
from ferro_checkpoint.storage.storage import Storage

_ADDRESS = re.compile(r"[A-Za-z][A-Za-z0-9+.-]+(::|://)")


def open_storage(path: str | os.PathLike[str]) -> Storage:
    """Return the storage for a directory of checkpoints: a path, or an address such as "s3://bucket/run".

    Nothing is read; the directory need not be there.

    Raises:
        StateError: the path is none.
        PluginError: the package for this kind of address is not installed.
    """
    text = _text(path)
    if _ADDRESS.match(text):
        return ObjectStorage(text)
    return LocalStorage(text)


def split_path(path: str | os.PathLike[str]) -> tuple[Storage, str]:
    """Return the storage that a checkpoint of this path is in, and its name there.

    Raises:
        StateError: no checkpoint can have this path.
    """
    text = _text(path)
    if _ADDRESS.match(text):
        if "://" not in text:
            raise StateError(f"{text!r} is no address: give one such as 's3://bucket/run/step-5'")
        parent, _, name = text.rstrip("/").rpartition("/")
        if parent.endswith((":", "/")):  # "memory://name": the store's root is the parent
            parent = f"{text[: text.index('://')]}://"
    else:
        text = os.path.join(os.getcwd(), text)
        if text.rstrip("/").endswith(("/.", "/..")):
            text = os.path.realpath(text)
        parent, name = os.path.split(text.rstrip("/"))
    if not name:
        raise StateError(f"{text!r} is the root, and cannot be a checkpoint: choose a directory in it")
    if name == RECORD_NAME:
        raise StateError(f"{text!r} is the commit record of a checkpoint: give its directory, {parent!r}")
    check_within(name)
    return open_storage(parent), name


def _text(path: str | os.PathLike[str]) -> str:
    try:
        text = os.fsdecode(path)
    except TypeError:
        raise StateError(f"{path!r} is no path: give a text or a pathlib.Path") from None
    if not text or "\0" in text:
        raise StateError(f"{text!r} is no path: give one of a directory")
    return text
