"""Checking all digests of a checkpoint: each damaged range is found, and named with the tensors in it."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from typing import TypeAlias

import numpy as np

from ferro_checkpoint.errors import CheckpointError
from ferro_checkpoint.layout.digest import Digester, digester
from ferro_checkpoint.layout.record import FileRecord
from ferro_checkpoint.opened.checkpoint import OpenedCheckpoint
from ferro_checkpoint.opened.damage import HeaderNames, damage_text
from ferro_checkpoint.opened.files import CheckpointFiles, CheckpointReplaced
from ferro_checkpoint.opened.record import again_if_replaced, open_files
from ferro_checkpoint.storage.storage import Storage

_BATCH_BYTES = 4 << 20  # segments are checked so many bytes at a time, and at least one
_MOST_WAITING = 4  # batches for each thread

_Damage: TypeAlias = tuple[int, int, str]
"""A range of a file, and the error if it could not be read."""


@dataclass(frozen=True, slots=True)
class Finding:
    """Something that is wrong with a checkpoint.

    Attributes:
        file: its name.
        begin: the first damaged byte; None where the file as a whole is missing or of another length.
        end: one more than the last.
        tensors: the full names of those that have bytes there, as far as the file's header can be read.
        message: for a reader.
    """

    file: str
    begin: int | None
    end: int | None
    tensors: tuple[str, ...]
    message: str


def verify(
    storage: Storage, name: str, *, threads: int = 2, progress: Callable[[int], None] | None = None
) -> Iterator[Finding]:
    """Check every byte of a checkpoint, with some threads; yield each thing that is wrong.

    Args:
        storage: where it is.
        name: its directory.
        threads: each needs some 4 MiB of memory.
        progress: is called with the bytes that have been checked since its last call.

    Raises:
        CheckpointIncomplete, CheckpointDamaged, CheckpointTooNew: the record cannot be read.
        CheckpointReplaced: it was replaced or removed meanwhile, and some files cannot be checked any more.
    """
    record, files = again_if_replaced(lambda: open_files(storage, name))
    headers = HeaderNames(files, record)
    found = False
    try:
        digest = digester(record.digest, files.path)
        with ThreadPoolExecutor(threads) as pool:
            for file, its in record.files.items():
                try:
                    with files.opened(file):
                        pass
                except CheckpointReplaced:
                    raise
                except CheckpointError as error:
                    found = True
                    yield Finding(file, None, None, (), str(error))
                    continue
                for begin, end, unread in _damaged_ranges(files, file, its, digest, pool, threads, progress):
                    found = True
                    names = tuple(headers.within(file, begin, end))
                    text = unread or damage_text(files.path_of(file), begin, end, names)
                    yield Finding(file, begin, end, names, text)
        if not found:
            files.check_unchanged()
            # All bytes are those that were written; that they fit each other is for the reader of the headers to say.
            try:
                OpenedCheckpoint.of_files(record, files)
            except CheckpointReplaced:
                raise
            except CheckpointError as error:
                yield Finding(error.path.rpartition("/")[2], None, None, (), str(error))
    finally:
        files.close()


def _damaged_ranges(
    files: CheckpointFiles,
    file: str,
    its: FileRecord,
    digest: Digester,
    pool: ThreadPoolExecutor,
    threads: int,
    progress: Callable[[int], None] | None,
) -> Iterator[_Damage]:
    waiting: deque[tuple[int, Future[list[_Damage]]]] = deque()
    batches = _batches(its)
    try:
        while True:
            while len(waiting) < _MOST_WAITING * threads and (batch := next(batches, None)) is not None:
                nbytes = its.ends[batch[-1]] - (its.ends[batch[0] - 1] if batch[0] else 0)
                waiting.append((nbytes, pool.submit(_check, files, file, its, digest, batch)))
            if not waiting:
                return
            nbytes, future = waiting.popleft()
            yield from future.result()
            if progress is not None:
                progress(nbytes)
    finally:
        for _, future in waiting:
            future.cancel()


def _batches(its: FileRecord) -> Iterator[range]:
    """Group a file's segments."""
    first = begin = 0
    for k, end in enumerate(its.ends):
        if end - begin >= _BATCH_BYTES:
            yield range(first, k + 1)
            first, begin = k + 1, end
    if first < len(its.ends):
        yield range(first, len(its.ends))


def _check(files: CheckpointFiles, file: str, its: FileRecord, digest: Digester, batch: range) -> list[_Damage]:
    """Return the ranges of these segments whose digests are wrong, or that cannot be read."""
    begin = its.ends[batch[0] - 1] if batch[0] else 0
    content = np.empty(its.ends[batch[-1]] - begin, np.uint8).data
    try:
        with files.opened(file) as handle:
            handle.read_into([content], begin)
    except CheckpointReplaced:
        raise
    except CheckpointError as error:
        return [(begin, its.ends[batch[-1]], str(error))]
    damaged, first = [], begin
    for k in batch:
        if digest([content[first - begin : its.ends[k] - begin]]) != its.digests[k]:
            damaged.append((first, its.ends[k], ""))
        first = its.ends[k]
    return damaged
