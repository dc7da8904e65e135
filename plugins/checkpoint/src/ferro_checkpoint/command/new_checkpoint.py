"""Writing a checkpoint from any source, by one process: a few MiB are in memory at a time."""

from __future__ import annotations

import secrets
import time
from collections.abc import Callable, Iterator, Mapping
from typing import Any

from ferro.errors import UsageError
from ferro_checkpoint.command.new_files import NewFiles
from ferro_checkpoint.layout.bundle import TensorFile
from ferro_checkpoint.layout.digest import DIGEST, digest_of
from ferro_checkpoint.layout.record import FileRecord, Record
from ferro_checkpoint.opened.place import COMPLEX128
from ferro_checkpoint.storage.opening import split_path
from ferro_checkpoint.storage.storage import NewDirectory

_SEGMENT_BYTES = 4 << 20


def check_out(out: str, *, overwrite: bool) -> None:
    """Check that a checkpoint may have this path.

    Raises:
        UsageError: something is there.
    """
    storage, name = split_path(out)
    if storage.exists(name) and not overwrite:
        raise UsageError(f"{out} is there: choose another path, or give --overwrite")


def write_checkpoint(
    out: str,
    new: NewFiles,
    values: Mapping[str, Any],
    step: int | None,
    *,
    overwrite: bool,
    progress: Callable[[int], None],
) -> None:
    """Write a checkpoint, which appears when it is whole and on disk.

    Args:
        out: its path.
        new: its files.
        values: for the record, as JSON.
        step: of the training, or None.
        overwrite: whether what has this path is replaced.
        progress: is told of bytes that were written.

    Raises:
        CheckpointError: the storage failed; nothing is left of it.
    """
    check_out(out, overwrite=overwrite)
    storage, name = split_path(out)
    directory = storage.new_directory(name, secrets.token_hex(8))
    storage.create_directory(directory, overwrite=overwrite)
    try:
        files = {file.name: _write(directory, file, new, progress) for file in new.files}
        for index, content in new.indexes.items():
            directory.write_file(index, content)
            files[index] = FileRecord(len(content), (len(content),), (digest_of([memoryview(content)]),))
        record = Record(
            step=step,
            bundles=new.bundles,
            files=files,
            values=dict(values) | _complex_names(new),
            digest=DIGEST,
            saved_by={"world_size": 1, "time": round(time.time(), 3), "converted_from": new.source.path},
        )
        directory.commit(record.encode(), overwrite=overwrite)
    except BaseException:
        directory.discard()
        raise


def _complex_names(new: NewFiles) -> dict[str, list[str]]:
    names = [
        f"{bundle}.{name}"
        for bundle, files in new.bundles.items()
        for file in new.files
        if file.name in files
        for name in file.tensors
        if new.source.tensors[new.names[file.name][name]].dtype == "complex128"
    ]
    return {COMPLEX128: names} if names else {}


def _write(directory: NewDirectory, file: TensorFile, new: NewFiles, progress: Callable[[int], None]) -> FileRecord:
    directory.create(file.name, file.nbytes)
    ends: list[int] = []
    digests: list[str] = []
    opened = directory.open(file.name, file.nbytes)
    try:
        begin = 0
        for segment in _segments(new.content(file)):
            digests.append(digest_of([segment]))
            opened.write([segment], begin)
            begin += segment.nbytes
            ends.append(begin)
            progress(segment.nbytes)
        opened.sync()
    finally:
        opened.close()
    return FileRecord(file.nbytes, tuple(ends), tuple(digests))


def _segments(content: Iterator[memoryview]) -> Iterator[memoryview]:
    """Cut a file's bytes into segments of one size; each is of use until the next one is made."""
    segment = memoryview(bytearray(_SEGMENT_BYTES))
    filled = 0
    for part in content:
        done = 0
        while done < part.nbytes:
            length = min(part.nbytes - done, _SEGMENT_BYTES - filled)
            segment[filled : filled + length] = part[done : done + length]
            done, filled = done + length, filled + length
            if filled == _SEGMENT_BYTES:
                yield segment
                filled = 0
    if filled:
        yield segment[:filled]
