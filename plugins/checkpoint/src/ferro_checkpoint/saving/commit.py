"""The commit of a checkpoint: its indexes and its record, written by rank 0 when all ranks have written."""

from __future__ import annotations

import time
from collections.abc import Mapping
from typing import Any

from ferro_checkpoint.layout.bundle import encode_index, index_name
from ferro_checkpoint.layout.digest import DIGEST, digest_of
from ferro_checkpoint.layout.limits import check_record
from ferro_checkpoint.layout.record import FileRecord, Record
from ferro_checkpoint.opened.place import COMPLEX128 as COMPLEX128_KEY
from ferro_checkpoint.placement.local_array import COMPLEX128
from ferro_checkpoint.saving.save_plan import SavePlan
from ferro_checkpoint.storage.storage import NewDirectory


def check_commit(plan: SavePlan, step: int | None, metrics: Mapping[str, float]) -> None:
    """Check, before anything is written, that the record will be one that can be read.

    Raises:
        StateError: it would be too large.
    """
    ends = {file.name: own for file, own in zip(plan.layout.files, _segments(plan)[0], strict=True)}
    check_record(step, _values(plan), plan.layout.bundles, ends, _saved_by(plan, metrics))


def commit(
    plan: SavePlan,
    directory: NewDirectory,
    digests: list[dict[int, str]],
    step: int | None,
    overwrite: bool,
    metrics: Mapping[str, float],
) -> None:
    """Write the indexes and the record, and give the directory its name.

    Args:
        plan: of the save.
        directory: in which all files of tensors are.
        digests: of each rank's segments, by number.
        step, overwrite, metrics: see `write_checkpoint`.
    """
    layout = plan.layout
    united: dict[int, str] = {}
    for each in digests:
        united |= each
    files = {
        file.name: FileRecord(file.nbytes, tuple(ends), tuple(united[number] for number in numbers))
        for file, ends, numbers in zip(layout.files, *_segments(plan), strict=True)
    }
    by_name = {file.name: file for file in layout.files}
    for bundle, names in layout.bundles.items():
        if len(names) > 1:
            content = encode_index([by_name[name] for name in names])
            directory.write_file(index_name(bundle), content)
            files[index_name(bundle)] = FileRecord(len(content), (len(content),), (digest_of([memoryview(content)]),))
    record = Record(
        step=step,
        bundles=layout.bundles,
        files=files,
        values=_values(plan),
        digest=DIGEST,
        saved_by=_saved_by(plan, metrics),
    )
    directory.commit(record.encode(), overwrite=overwrite)


def _segments(plan: SavePlan) -> tuple[list[list[int]], list[list[int]]]:
    """List, for each file, where its segments end and which they are."""
    layout, segments = plan.layout, plan.segments
    ends: list[list[int]] = [[] for _ in layout.files]
    numbers: list[list[int]] = [[] for _ in layout.files]
    for number, (begin, end) in enumerate(zip(segments.begin, segments.end, strict=True)):
        file = layout.file_at(begin)
        ends[file].append(end - layout.bases[file])
        numbers[file].append(number)
    return ends, numbers


def _values(plan: SavePlan) -> dict[str, Any]:
    holdings = plan.holdings
    of_pairs = [name for name, dtype in zip(holdings.names, holdings.dtypes, strict=True) if dtype == COMPLEX128]
    return plan.values | ({COMPLEX128_KEY: of_pairs} if of_pairs else {})


def _saved_by(plan: SavePlan, metrics: Mapping[str, float]) -> dict[str, Any]:
    about = {"world_size": plan.world_size, "time": round(time.time(), 3)}
    return about | ({"metrics": dict(metrics)} if metrics else {})
