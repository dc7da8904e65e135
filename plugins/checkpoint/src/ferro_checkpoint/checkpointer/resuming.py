"""Resuming: the newest checkpoint that is whole, in the ranks' memories or in the directory, the same on all ranks."""

from __future__ import annotations

import warnings
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import TYPE_CHECKING, Any

from ferro.errors import PeerLost
from ferro_checkpoint.checkpointer.catalog import Catalog, step_of
from ferro_checkpoint.checkpointer.memory.search import Readers, Remembered, complete, remembered
from ferro_checkpoint.errors import CheckpointDamaged, CheckpointError, CheckpointIncomplete
from ferro_checkpoint.loading.load_checkpoint import load_checkpoint
from ferro_checkpoint.opened.checkpoint import OpenedCheckpoint
from ferro_checkpoint.storage.storage import Storage

if TYPE_CHECKING:
    from ferro_checkpoint.checkpointer.own_groups import OwnGroups
    from ferro_checkpoint.checkpointer.save_starter import SaveStarter


@dataclass(frozen=True, slots=True)
class _Candidate:
    """A checkpoint in memory, if `remembered` is given, or in the directory; the same on all ranks."""

    step: int
    name: str
    storage: Storage
    remembered: Remembered | None = None

    @property
    def path(self) -> str:
        return f"{self.storage.path}/{self.name}"


def load_newest(state: object, starter: SaveStarter, groups: OwnGroups) -> int | None:
    """Load the newest whole checkpoint into `state`; all ranks call it together.

    A checkpoint that turns out to be damaged while it is loaded is left out, with a warning, and the next older one
    is loaded over it.

    Returns:
        its step; None if there is no checkpoint.

    Raises:
        CheckpointDamaged: there are checkpoints, and all are damaged. The state may have been changed.
        CheckpointIncomplete: the ranks had a checkpoint in memory, of which parts are lost, and there is no other.
        PeerLost: a rank is gone. The state may have been changed.
    """
    try:
        return _load_newest(state, starter, groups)
    except PeerLost as error:
        directory = "memory" if starter.storage is None else starter.storage.path
        text = f"resuming from {directory} failed, and some of the state may be changed: {error}"
        raise PeerLost(
            text, host=error.host, op=error.op, group=error.group, rank=error.rank, peer=error.peer
        ) from error


def _load_newest(state: object, starter: SaveStarter, groups: OwnGroups) -> int | None:
    damages: list[str] = []
    for one in _candidates(starter, groups):
        fault = _load_from_memory(state, one, starter, groups) if one.remembered else _load(state, one, groups, None)
        if fault is None:
            if one.remembered is None and starter.memory is not None:
                starter.memory.drop_others(None)
            return one.step
        if one.remembered is None:
            starter.replaceable.add(one.name)
        if fault:
            damages.append(fault)
            if groups.rank == 0:
                warnings.warn(f"{one.path} is damaged, an older one is loaded: {fault}", RuntimeWarning, stacklevel=3)
    if damages:
        directory = "memory" if starter.storage is None else starter.storage.path
        text = f"{directory}: every checkpoint in it is damaged; the newest: {damages[0]}. The state may be changed"
        raise CheckpointDamaged(text, path=directory, rank=groups.rank)
    lost = [step for step in groups.gather(_step_in_memory(starter)) if step is not None]
    if lost:
        elsewhere = "there is no directory" if starter.storage is None else f"{starter.storage.path} has none either"
        text = (
            f"the ranks that are left do not hold all of the checkpoint of step {max(lost)}, nor of any other: a rank "
            f"was lost together with the one that had its copy, and {elsewhere}. To begin anew, make a new Checkpointer"
        )
        raise CheckpointIncomplete(text, path="memory", rank=groups.rank)
    return None


def _step_in_memory(starter: SaveStarter) -> int | None:
    """Return the step of the checkpoint that was once whole in the ranks' memories, as far as this one knows."""
    whole = None if starter.memory is None else starter.memory.whole
    return step_of(whole.name) if whole is not None and whole.key else None


def _candidates(starter: SaveStarter, groups: OwnGroups) -> list[_Candidate]:
    """List all checkpoints, the newest first; of one step, the one in memory comes first."""
    found: list[_Candidate] = []
    if starter.memory is not None:
        memory = starter.memory
        found += [_Candidate(one.step, one.name, memory, one) for one in remembered(memory, groups)]
    if starter.storage is not None and starter.catalog is not None:
        found += [_Candidate(step, name, starter.storage) for step, name in _listed(starter.catalog, groups)]
    return sorted(found, key=lambda one: (-one.step, one.remembered is None))


def _listed(catalog: Catalog, groups: OwnGroups) -> list[tuple[int, str]]:
    """List the directories as rank 0 sees them."""
    error: Exception | None = None
    told: tuple[list[tuple[int, str]], str] = ([], "")
    if groups.rank == 0:
        try:
            told = (catalog.steps(), "")
        except Exception as failure:  # noqa: BLE001 - the others are told first
            error, told = failure, ([], f"{type(failure).__name__}: {failure}")
    found, text = groups.from_rank_0(told)
    if error is not None:
        raise error
    if text:
        raise CheckpointError(f"rank 0 cannot look for checkpoints: {text}", path="", rank=groups.rank)
    return found


def _load_from_memory(state: object, one: _Candidate, starter: SaveStarter, groups: OwnGroups) -> str | None:
    """Load one that is in the ranks' memories, as `_load`, if it is complete there."""
    assert starter.memory is not None
    assert one.remembered is not None
    found = complete(one.remembered, starter.memory, groups)
    if found is None:
        return ""
    held, readers = found
    fault = _load(state, one, groups, readers)
    if fault is None:
        starter.memory.drop_others(held)
    return fault


def _load(state: object, one: _Candidate, groups: OwnGroups, readers: Readers | None) -> str | None:
    """Load one; return None if that went well on all ranks, the fault that one has found, or "" if it is incomplete."""
    opened: list[OpenedCheckpoint] = []
    fault = _agreed(lambda: opened.append(OpenedCheckpoint.open(one.storage, one.name)), one, groups)
    try:
        if fault is not None:
            return fault
        load_now = partial(load_checkpoint, timeout_s=groups.timeout_s)
        return _agreed(lambda: load_now(opened[0], state, groups.steps, readers=readers), one, groups)
    finally:
        for checkpoint in opened:
            checkpoint.close()


def _agreed(attempt: Callable[[], object], one: _Candidate, groups: OwnGroups) -> str | None:
    """Try something on all ranks; return the first rank's fault, as `_load`, or raise what is no fault of the files."""
    error: Exception | None = None
    try:
        attempt()
    except Exception as failure:  # noqa: BLE001 - the ranks agree on it first
        error = failure
    text = "" if isinstance(error, CheckpointIncomplete) else f"{type(error).__name__}: {error}"
    answers: list[Any] = groups.gather([_kind(error), text])
    worst = max(kind for kind, _ in answers)  # damage that one rank has found may be another error elsewhere
    if worst == _OTHER:
        if error is not None and _kind(error) == _OTHER:
            raise error
        rank, told = next((rank, told) for rank, (kind, told) in enumerate(answers) if kind == _OTHER)
        raise CheckpointError(f"{one.path} could not be loaded on rank {rank}: {told}", path=one.path, rank=rank)
    if worst == _INCOMPLETE and any(kind == _GOOD for kind, _ in answers):
        lacks = next(rank for rank, (kind, _) in enumerate(answers) if kind == _INCOMPLETE)
        text = f"{one.path} is there for some ranks, and not for rank {lacks}: give a directory that all hosts share"
        raise CheckpointError(text, path=one.path, rank=groups.rank)
    return None if worst == _GOOD else next(str(told) for kind, told in answers if kind == worst)


_GOOD, _INCOMPLETE, _OTHER, _DAMAGED = range(4)


def _kind(error: Exception | None) -> int:
    if error is None:
        return _GOOD
    if isinstance(error, CheckpointIncomplete):
        return _INCOMPLETE
    return _DAMAGED if isinstance(error, CheckpointDamaged) else _OTHER
