"""Timeline: the start and end of each action of a schedule, given how long actions take."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

from ferro import UsageError

from .check import check
from .schedule import Action, Kind, PipelineSchedule
from .topological_order import producer, topological_order

Durations = float | Sequence[float]  # one for all stages, or one for each


@dataclass(frozen=True, slots=True, kw_only=True)
class Timeline:
    """The start and end of each action, in the unit of the durations that were given.

    Attributes:
        schedule: contains the actions.
        starts: for each rank, the start times of its actions, in order.
        ends: for each rank, the end times of its actions, in order.
    """

    schedule: PipelineSchedule
    starts: tuple[tuple[float, ...], ...]
    ends: tuple[tuple[float, ...], ...]

    @property
    def makespan(self) -> float:
        """Time at which the last action ends; the first starts at 0."""
        return max(end for ends in self.ends for end in ends)

    @property
    def idle(self) -> tuple[float, ...]:
        """For each rank, the share of the makespan in which the rank is idle, from 0 to 1."""
        whole = self.makespan
        return tuple(
            max(0.0, 1.0 - (sum(ends) - sum(starts)) / whole) if whole else 0.0
            for starts, ends in zip(self.starts, self.ends, strict=True)
        )

    @property
    def bubble_fraction(self) -> float:
        """The share of all ranks' time in which they are idle, from 0 to 1."""
        return sum(self.idle) / self.schedule.ranks

    @property
    def shortest_duration(self) -> float:
        """Duration of the shortest action that takes any time; 1 if none does."""
        pairs = zip(self.starts, self.ends, strict=True)
        spans = (end - start for row in pairs for start, end in zip(*row, strict=True))
        return min((span for span in spans if span > 0), default=1.0)

    def timed_actions(self, rank: int) -> Iterator[tuple[Action, float, float]]:
        """Yield each action of a rank with its start and end."""
        return zip(self.schedule.actions[rank], self.starts[rank], self.ends[rank], strict=True)

    def activations(self, rank: int) -> tuple[tuple[float, int], ...]:
        """Return each change of the number of activations that a rank holds, as (time, number).

        The activations of one microbatch in one stage count as one. A rank holds them from the start of the forward
        pass to the end of the backward pass, or of the WEIGHT action where there is one.
        """
        held, steps = 0, [(0.0, 0)]
        for action, start, end in self.timed_actions(rank):
            change = (action.kind is Kind.FORWARD) - (action.kind is self.schedule.last_kind)
            if change:
                held += change
                steps.append((start if change > 0 else end, held))
        return tuple(steps)

    @property
    def peak_activations(self) -> tuple[int, ...]:
        """For each rank, the largest number of activations that it holds at once; see `activations`."""
        return tuple(max(held for _, held in self.activations(rank)) for rank in range(self.schedule.ranks))


def simulate(
    schedule: PipelineSchedule,
    *,
    forward: Durations = 1.0,
    backward: Durations = 2.0,
    weight: Durations | None = None,
    transfer: float = 0.0,
) -> Timeline:
    """Compute the start and end of each action if every rank starts each one as early as it can.

    A schedule that splits the backward pass and one that does not can be compared: give the
    same `backward` for both.

    Args:
        schedule: the schedule to time; it is checked first.
        forward: duration of the forward pass of a microbatch through a stage.
        backward: duration of the whole backward pass.
        weight: the part of `backward` that a WEIGHT action takes where the schedule splits the backward pass; half of
            `backward` when None.
        transfer: duration of a message between two ranks; messages slow down neither each other
            nor the computing.

    Raises:
        UsageError: the schedule does not work, or a duration is negative or not finite.
    """
    check(schedule)
    stages = schedule.stages
    whole = _per_stage("backward", backward, stages)
    apart = [part / 2 for part in whole] if weight is None else _per_stage("weight", weight, stages)
    if any(w > b for w, b in zip(apart, whole, strict=True)):
        raise UsageError(
            "simulate: weight is the part of backward that is put off, so at most as much: "
            f"not {weight!r} of {backward!r}"
        )
    if not schedule.splits_backward:
        apart = [0.0] * stages
    durations = {
        Kind.FORWARD: _per_stage("forward", forward, stages),
        Kind.BACKWARD: [b - w for b, w in zip(whole, apart, strict=True)],
        Kind.WEIGHT: apart,
    }
    (delay,) = _per_stage("transfer", transfer, 1)
    done: dict[Action, float] = {}
    starts: list[list[float]] = [[] for _ in range(schedule.ranks)]
    ends: list[list[float]] = [[] for _ in range(schedule.ranks)]
    for rank, action in topological_order(schedule):
        start = ends[rank][-1] if ends[rank] else 0.0
        needed = producer(action, stages)
        if needed is not None:
            travel = delay if schedule.rank_of[needed.stage] != rank else 0.0
            start = max(start, done[needed] + travel)
        done[action] = start + durations[action.kind][action.stage]
        starts[rank].append(start)
        ends[rank].append(done[action])
    return Timeline(schedule=schedule, starts=tuple(map(tuple, starts)), ends=tuple(map(tuple, ends)))


def _per_stage(argument: str, durations: Durations, stages: int) -> list[float]:
    given = [durations] * stages if isinstance(durations, int | float) else list(durations)
    if len(given) != stages:
        raise UsageError(f"simulate: {argument} has {len(given)} durations, for {stages} stages")
    if not all(0 <= duration < float("inf") for duration in given):
        raise UsageError(f"simulate: {argument} must be 0 or more everywhere, not {durations!r}")
    return [float(duration) for duration in given]
