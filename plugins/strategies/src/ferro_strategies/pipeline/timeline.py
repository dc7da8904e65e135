"""Timeline: when each action of a schedule starts and ends, given how long actions take."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from ferro import UsageError

from .check import check
from .schedule import Action, Kind, PipelineSchedule
from .walk import need, walk

Durations = float | Sequence[float]  # of all stages, or of each


@dataclass(frozen=True, slots=True, kw_only=True)
class Timeline:
    """When each action starts and ends, in the unit of the durations that were given.

    Attributes:
        schedule: whose actions.
        starts: for each rank, when each of its actions starts, in order.
        ends: for each rank, when each of its actions ends, in order.
    """

    schedule: PipelineSchedule
    starts: tuple[tuple[float, ...], ...]
    ends: tuple[tuple[float, ...], ...]

    @property
    def makespan(self) -> float:
        """When the last action ends; the first starts at 0."""
        return max(end for ends in self.ends for end in ends)

    @property
    def idle(self) -> tuple[float, ...]:
        """For each rank, the share of the makespan in which it computes nothing, from 0 to 1."""
        whole = self.makespan
        return tuple(
            max(0.0, 1.0 - (sum(ends) - sum(starts)) / whole) if whole else 0.0
            for starts, ends in zip(self.starts, self.ends, strict=True)
        )

    @property
    def bubble_fraction(self) -> float:
        """The share of all ranks' time in which they compute nothing, from 0 to 1."""
        return sum(self.idle) / self.schedule.ranks

    def activations(self, rank: int) -> tuple[tuple[float, int], ...]:
        """Return how many stage-microbatches a rank holds from which time on, as it changes.

        One is held from the start of its forward pass to the end of its backward pass, or of the
        parameters' gradients where these are computed apart.
        """
        last = Kind.WEIGHT if self.schedule.splits_backward else Kind.BACKWARD
        held, steps = 0, [(0.0, 0)]
        for action, start, end in zip(
            self.schedule.actions[rank], self.starts[rank], self.ends[rank], strict=True
        ):
            change = (action.kind is Kind.FORWARD) - (action.kind is last)
            if change:
                held += change
                steps.append((start if change > 0 else end, held))
        return tuple(steps)

    @property
    def peak_activations(self) -> tuple[int, ...]:
        """For each rank, the most stage-microbatches that it holds at a time."""
        return tuple(
            max(held for _, held in self.activations(rank)) for rank in range(self.schedule.ranks)
        )


def simulate(
    schedule: PipelineSchedule,
    *,
    forward: Durations = 1.0,
    backward: Durations = 2.0,
    weight: Durations | None = None,
    transfer: float = 0.0,
) -> Timeline:
    """Tell when each action starts and ends if every rank goes on as soon as it can.

    A schedule that splits the backward pass and one that does not can be compared: give the
    same `backward` for both.

    Args:
        schedule: what to run; it is checked first.
        forward: how long the forward pass of a microbatch through a stage takes.
        backward: how long the whole backward pass takes.
        weight: how much of it goes to the gradients of the parameters, which is done apart where
            the schedule splits the backward pass; half of it when None.
        transfer: how long a message between two ranks takes; messages do not hinder each other,
            nor those who compute.

    Raises:
        UsageError: the schedule does not work, or a duration makes no sense.
    """
    check(schedule)
    stages = schedule.stages
    whole = _each("backward", backward, stages)
    apart = [part / 2 for part in whole] if weight is None else _each("weight", weight, stages)
    if any(part > all_of_it for part, all_of_it in zip(apart, whole, strict=True)):
        raise UsageError(
            "simulate: weight is the part of backward that is put off, so at most as much: "
            f"not {weight!r} of {backward!r}"
        )
    if not schedule.splits_backward:
        apart = [0.0] * stages
    takes = {
        Kind.FORWARD: _each("forward", forward, stages),
        Kind.BACKWARD: [b - w for b, w in zip(whole, apart, strict=True)],
        Kind.WEIGHT: apart,
    }
    (delay,) = _each("transfer", transfer, 1)
    ended: dict[Action, float] = {}
    starts: list[list[float]] = [[] for _ in range(schedule.ranks)]
    ends: list[list[float]] = [[] for _ in range(schedule.ranks)]
    for rank, action in walk(schedule):
        start = ends[rank][-1] if ends[rank] else 0.0
        item = need(schedule, action)
        if item is not None:
            on_the_way = delay if schedule.rank_of[item.stage] != rank else 0.0
            start = max(start, ended[item] + on_the_way)
        ended[action] = start + takes[action.kind][action.stage]
        starts[rank].append(start)
        ends[rank].append(ended[action])
    return Timeline(
        schedule=schedule, starts=tuple(map(tuple, starts)), ends=tuple(map(tuple, ends))
    )


def _each(what: str, durations: Durations, stages: int) -> list[float]:
    """Return a duration for each stage."""
    given = [durations] * stages if isinstance(durations, int | float) else list(durations)
    if len(given) != stages:
        raise UsageError(f"simulate: {what} has {len(given)} durations, for {stages} stages")
    if not all(0 <= duration < float("inf") for duration in given):
        raise UsageError(f"simulate: {what} must be 0 or more everywhere, not {durations!r}")
    return [float(duration) for duration in given]
