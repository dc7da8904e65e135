"""Agreement: all ranks learn whether all have come through, and if not, why."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np

from ferro import CollectiveTimeout, FerroError, ProcessGroup

from .transfers import Stopped


@dataclass(frozen=True, slots=True)
class Failure:
    """What went wrong on this rank.

    Attributes:
        error: as it was raised.
        place: at what, such as "the forward half of stage 1, microbatch 2".
    """

    error: Exception
    place: str

    @property
    def story(self) -> str:
        """What others are told; "" when this rank only stopped because others did."""
        if isinstance(self.error, Stopped):
            return ""
        return f"{self.place}: {type(self.error).__name__}: {self.error}".rstrip(".")


def agree(
    group: ProcessGroup, op: str, attempt: Callable[[], float], place: Callable[[], str]
) -> float:
    """Attempt something on every rank; return the sum of what it gave, if it ended well on all.

    All ranks call it. An attempt must not wait for a rank that has failed.

    Args:
        group: the ranks.
        op: what is attempted, for messages.
        attempt: what this rank does.
        place: tells how far it has come, for messages.

    Raises:
        Exception: as this rank's attempt raised it, with a note where.
        CollectiveTimeout: a rank did not come to the end; names it.
        FerroError: the attempt failed on other ranks; it names the first of them, and where.
    """
    failure: Failure | None = None
    given = 0.0
    try:
        given = attempt()
    except Exception as error:  # noqa: BLE001 - raised again below, once the others know
        failure = Failure(error, place())
    try:
        total, failed = group.all_reduce(np.array([given, failure is not None], np.float64))
        if not failed:
            return float(total)
        stories: list[str] = group.all_gather_object("" if failure is None else failure.story)
    except FerroError as end:
        if isinstance(end, CollectiveTimeout) and end.missing and _waited(group, failure):
            raise _absence(group, op, place(), end) from (failure.error if failure else end)
        if failure is None or not failure.story:
            raise
        stories = []  # the group is dead; what this rank met says more
    if failure is not None and failure.story:
        failure.error.add_note(f"({op}: on rank {group.rank}, in {failure.place})")
        raise failure.error
    culprit = next(rank for rank, story in enumerate(stories) if story)
    raise FerroError(
        f"{op} on group {group.name!r} failed on rank {culprit}, in {stories[culprit]}. "
        "Read that rank's log.",
        op=op,
        group=group.name,
        rank=group.rank,
        peer=culprit,
    )


def _waited(group: ProcessGroup, failure: Failure | None) -> bool:
    """Say whether this rank did nothing worse than to wait for others."""
    if failure is None or not failure.story:
        return True
    # A stage's own collective, on another group, tells more by its own error.
    return isinstance(failure.error, CollectiveTimeout) and failure.error.group == group.name


def _absence(group: ProcessGroup, op: str, place: str, end: CollectiveTimeout) -> CollectiveTimeout:
    """Name the ranks that never came: who is waited for on the way may itself wait for them."""
    missing = ", ".join(map(str, end.missing))
    within = "in time" if end.seconds is None else f"within {end.seconds:g} s"
    return CollectiveTimeout(
        f"{op} on group {group.name!r}: rank {group.rank} came as far as {place}, and then waited "
        f"for all to stop; did not arrive {within}: rank {missing}. The pipeline can no longer be "
        f"used. Read the log of rank {end.missing[0]} first.",
        op=op,
        group=group.name,
        rank=group.rank,
        peer=end.missing[0],
        seq=end.seq,
        seconds=end.seconds,
        arrived=end.arrived,
        missing=end.missing,
    )
