"""load: a checkpoint into a state, by all ranks of a group, however many they are and however the state is sharded."""

from __future__ import annotations

import logging
import os
from collections.abc import Iterable
from typing import Any

import numpy as np

from ferro import FerroError, ProcessGroup
from ferro.types import Array
from ferro_checkpoint.errors import CheckpointDamaged, CheckpointError, StateError
from ferro_checkpoint.loading.load_plan import LoadPlan, Readers, plan_reads
from ferro_checkpoint.loading.names import Rename, chooser, name_faults, refuse, renamed_names
from ferro_checkpoint.loading.segment_reader import SegmentReader
from ferro_checkpoint.opened.checkpoint import OpenedCheckpoint
from ferro_checkpoint.opened.place import COMPLEX128, StoredPlace
from ferro_checkpoint.placement import local_array
from ferro_checkpoint.placement.local_array import LocalArray
from ferro_checkpoint.plan.agreement import Holdings, agree_on_arrays
from ferro_checkpoint.plan.deadline import Deadline
from ferro_checkpoint.plan.needs import Needs, ReadSegments
from ferro_checkpoint.plan.parts import LocalArrays
from ferro_checkpoint.progress import Progress, byte_progress
from ferro_checkpoint.state.flatten import FlatState, Stored, flatten
from ferro_checkpoint.state.value_agreement import values_of_rank
from ferro_checkpoint.state.values import Json, decode_value
from ferro_checkpoint.storage.opening import split_path
from ferro_checkpoint.tell import tell_all

_log = logging.getLogger("ferro.checkpoint")


def load(
    path: str | os.PathLike[str],
    into: Any = None,
    group: ProcessGroup | None = None,
    *,
    only: str | Iterable[str] | None = None,
    rename: Rename | None = None,
    strict: bool = True,
    verify: bool = True,
    timeout_s: float = 600.0,
    progress: Progress | None = None,
) -> Any:
    """Load the checkpoint `path` into a state; all ranks of the group call it.

    The ranks may be more or fewer than those that saved it, and the state may be that of another strategy.

    Args:
        path: of the checkpoint's directory, as for `save`.
        into: a state as it is given to `save`, of which arrays and values are replaced by those of the checkpoint;
            arrays keep their memory. None returns all tensors as whole NumPy arrays.
        group: the ranks that have the state; None for this process alone.
        only: names of the state, beginnings of names up to a dot ("model"), or patterns with "*": nothing else is loaded.
        rename: names in the checkpoint to names in the state: a dict of names or of their beginnings, or a function.
        strict: whether it is an error that the checkpoint lacks a name of the state, or has more.
        verify: whether the digests of all that is read are checked.
        timeout_s: seconds until an absent rank ends the load.
        progress: called with the bytes read so far and all bytes; a bar on the terminal of long loads if None.

    Returns:
        `into`; or, if that is None, a dict of the bundles, each a dict of its arrays, and the values.

    Raises:
        StateError: the checkpoint does not fit the state; nothing was changed.
        CheckpointIncomplete, CheckpointTooNew: it cannot be loaded; nothing was changed.
        CheckpointDamaged: it is not what was written. If that is found while arrays are read, the message says that
            some have changed: load another checkpoint before you go on.
    """
    own = None if group is None or group.world_size == 1 else group.subgroup(range(group.world_size), timeout_s=timeout_s)
    deadline = Deadline(timeout_s)
    opened: OpenedCheckpoint | None = None
    try:
        try:
            storage, name = split_path(path)
            opened = OpenedCheckpoint.open(storage, name, verify=verify)
        except Exception as error:
            tell_all(own, error, deadline)
            raise
        tell_all(own, None, deadline)
        return load_checkpoint(
            opened,
            into,
            own,
            only=only,
            rename=rename,
            strict=strict,
            timeout_s=deadline.left_s(),
            progress=progress,
        )
    finally:
        if opened is not None:
            opened.close()
        if own is not None:
            own.close()


def load_checkpoint(
    opened: OpenedCheckpoint,
    into: Any,
    group: ProcessGroup | None,
    *,
    only: str | Iterable[str] | None = None,
    rename: Rename | None = None,
    strict: bool = True,
    readers: Readers | None = None,
    timeout_s: float = 600.0,
    threads: int = 2,
    progress: Progress | None = None,
) -> Any:
    """Load an open checkpoint; see `load`.

    Args:
        opened: the checkpoint, of which the record is the same on all ranks.
        into, only, rename, strict, timeout_s, progress: see `load`.
        group: the ranks, of which no other thread uses it meanwhile.
        readers: which ranks can read which segments; None if every rank can read all.
        threads: how many read at the same time.
    """
    deadline = Deadline(timeout_s)
    rank, world_size = (0, 1) if group is None else (group.rank, group.world_size)
    path = opened.path
    values, lacking = values_of_rank(opened.record.values, rank)
    values.pop(COMPLEX128, None)
    try:
        chosen = chooser(only)
        tensors = renamed_names(opened.tensors, rename)
        of_values = renamed_names(values, rename)
        if into is None:
            into = _empty_state(opened, [name for name in tensors if chosen(name)], tensors)
        empty = _EmptyArrays(opened, tensors)
        flat = flatten(into, rank, Stored({new: values[old] for new, old in of_values.items()}, empty.make))
        local = [LocalArray(name, piece) for name, piece in flat.pieces if chosen(name)]
        _check_writable(local)
    except Exception as error:
        tell_all(group, error, deadline)
        raise
    record_digest = opened.record.identity()
    told = tell_all(group, None, deadline, record_digest)
    if len(set(told)) > 1:
        raise StateError(f"{path} is another checkpoint on rank {_other(told)} than on rank 0: do all hosts share it?")
    if not strict:
        local = [array for array in local if array.name in tensors]
    holdings = agree_on_arrays(local, group)
    refuse(path, _faults(holdings, opened, tensors, chosen, strict=strict))
    value_faults = name_faults(
        (name for name in flat.puts if chosen(name) and name not in lacking),
        (name for name in of_values if chosen(name)),
        "value",
        strict=strict,
    )
    _refuse_together(path, value_faults if into_has_values(flat, only, strict) else [], group, deadline)
    plan = _plan(opened, holdings, local, tensors, rank, world_size, readers)
    with byte_progress("loading", plan.read_bytes, rank, progress) as advance:
        failure = SegmentReader(opened, plan, holdings.itemsizes, threads, advance).run(group, deadline)
    _raise_together(failure, opened, group, deadline)
    _finish(flat, {new: values[old] for new, old in of_values.items() if chosen(new)}, chosen, into, path)
    if lacking and rank == world_size - 1:
        _log.warning("%s has no %s for rank %d: it keeps its own", path, ", ".join(map(repr, lacking)), rank)
    return into
