"""Failures of one rank, told to all of them before any goes on."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from ferro import FerroError, ProcessGroup
from ferro_checkpoint.errors import (
    CheckpointDamaged,
    CheckpointError,
    CheckpointIncomplete,
    CheckpointTooNew,
    StateError,
)
from ferro_checkpoint.plan.deadline import Deadline

_KINDS = {kind.__name__: kind for kind in (CheckpointError, CheckpointDamaged, CheckpointIncomplete, CheckpointTooNew)}


def text_of(failure: BaseException) -> str:
    """Return a failure's message; that of a foreign error begins with its class."""
    is_clear = isinstance(failure, FerroError | OSError)
    return (str(failure) if is_clear else f"{type(failure).__name__}: {failure}").rstrip(".")


def tell_all(
    group: ProcessGroup | None, failure: BaseException | None, deadline: Deadline, value: Any = None
) -> list[Any]:
    """Tell all ranks of this rank's failure, or of its value; all ranks call it.

    Args:
        group: the ranks; None for this process alone.
        failure: of this rank. The caller raises it afterwards.
        deadline: of the collective.
        value: anything that travels between ranks.

    Returns:
        The values of all ranks.

    Raises:
        CheckpointError: another rank has told of one, and this rank has no failure; of the same class, so that all
            ranks of a program that loads another checkpoint then do so.
        StateError: another rank has told of any other failure.
    """
    if group is None or group.world_size == 1:
        return [value]
    own = None
    if failure is not None:
        own = [text_of(failure), type(failure).__name__, str(getattr(failure, "path", ""))]
    told = group.all_gather_object([own, value], timeout_s=deadline.left_s())
    for rank, (other, _) in enumerate(told):
        if other is not None and failure is None:
            text, name, path = other
            text = f"found by rank {rank} of {group.world_size}: {text}"
            raise _KINDS[name](text, path=path, rank=rank) if name in _KINDS else StateError(text)
    return [value for _, value in told]


def check_same(given: Sequence[Mapping[str, object]]) -> None:
    """Check that all ranks have given the same, by rank.

    Raises:
        StateError: they have not; the message names what differs, and two ranks.
    """
    for rank, each in enumerate(given):
        differs = [what for what in given[0] if each.get(what) != given[0][what]]
        if differs:
            own, other = (" and ".join(f"{what} {one.get(what)!r}" for what in differs) for one in (given[0], each))
            raise StateError(f"ranks do not save the same: rank 0 has {own}, rank {rank} {other}. Nothing was saved")
