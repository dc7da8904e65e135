"""A save as the plan makes one, of one rank and without a plan: for the tests of storage."""

from __future__ import annotations

import itertools
import time

from ferro_checkpoint.layout.digest import DIGEST, digest_of
from ferro_checkpoint.layout.header import encode_header
from ferro_checkpoint.layout.record import FileRecord, Record
from ferro_checkpoint.opened.record import read_record
from ferro_checkpoint.opened.verify import verify
from ferro_checkpoint.storage.storage import Storage

FILE = "model.safetensors"
_numbers = itertools.count()


def content_of(step: int, nbytes: int = 10_000) -> bytes:
    """Return a file with a tensor whose bytes differ by the step."""
    return encode_header({"x": ("U8", (nbytes,))}, {}) + bytes([step % 251]) * nbytes


def record_of(step: int | None, content: bytes, time_s: float | None = None) -> Record:
    middle = len(content) - 100
    digests = tuple(digest_of([memoryview(part)]) for part in (content[:middle], content[middle:]))
    return Record(
        step=step,
        bundles={"model": (FILE,)},
        files={FILE: FileRecord(len(content), (middle, len(content)), digests)},
        values={},
        digest=DIGEST,
        saved_by={"time": time.time() if time_s is None else time_s},
    )


def save(
    storage: Storage,
    name: str,
    step: int | None,
    *,
    overwrite: bool = False,
    token: str | None = None,
    time_s: float | None = None,
) -> None:
    """Write a checkpoint of one file, which the step tells apart; discard it where something fails."""
    content = content_of(step or 0)
    directory = storage.new_directory(name, token or f"t{next(_numbers)}")
    try:
        storage.create_directory(directory, overwrite=overwrite)
        assert storage.sees(directory)
        directory.create(FILE, len(content))
        file = directory.open(FILE, len(content))
        try:
            file.write([memoryview(content)[:5000]], 0)
            file.write([memoryview(content)[5000:6000], memoryview(content)[6000:]], 5000)
            file.sync()
        finally:
            file.close()
        directory.write_file("model.safetensors.index.json", b"{}")
        directory.commit(record_of(step, content, time_s).encode(), overwrite=overwrite)
    except BaseException:
        directory.discard()
        raise


def step_of(storage: Storage, name: str) -> int | None:
    """Return the step of a checkpoint, each byte of which is checked."""
    assert [finding.message for finding in verify(storage, name, threads=1)] == []
    return read_record(storage, name).step
