"""Reading the record of a checkpoint, and keeping the directory open that had it."""

from __future__ import annotations

from collections.abc import Callable
from typing import TypeVar

import numpy as np

from ferro_checkpoint.errors import CheckpointDamaged, CheckpointError
from ferro_checkpoint.layout.json_text import shown
from ferro_checkpoint.layout.record import MOST_RECORD_BYTES, RECORD_NAME, Record
from ferro_checkpoint.opened.files import CheckpointFiles, CheckpointReplaced
from ferro_checkpoint.opened.no_record import no_record
from ferro_checkpoint.storage.reading import open_directory
from ferro_checkpoint.storage.storage import Storage

MOST_SEGMENT_BYTES = 256 << 20
"""Writers cut segments at 4 MiB; no reader must hold more than this because a record says so."""
_ATTEMPTS = 20

_Read = TypeVar("_Read")


def read_record(storage: Storage, name: str) -> Record:
    """Read and check the record of a checkpoint.

    Raises:
        CheckpointIncomplete, CheckpointDamaged, CheckpointTooNew: see `OpenedCheckpoint.open`.
    """

    def read() -> Record:
        record, files = open_files(storage, name)
        files.close()
        return record

    return again_if_replaced(read)


def again_if_replaced(read: Callable[[], _Read]) -> _Read:
    """Read, and begin again if a save has replaced the checkpoint meanwhile."""
    for _ in range(_ATTEMPTS - 1):
        try:
            return read()
        except CheckpointReplaced:
            continue
    return read()


def open_files(storage: Storage, name: str) -> tuple[Record, CheckpointFiles]:
    """Read and check the record of a checkpoint; return it with its files, none of which is open yet.

    Raises:
        CheckpointReplaced: it was replaced or removed meanwhile.
        CheckpointIncomplete, CheckpointDamaged, CheckpointTooNew: see `OpenedCheckpoint.open`.
    """
    path = f"{storage.path}/{name}"
    try:
        directory = open_directory(storage, name)
    except (FileNotFoundError, NotADirectoryError) as error:
        raise no_record(storage, name) from error
    files = CheckpointFiles(directory, path, {})
    try:
        try:
            text = directory.read_file(RECORD_NAME, MOST_RECORD_BYTES)
        except (FileNotFoundError, NotADirectoryError) as error:
            files.check_current(error)
            raise no_record(storage, name) from error
        except OSError as error:
            raise CheckpointError(
                f"{path}/{RECORD_NAME} cannot be read: {error.strerror or error}", path=path
            ) from error
        record = Record.decode(text, f"{path}/{RECORD_NAME}")
        _check_segments(record, f"{path}/{RECORD_NAME}")
    except BaseException:
        files.close()
        raise
    return record, CheckpointFiles(directory, path, record.files)


def _check_segments(record: Record, path: str) -> None:
    for file, it in record.files.items():
        if it.ends and int(np.diff(it.ends, prepend=0).max()) > MOST_SEGMENT_BYTES:
            text = f"{path}: file {shown(file)} has a segment of more than {MOST_SEGMENT_BYTES} bytes"
            raise CheckpointDamaged(text, path=path)
