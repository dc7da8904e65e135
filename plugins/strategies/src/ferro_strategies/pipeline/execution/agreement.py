"""Agreement: all ranks learn whether a pass has succeeded on every rank, and why it failed."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np

from ferro import CollectiveTimeout, FerroError, ProcessGroup

from ...nn.arrays import Array
from .transfers import PassStopped


@dataclass(frozen=True, slots=True)
class RankFailure:
    """The failure of this rank.

    Attributes:
        error: the exception as it was raised.
        activity: the rank's activity at that time, such as "the forward pass of stage 1,
            microbatch 2".
    """

    error: Exception
    activity: str

    @property
    def message(self) -> str:
        """Text for the other ranks; "" when this rank only stopped because others did."""
        if isinstance(self.error, PassStopped):
            return ""
        return f"{self.activity}: {type(self.error).__name__}: {self.error}".rstrip(".")


def agree(group: ProcessGroup, op: str, attempt: Callable[[], Array], size: int, activity: Callable[[], str]) -> Array:
    """Call `attempt` on every rank; return the sum of the results if it succeeds on all ranks.

    All ranks call `agree`. An attempt must not wait for a rank that has failed.

    Args:
        group: the ranks.
        op: name of the method that is attempted, for error messages.
        attempt: does the work of this rank, and returns some numbers, (size,) float64.
        size: how many numbers.
        activity: returns a description of this rank's present action, for error messages.

    Raises:
        Exception: this rank's attempt raised it; a note says where.
        CollectiveTimeout: a rank did not come to the end; the message names it.
        FerroError: the attempt failed on other ranks; the message names the first of them.
    """
    failure: RankFailure | None = None
    row = np.zeros(size + 1)  # the numbers, and whether the attempt failed
    try:
        row[:size] = attempt()
    except Exception as error:  # noqa: BLE001 - raised again below, once the others know
        failure = RankFailure(error, activity())
        row[size] = 1.0
    try:
        total: Array = group.all_reduce(row)
        if not total[size]:
            return total[:size]
        messages: list[str] = group.all_gather_object("" if failure is None else failure.message)
    except FerroError as end:
        if isinstance(end, CollectiveTimeout) and end.missing and _only_waited(group, failure):
            raise _absence(group, op, activity(), end) from (failure.error if failure else end)
        if failure is None or not failure.message:
            raise
        messages = []  # the group is dead; this rank's own failure tells more
    if failure is not None and failure.message:
        failure.error.add_note(f"({op}: on rank {group.rank}, in {failure.activity})")
        raise failure.error
    first_failed = next(rank for rank, message in enumerate(messages) if message)
    raise FerroError(
        f"{op} on group {group.name!r} failed on rank {first_failed}, in "
        f"{messages[first_failed]}. Read that rank's log.",
        op=op,
        group=group.name,
        rank=group.rank,
        peer=first_failed,
    )


def _only_waited(group: ProcessGroup, failure: RankFailure | None) -> bool:
    """Return True if this rank only failed because it waited for others."""
    if failure is None or not failure.message:
        return True
    # A timeout of a stage's own collective, on another group, says more by itself.
    return isinstance(failure.error, CollectiveTimeout) and failure.error.group == group.name


def _absence(group: ProcessGroup, op: str, activity: str, end: CollectiveTimeout) -> CollectiveTimeout:
    """Name the ranks that never came; the peer of a transfer may only be waiting for them."""
    missing = ", ".join(map(str, end.missing))
    within = "in time" if end.seconds is None else f"within {end.seconds:g} s"
    return CollectiveTimeout(
        f"{op} on group {group.name!r}: rank {group.rank} came as far as {activity}, and then "
        f"waited for all to stop; did not arrive {within}: rank {missing}. The pipeline can no "
        f"longer be used. Read the log of rank {end.missing[0]} first.",
        op=op,
        group=group.name,
        rank=group.rank,
        peer=end.missing[0],
        seq=end.seq,
        seconds=end.seconds,
        arrived=end.arrived,
        missing=end.missing,
    )
