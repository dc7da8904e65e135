"""Whether a checkpoint is whole: by its record, headers and sizes at little cost, or by each byte of it."""

from __future__ import annotations

from collections.abc import Callable

from ferro_checkpoint.errors import CheckpointDamaged, CheckpointIncomplete
from ferro_checkpoint.layout.bundle import SUFFIX
from ferro_checkpoint.layout.digest import digester
from ferro_checkpoint.layout.header import LENGTH_BYTES, decode_header, header_length
from ferro_checkpoint.layout.record import MOST_RECORD_BYTES, RECORD_NAME, FileRecord, Record
from ferro_checkpoint.storage.storage import ReadableFile, Storage

_BUFFER_BYTES = 4 << 20


def whole_record(storage: Storage, name: str) -> Record:
    """Return a checkpoint's record, if all its files are there, with their lengths and headers: this costs little.

    Raises:
        CheckpointIncomplete: there is no record, or a file is missing.
        CheckpointDamaged: the record, a length or a header is not what was written.
        CheckpointTooNew: a newer version has written it.
    """
    record = read_record(storage, name)
    for file, about in record.files.items():
        _with_file(storage, name, file, about, _check_header if file.endswith(SUFFIX) else _check_nothing)
    return record


def read_record(storage: Storage, name: str) -> Record:
    """Read a checkpoint's record alone. Raises the errors of `whole_record`."""
    path = f"{storage.path}/{name}"
    try:
        text = storage.read_file(name, RECORD_NAME, MOST_RECORD_BYTES)
    except FileNotFoundError as error:
        raise CheckpointIncomplete(
            f"{path} has no {RECORD_NAME}: the save did not end, or this is no checkpoint; load an older one", path=path
        ) from error
    return Record.decode(text, f"{path}/{RECORD_NAME}")


def check_digests(storage: Storage, name: str, record: Record) -> None:
    """Read all of a checkpoint, and compare it with the digests in its record.

    Raises:
        CheckpointDamaged: bytes are not those that were written; the message names the file and where.
    """
    digest_of = digester(record.digest, f"{storage.path}/{name}")
    buffer = memoryview(bytearray(_BUFFER_BYTES))

    def check(opened: ReadableFile, about: FileRecord, path: str) -> None:
        nonlocal buffer
        begin = 0
        for end, digest in zip(about.ends, about.digests, strict=True):
            if end - begin > buffer.nbytes:
                buffer = memoryview(bytearray(end - begin))
            content = buffer[: end - begin]
            opened.read_into([content], begin)
            if digest_of([content]) != digest:
                text = f"{path}: the bytes from {begin} to {end} are not those that were written; load an older one"
                raise CheckpointDamaged(text, path=path)
            begin = end

    for file, about in record.files.items():
        _with_file(storage, name, file, about, check)


def _with_file(
    storage: Storage, name: str, file: str, about: FileRecord, check: Callable[[ReadableFile, FileRecord, str], None]
) -> None:
    """Check a file of a checkpoint for its length, and by a function."""
    path = f"{storage.path}/{name}/{file}"
    try:
        opened = storage.open_file(name, file)
    except FileNotFoundError as error:
        text = f"{path} is missing: it was removed after it was saved; load an older one"
        raise CheckpointIncomplete(text, path=path) from error
    try:
        if opened.nbytes != about.nbytes:
            text = f"{path} has {opened.nbytes} bytes, and was written with {about.nbytes}; load an older one"
            raise CheckpointDamaged(text, path=path)
        check(opened, about, path)
    finally:
        opened.close()


def _check_header(opened: ReadableFile, about: FileRecord, path: str) -> None:
    first = bytearray(min(LENGTH_BYTES, about.nbytes))
    opened.read_into([memoryview(first)], 0)
    header = bytearray(header_length(bytes(first), about.nbytes, path))
    opened.read_into([memoryview(header)], 0)
    decode_header(bytes(header), about.nbytes, path)


def _check_nothing(opened: ReadableFile, about: FileRecord, path: str) -> None:
    """Check nothing more than the length."""
