"""The newest checkpoint that is whole, the same on all ranks."""

from __future__ import annotations

import math
import os
import warnings
from collections.abc import Callable
from functools import partial
from typing import Any, TypeAlias

from ferro import ProcessGroup
from ferro_checkpoint.errors import CheckpointError, CheckpointIncomplete
from ferro_checkpoint.layout.bundle import SUFFIX
from ferro_checkpoint.opened.checkpoint import OpenedCheckpoint
from ferro_checkpoint.opened.record import read_record
from ferro_checkpoint.opened.verify import verify
from ferro_checkpoint.storage.opening import open_storage
from ferro_checkpoint.storage.saver import TOKEN_NAME
from ferro_checkpoint.storage.storage import Storage

_MOST_CANDIDATES = 1000  # of the newest ones that ranks tell each other
_MOST_TEXT = 2000  # characters of an error
_MOST_STEP = (1 << 63) - 1

_Candidate: TypeAlias = "tuple[int, float, str]"
"""Step, time of the commit, name: the greatest is the newest."""


def latest(
    directory: str | os.PathLike[str], group: ProcessGroup | None = None, *, deep: bool = False, timeout_s: float = 60.0
) -> str | None:
    """Return the path of the newest checkpoint in a directory that is whole, or None.

    The newest is that of the greatest step; of equal ones, or without a step, the one committed last. A checkpoint
    that is not whole is passed over with a warning that says why. All ranks of the group call this and get the same:
    the newest that every rank sees and finds whole.

    Args:
        directory: with checkpoints in it; it need not be there.
        group: of the ranks that call this.
        deep: whether each byte is read and compared with its digest, and not only the record, the headers and the
            files' lengths.
        timeout_s: for each of the ranks' exchanges, in which the slowest rank's check counts.

    Raises:
        CheckpointError: a rank cannot read the directory; raised on all ranks.
    """
    storage = open_storage(directory)
    seen = [{tuple(one) for one in of_rank} for of_rank in _on_all(group, timeout_s, partial(_candidates, storage))]
    for _, _, name in sorted(seen[0].intersection(*seen[1:]), reverse=True):
        faults = _on_all(group, timeout_s, partial(_fault, storage, name, deep))
        fault = next(((rank, one) for rank, one in enumerate(faults) if one), None)
        if fault is None:
            return f"{storage.path.rstrip('/')}/{name}"
        where = f" (rank {fault[0]})" if group is not None and group.world_size > 1 else ""
        warnings.warn(f"passing over a checkpoint that is not whole{where}: {fault[1]}", stacklevel=2)
    return None


def _candidates(storage: Storage) -> list[_Candidate]:
    """List the checkpoints with a record that can be read; warn of those whose cannot."""
    found = []
    for name in storage.names():
        if not _is_text(name):
            continue
        try:
            record = read_record(storage, name)
        except CheckpointIncomplete as error:
            if any(file == TOKEN_NAME or file.endswith(SUFFIX) for file in storage.files(name)):
                _warn(str(error))
        except CheckpointError as error:
            _warn(str(error))
        else:
            step = -1 if record.step is None else min(record.step, _MOST_STEP)
            found.append((step, _time_s(record.saved_by.get("time")), name))
    return sorted(found)[-_MOST_CANDIDATES:]


def _fault(storage: Storage, name: str, deep: bool) -> str:
    """Return why a checkpoint is not whole, as this rank sees it; "" if it is."""
    try:
        OpenedCheckpoint.open(storage, name).close()
        findings = verify(storage, name) if deep else iter(())
        return next((finding.message[:_MOST_TEXT] for finding in findings), "")
    except CheckpointError as error:
        return str(error)[:_MOST_TEXT]


def _on_all(group: ProcessGroup | None, timeout_s: float, find: Callable[[], Any]) -> list[Any]:
    """Gather what the ranks find; an error of one is raised on all, so that none waits for it in vain."""
    if group is None or group.world_size == 1:
        return [find()]
    error: Exception | None = None
    try:
        told = {"found": find(), "error": ""}
    except Exception as caught:  # noqa: BLE001 -- the other ranks are told of it before it is raised
        error = caught
        told = {"found": None, "error": f"{type(caught).__name__}: {caught}"[:_MOST_TEXT]}
    told["error"] = told["error"].encode(errors="replace").decode()
    everybody = group.all_gather_object(told, timeout_s=timeout_s)
    if error is not None:
        raise error
    for rank, one in enumerate(everybody):
        if one["error"]:
            raise CheckpointError(f"rank {rank} cannot look for checkpoints: {one['error']}", path="", rank=group.rank)
    return [one["found"] for one in everybody]


def _warn(text: str) -> None:
    warnings.warn(f"passing over a checkpoint that is not whole: {text}", stacklevel=5)


def _time_s(value: object) -> float:
    """Return the time of a commit as a record has it; 0 where it has none."""
    return float(value) if isinstance(value, int | float) and math.isfinite(value) else 0.0


def _is_text(name: str) -> bool:
    """Say whether a name has no bytes that are no text, which cannot be told to other ranks."""
    try:
        name.encode()
    except UnicodeEncodeError:
        return False
    return True
