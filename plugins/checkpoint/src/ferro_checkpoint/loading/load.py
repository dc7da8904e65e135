"""load: a checkpoint into a state, by all ranks of a group, however many they are and however the state is sharded."""

from __future__ import annotations

import logging
import os
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

import numpy as np
import xxhash

from ferro import ProcessGroup
from ferro.types import Array
from ferro_checkpoint.errors import CheckpointDamaged, CheckpointError, StateError
from ferro_checkpoint.loading.load_plan import Readers, plan_reads
from ferro_checkpoint.loading.names import Rename, chooser, name_faults, refuse, renamed_names, renamer
from ferro_checkpoint.loading.segment_reader import SegmentReader
from ferro_checkpoint.opened.checkpoint import OpenedCheckpoint
from ferro_checkpoint.opened.place import COMPLEX128
from ferro_checkpoint.placement import local_array
from ferro_checkpoint.placement.local_array import LocalArray
from ferro_checkpoint.plan.agreement import Description, Holdings, agree_on_arrays
from ferro_checkpoint.plan.deadline import Deadline
from ferro_checkpoint.plan.failures import tell_all, text_of
from ferro_checkpoint.plan.needs import Needs, ReadSegments
from ferro_checkpoint.plan.parts import LocalArrays
from ferro_checkpoint.progress import Progress, byte_progress
from ferro_checkpoint.state.flatten import TENSOR_KEY, FlatState, Stored, flatten
from ferro_checkpoint.state.value_agreement import BY_RANK, values_of_rank
from ferro_checkpoint.state.values import Json, decode_value
from ferro_checkpoint.storage.opening import split_path

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
        only: names of the state, their beginnings up to a dot ("model"), or patterns with "*": nothing else is loaded.
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
    own = (
        None if group is None or group.world_size == 1 else group.subgroup(range(group.world_size), timeout_s=timeout_s)
    )
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
            opened, into, own, only=only, rename=rename, strict=strict, timeout_s=deadline.left_s(), progress=progress
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
        values = {new: values[old] for new, old in renamed_names(values, rename).items() if chosen(new)}
        decoded = {name: _decoded(value, name, path) for name, value in values.items()}
        state = (
            _empty_state(opened, {new: old for new, old in tensors.items() if chosen(new)}) if into is None else into
        )
        flat = flatten(state, rank, Stored(decoded, lambda name: _empty(opened, tensors, name)))
        local = [LocalArray(name, piece) for name, piece in flat.pieces if chosen(name)]
        _check_writable(local)
        faults = [] if into is None else _value_faults(flat, values, lacking, chosen, strict=strict)
        for name in flat.checks.keys() & decoded.keys():
            flat.checks[name](decoded[name])
    except Exception as error:
        tell_all(group, error, deadline)
        raise
    told = tell_all(group, None, deadline, [xxhash.xxh3_128_hexdigest(opened.record.encode()), faults])
    if len({identity for identity, _ in told}) > 1:
        raise StateError(f"{path} is not the same checkpoint on all ranks: give a directory that all hosts share")
    if not strict:
        local = [array for array in local if array.name in tensors]
    holdings = agree_on_arrays(Description(local), group, deadline)
    others = _of_other_ranks(opened, rename)
    faults = _array_faults(
        holdings, opened, {new: old for new, old in tensors.items() if chosen(new)}, others, strict=strict
    )
    refuse(path, [*faults, *next((each for _, each in told if each), [])])
    segments = ReadSegments({file: opened.segments(file) for files in opened.record.bundles.values() for file in files})
    places = [opened.tensors[tensors[name]] for name in holdings.names]
    needs = Needs(holdings, places, segments, world_size, path)
    plan = plan_reads(segments, needs, LocalArrays(local, holdings.names), rank, world_size, readers, path)
    with byte_progress("loading", plan.read_bytes, rank, progress) as advance:
        failure = SegmentReader(opened, plan, holdings.itemsizes, threads, advance).run(group, deadline)
    if failure is None and not opened.verifies:
        failure = _change_of(opened)
    _raise_together(failure, opened, group, deadline)
    if into is None:
        return _with_values(state, decoded)
    for name, put in flat.puts.items():
        if name in decoded:
            put(decoded[name])
    for finish in flat.finishes:
        finish()
    kept = [name for name in lacking if name in flat.puts]
    if kept:
        _log.warning("rank %d keeps its own %s: %s was saved by fewer ranks", rank, ", ".join(map(repr, kept)), path)
    return into


def _empty(opened: OpenedCheckpoint, tensors: Mapping[str, str], name: str) -> Array | None:
    """Make an array for a tensor, by its name in the state."""
    if name not in tensors:
        return None
    place = opened.tensors[tensors[name]]
    return np.empty(place.array_shape, place.array_dtype(name, opened.path))


def _empty_state(opened: OpenedCheckpoint, tensors: Mapping[str, str]) -> dict[str, Any]:
    state: dict[str, Any] = {}
    for name in tensors:
        bundle, _, tensor = name.partition(".")
        state.setdefault(bundle, {})[tensor] = _empty(opened, tensors, name)
    return state


def _decoded(value: Json, name: str, path: str) -> Any:
    try:
        return decode_value(value)
    except ValueError as error:
        text = f"{path}: value {name!r}: {error}: update ferro-checkpoint, or leave it out with only="
        raise CheckpointError(text, path=path) from error


def _with_values(state: dict[str, Any], values: Mapping[str, Any]) -> dict[str, Any]:
    """Add the values to a state of arrays: those of a bundle's object as "BUNDLE.values"."""
    arrays = {f"{bundle}.{name}": array for bundle, own in state.items() for name, array in own.items()}
    for name, value in values.items():
        state[f"{name}.values" if name in state else name] = _with_arrays(value, arrays)
    return state


def _with_arrays(value: Any, arrays: Mapping[str, Array]) -> Any:
    """Put arrays in the place of their names."""
    if isinstance(value, dict):
        if len(value) == 1 and value.get(TENSOR_KEY) in arrays:
            return arrays[value[TENSOR_KEY]]
        return {key: _with_arrays(item, arrays) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return type(value)(_with_arrays(item, arrays) for item in value)
    return value


def _check_writable(local: Sequence[LocalArray]) -> None:
    for array in local:
        data = array.piece.data
        if isinstance(data, np.ndarray) and not data.flags.writeable and data.size:
            raise StateError(f"{array.name!r} is read-only in the state: give an array that can be written to")


def _value_faults(
    flat: FlatState, values: Mapping[str, Json], lacking: Sequence[str], chosen: Callable[[str], bool], *, strict: bool
) -> list[str]:
    """Compare the values of the checkpoint with those of the state.

    An object that has arrays and no values now does not need any, and a state of plain arrays does not take the values
    of the object that they were saved from.
    """
    wanted = {name for name in flat.puts if chosen(name) and name not in lacking}
    wanted = {name for name in wanted if name in values or flat.values[name] not in (None, [], {})}
    owners = {name[:end] for name, _ in flat.pieces for end, char in enumerate(name) if char == "."}
    there = {name for name in values if name in wanted or name not in owners}
    there -= {name for name in there - wanted if values[name] in (None, [], {})}
    changed = sorted(name for name in flat.fixed if name in values and values[name] != flat.values[name])
    return name_faults(wanted, there, "value", strict=strict) + [
        f"a tuple holds value {name!r}, and another is in the checkpoint, which a tuple cannot take: use a list"
        for name in changed[:5]
    ]


def _of_other_ranks(opened: OpenedCheckpoint, rename: Rename | None) -> set[str]:
    """List tensors of objects of which every rank has its own: no rank of another number of ranks may take them."""
    names: set[str] = set()

    def find(value: Any) -> None:
        if isinstance(value, dict):
            pairs = value.get("$dict")
            if isinstance(pairs, list) and len(pairs) == 1 and pairs[0][:1] == [TENSOR_KEY]:
                names.add(pairs[0][1])
            for item in value.values():
                find(item)
        elif isinstance(value, list):
            for item in value:
                find(item)

    find([value for value in opened.record.values.values() if isinstance(value, dict) and BY_RANK in value])
    to_state = renamer(rename)
    return {to_state(name) for name in names}


def _array_faults(
    holdings: Holdings, opened: OpenedCheckpoint, tensors: Mapping[str, str], of_other_ranks: set[str], *, strict: bool
) -> list[str]:
    """Compare names, shapes and dtypes; all ranks find the same faults."""
    faults = []
    for name, dtype, shape in zip(holdings.names, holdings.dtypes, holdings.shapes, strict=True):
        if name not in tensors:
            continue
        place = opened.tensors[tensors[name]]
        stored = (local_array.COMPLEX128 if place.complex128 else place.dtype, place.shape)
        if stored != (dtype, shape):
            faults.append(f"{name!r} is {_of(stored)} in the checkpoint, and {_of((dtype, shape))} in the state")
    wanted = set(holdings.names)
    there = (name for name in tensors if name in wanted or name not in of_other_ranks)
    faults = [*faults[:10], f"and {len(faults) - 10} more"] if len(faults) > 10 else faults
    return faults + name_faults(wanted, there, "tensor", strict=strict)


def _of(described: tuple[str, tuple[int, ...]]) -> str:
    dtype, shape = described
    return f"{dtype} {shape[:-1] if dtype == local_array.COMPLEX128 else shape}"


def _change_of(opened: OpenedCheckpoint) -> CheckpointError | None:
    """Return the error of a file that was changed since it was opened, which no digest finds."""
    try:
        opened.check_unchanged()
    except CheckpointError as error:
        return error
    return None


def _raise_together(
    failure: Exception | None, opened: OpenedCheckpoint, group: ProcessGroup | None, deadline: Deadline
) -> None:
    """Raise a failure of any rank on all of them."""
    told = [None if failure is None else [text_of(failure), isinstance(failure, CheckpointDamaged)]]
    if group is not None and group.world_size > 1:
        told = group.all_gather_object(told[0], timeout_s=deadline.left_s())
    for rank, each in enumerate(told):
        if each is None:
            continue
        text, is_damage = each
        where = "" if len(told) == 1 else f" (found by rank {rank} of {len(told)})"
        kind = CheckpointDamaged if is_damage else CheckpointError
        own = failure if len(told) == 1 or (group is not None and rank == group.rank) else None
        raise kind(
            f"{text}{where}. Arrays of the state may have changed: load another checkpoint into it before you go on",
            path=opened.path,
            tensor=getattr(own, "tensor", None),
        ) from own
