"""Loading an open checkpoint: what fits is read, by all ranks together."""

from __future__ import annotations

import logging
from collections.abc import Iterable
from typing import Any

import xxhash

from ferro import ProcessGroup
from ferro_checkpoint.errors import CheckpointDamaged, CheckpointError, StateError
from ferro_checkpoint.loading.comparison import array_faults, states_begun, states_left_out, value_faults
from ferro_checkpoint.loading.contents import Contents
from ferro_checkpoint.loading.destinations import Destinations
from ferro_checkpoint.loading.load_plan import Readers, plan_reads
from ferro_checkpoint.loading.names import Rename, refuse
from ferro_checkpoint.loading.segment_reader import SegmentReader
from ferro_checkpoint.opened.checkpoint import OpenedCheckpoint
from ferro_checkpoint.placement.local_array import LocalArray
from ferro_checkpoint.plan.agreement import Description, agree_on_arrays
from ferro_checkpoint.plan.deadline import Deadline
from ferro_checkpoint.plan.failures import tell_all, text_of
from ferro_checkpoint.plan.needs import Needs, ReadSegments
from ferro_checkpoint.plan.parts import LocalArrays
from ferro_checkpoint.progress import Progress, byte_progress
from ferro_checkpoint.state.flatten import FlatState, Stored, flatten

_log = logging.getLogger("ferro.checkpoint")
_MOST_NAMED = 5


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
    rank = 0 if group is None else group.rank
    try:
        contents = Contents(opened, rank, only, rename)
        state = contents.empty_state() if into is None else into
        flat = flatten(state, rank, Stored(contents.decoded, contents.empty, contents.of_other_rank))
        for name, merge in flat.merges.items():
            contents.merge(name, merge)
        begun = states_begun(flat, contents)
        destinations = Destinations(
            (name, piece)
            for name, piece in flat.pieces
            if contents.chosen(name) and flat.of_parameters.get(name) not in begun
        )
        faults = [] if into is None else value_faults(flat, contents, strict=strict)
        for name in flat.checks.keys() & contents.decoded.keys():
            flat.checks[name](contents.decoded[name])
    except Exception as error:
        tell_all(group, error, deadline)
        raise
    own = [
        xxhash.xxh3_128_hexdigest(opened.record.encode()),
        faults,
        sorted(begun),
        sorted(states_left_out(flat, contents)),
    ]
    told = tell_all(group, None, deadline, own)
    if len({identity for identity, *_ in told}) > 1:
        text = f"{opened.path} is not the same checkpoint on all ranks: give a directory that all hosts share"
        raise StateError(text)
    local = [array for array in destinations.arrays if strict or array.name in contents.tensors]
    faults = next((each for _, each, *_ in told if each), [])
    left_out = {name for *_, names in told for name in names}
    _read(opened, contents, local, faults, left_out, group, readers, strict, threads, deadline, progress)
    try:
        destinations.check_copies()
        if into is None:
            contents.add_values(state)
        else:
            _put_values(flat, contents, rank)
            _begin_states(flat, begun)
    except Exception as error:
        tell_all(group, error, deadline)
        raise
    tell_all(group, None, deadline)
    if rank == 0:
        _log_states(opened.path, {name for _, _, names, _ in told for name in names}, left_out)
    return state


def _read(
    opened: OpenedCheckpoint,
    contents: Contents,
    local: list[LocalArray],
    faults: list[str],
    left_out: set[str],
    group: ProcessGroup | None,
    readers: Readers | None,
    strict: bool,
    threads: int,
    deadline: Deadline,
    progress: Progress | None,
) -> None:
    """Read all arrays of all ranks, if nothing has a fault; `faults` are the values', and the same on all ranks."""
    rank, world_size = (0, 1) if group is None else (group.rank, group.world_size)
    holdings = agree_on_arrays(Description(local), group, deadline)
    refuse(opened.path, [*array_faults(holdings, contents, left_out, strict=strict), *faults])
    segments = ReadSegments({file: opened.segments(file) for files in opened.record.bundles.values() for file in files})
    needs = Needs(holdings, [contents.tensors[name] for name in holdings.names], segments, world_size, opened.path)
    plan = plan_reads(segments, needs, LocalArrays(local, holdings.names), rank, world_size, readers, opened.path)
    with byte_progress("loading", plan.read_bytes, rank, progress) as advance:
        failure = SegmentReader(opened, plan, holdings.itemsizes, threads, advance).run(group, deadline)
    if failure is None and not opened.verifies:
        failure = _change_of(opened)
    _raise_together(failure, opened, group, deadline)


def _put_values(flat: FlatState, contents: Contents, rank: int) -> None:
    """Put the values back, when all arrays are there."""
    doing = "its values"
    try:
        for name, put in flat.puts.items():
            if name in contents.decoded:
                doing = repr(name)
                put(contents.decoded[name])
        for finish in flat.finishes:
            finish()
    except Exception as error:
        raise StateError(
            f"{contents.path}: {doing} cannot be put into the state: {text_of(error)}. Arrays of the state have changed"
        ) from error
    kept = [name for name in contents.lacking if name in flat.puts and name not in flat.taken_over]
    if kept:
        names = ", ".join(map(repr, kept))
        _log.warning("rank %d keeps its own %s: %s was saved by fewer ranks", rank, names, contents.path)


def _begin_states(flat: FlatState, begun: set[str]) -> None:
    """Let optimizers begin the state of parameters of which the checkpoint has none; they need the loaded values."""
    for path, optimizer in flat.states.items():
        names = [name.removeprefix(f"{path}.") for name in begun if name.startswith(f"{path}.")]
        if names:
            optimizer.begin_checkpoint_states(names)


def _log_states(path: str, begun: set[str], left_out: set[str]) -> None:
    for names, what in (
        (begun, "begin with a new state, as it has none"),
        (left_out, "are frozen; it has state of them"),
    ):
        if names:
            some = ", ".join(map(repr, sorted(names)[:_MOST_NAMED]))
            _log.warning("%s: %d of the optimizers' parameters or states %s: %s", path, len(names), what, some)


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
