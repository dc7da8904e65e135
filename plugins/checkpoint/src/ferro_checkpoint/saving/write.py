"""Writing a checkpoint by a plan: a new directory, all segments, and the commit record when every rank has written."""

from __future__ import annotations

import secrets
import time
from collections.abc import Callable, Mapping
from typing import Any

import numpy as np

from ferro import FerroError, ProcessGroup
from ferro_checkpoint.errors import SaveFailed, StateError, save_failed
from ferro_checkpoint.layout.bundle import encode_index, index_name
from ferro_checkpoint.layout.digest import DIGEST, digest_of
from ferro_checkpoint.layout.record import FileRecord, Record
from ferro_checkpoint.opened.place import COMPLEX128 as COMPLEX128_KEY
from ferro_checkpoint.placement.local_array import COMPLEX128
from ferro_checkpoint.plan.deadline import Deadline
from ferro_checkpoint.plan.failures import text_of
from ferro_checkpoint.saving.exchange import write_segments
from ferro_checkpoint.saving.save_plan import SavePlan
from ferro_checkpoint.saving.segment_writer import SegmentWriter
from ferro_checkpoint.saving.snapshot import LiveArrays, SuppliedBytes
from ferro_checkpoint.storage.storage import NewDirectory, Storage

Progress = Callable[[int], None]


def write_checkpoint(
    plan: SavePlan,
    source: SuppliedBytes | None,
    storage: Storage,
    name: str,
    group: ProcessGroup | None,
    *,
    step: int | None = None,
    overwrite: bool = False,
    timeout_s: float = 600.0,
    threads: int = 2,
    progress: Progress | None = None,
    metrics: Mapping[str, float] | None = None,
    if_taken: str = "overwrite=True replaces it, when the new one is whole",
) -> None:
    """Write a checkpoint, or nothing; all ranks of the group call it. It may run on any thread.

    Args:
        plan: of the save.
        source: the bytes that this rank supplies; None for the arrays as they are.
        storage: where.
        name: of the directory.
        group: the ranks, of which no other thread uses it meanwhile; None for this process alone.
        step: the training's step, for the record.
        overwrite: whether a directory of this name is replaced.
        timeout_s: deadline of all collectives together.
        threads: how many write at the same time.
        progress: called with the bytes of each segment that this rank has written, on any thread.
        metrics: of the step, for the record; those of rank 0 count.
        if_taken: what to do where a directory of this name is there, for the message.

    Raises:
        SaveFailed: a rank could not write, or did not answer; on all ranks alike. Nothing is left of it, and earlier
            checkpoints are as they were.
        StateError: a checkpoint of this name is there.
    """
    deadline = Deadline(timeout_s)
    path = f"{storage.path.rstrip('/')}/{name}"
    directory: NewDirectory | None = None
    outcome = "Nothing was saved; earlier checkpoints are as they were."
    try:
        directory = _begin(plan, storage, name, path, group, overwrite, if_taken, deadline)
        digests, failure = _write(plan, source or LiveArrays(plan), directory, group, threads, progress, deadline)
        all_digests = _agree(digests, failure, path, group, deadline, "writing it")
        failure = None
        if plan.rank == 0:
            try:
                _commit(plan, directory, all_digests, step, overwrite, metrics or {})
            except Exception as error:  # noqa: BLE001 - told to all ranks
                failure = error
        if failure is None:
            told = "was" if plan.rank == 0 else "may have been"
            outcome = f"The checkpoint {told} committed before that: {storage.found_by} returns it if it was."
        _agree(None, failure, path, group, deadline, "committing it")
    except BaseException as error:
        if directory is not None and plan.rank == 0:
            directory.discard()
        if isinstance(error, FerroError) and not isinstance(error, SaveFailed | StateError):
            text = f"saving {path} failed: {error} {outcome}"
            raise save_failed(text, error, path=path, rank=plan.rank) from error
        raise


def _begin(
    plan: SavePlan,
    storage: Storage,
    name: str,
    path: str,
    group: ProcessGroup | None,
    overwrite: bool,
    if_taken: str,
    deadline: Deadline,
) -> NewDirectory:
    """Make the directory on rank 0, and check that all ranks see it."""
    token, failure, directory = "", None, None
    if plan.rank == 0:
        token = secrets.token_hex(8)
        try:
            if storage.exists(name) and not overwrite:
                raise StateError(f"{path} is there already: {if_taken}")
            directory = storage.new_directory(name, token)
            storage.create_directory(directory, overwrite=overwrite)
            for file in plan.layout.files:
                directory.create(file.name, file.nbytes)
        except Exception as error:  # noqa: BLE001 - told to all ranks
            failure = error
            if directory is not None:
                directory.discard()
    try:
        told = _agree(token, failure, path, group, deadline, "making its directory")
        if directory is None:
            directory = storage.new_directory(name, told[0])
        failure = None
        try:
            if not storage.sees(directory):
                failure = StateError(
                    f"{path} is another directory here than on rank 0: give a directory that all hosts share"
                )
        except Exception as error:  # noqa: BLE001 - told to all ranks
            failure = error
        _agree(None, failure, path, group, deadline, "making its directory")
    except BaseException:
        if plan.rank == 0 and directory is not None:
            directory.discard()
        raise
    return directory


def _write(
    plan: SavePlan,
    source: SuppliedBytes,
    directory: NewDirectory,
    group: ProcessGroup | None,
    threads: int,
    progress: Progress | None,
    deadline: Deadline,
) -> tuple[dict[int, str], Exception | None]:
    """Write this rank's segments; return their digests, and a failure that others must hear of."""
    writer = SegmentWriter(plan, directory, threads, progress)
    try:
        write_segments(plan, source, writer, group, deadline)
    except BaseException:
        writer.stop()
        raise
    try:
        writer.close()
    except Exception as error:  # noqa: BLE001 - told to all ranks
        return {}, error
    return writer.digests, None


def _agree(
    value: Any, failure: Exception | None, path: str, group: ProcessGroup | None, deadline: Deadline, doing: str
) -> list[Any]:
    """Exchange the ranks' values, or raise the first failure on all of them."""
    if group is None or group.world_size == 1:
        told = [[text_of(failure) if failure else None, isinstance(failure, StateError), value]]
    else:
        message = [text_of(failure) if failure else None, isinstance(failure, StateError), _packed(value)]
        told = group.all_gather_object(message, timeout_s=deadline.left_s())
    for rank, (text, is_usage, _) in enumerate(told):
        if text is None:
            continue
        own = failure if group is None or rank == group.rank else None
        if is_usage:
            raise StateError(text) from own
        where = "" if len(told) == 1 else f" on rank {rank} of {len(told)}"
        raise SaveFailed(
            f"saving {path} failed{where}, {doing}: {text}. Nothing was saved; earlier checkpoints are as they were.",
            path=path,
            rank=rank,
        ) from own
    return [_unpacked(value) for _, _, value in told]


def _packed(value: Any) -> Any:
    """Make two arrays of a dict of digests, which are many."""
    if not isinstance(value, dict):
        return value
    return [np.fromiter(value, np.int64), np.array([int(digest, 16) for digest in value.values()], np.uint64)]


def _unpacked(value: Any) -> Any:
    if not isinstance(value, list):
        return value
    return {number: f"{digest:016x}" for number, digest in zip(value[0].tolist(), value[1].tolist(), strict=True)}


def _commit(
    plan: SavePlan,
    directory: NewDirectory,
    digests: list[dict[int, str]],
    step: int | None,
    overwrite: bool,
    metrics: Mapping[str, float],
) -> None:
    """Write the indices and the commit record, and give the directory its name."""
    layout, segments = plan.layout, plan.segments
    united: dict[int, str] = {}
    for each in digests:
        united |= each
    ends: list[list[int]] = [[] for _ in layout.files]
    found: list[list[str]] = [[] for _ in layout.files]
    for number, (begin, end) in enumerate(zip(segments.begin, segments.end, strict=True)):
        file = layout.file_at(begin)
        ends[file].append(end - layout.bases[file])
        found[file].append(united[number])
    files = {
        file.name: FileRecord(file.nbytes, tuple(file_ends), tuple(file_digests))
        for file, file_ends, file_digests in zip(layout.files, ends, found, strict=True)
    }
    by_name = {file.name: file for file in layout.files}
    for bundle, names in plan.layout.bundles.items():
        if len(names) > 1:
            content = encode_index([by_name[name] for name in names])
            directory.write_file(index_name(bundle), content)
            digest = digest_of([memoryview(content)])
            files[index_name(bundle)] = FileRecord(len(content), (len(content),), (digest,))
    holdings = plan.holdings
    of_pairs = [name for name, dtype in zip(holdings.names, holdings.dtypes, strict=True) if dtype == COMPLEX128]
    record = Record(
        step=step,
        bundles=layout.bundles,
        files=files,
        values=plan.values | ({COMPLEX128_KEY: of_pairs} if of_pairs else {}),
        digest=DIGEST,
        saved_by={"world_size": plan.world_size, "time": round(time.time(), 3)}
        | ({"metrics": dict(metrics)} if metrics else {}),
    )
    directory.commit(record.encode(), overwrite=overwrite)
