"""Schedules by name: how each is built, and the formulas that are known for it."""

from __future__ import annotations

from typing import Protocol

from ferro import UsageError

from . import gpipe, interleaved, one_f_one_b, zero_bubble
from .schedule import Action, Kind, PipelineSchedule, ScheduleSizes

_MOST_ACTIONS = 1 << 22  # they take about 500 MB; a larger number is a typing mistake


class _ScheduleModule(Protocol):
    """The functions of each module that defines a named schedule."""

    def rank_actions(self, sizes: ScheduleSizes, rank: int) -> list[Action]:
        """Return the actions of a rank, in order."""

    def peak_activations(self, sizes: ScheduleSizes, rank: int) -> int:
        """Return the peak number of activations on a rank; one microbatch in one stage counts as one."""

    def idle_steps(self, sizes: ScheduleSizes) -> int | None:
        """Return each rank's idle time as a multiple of F + B - W, or None if it is not known.

        F, B and W are the durations of the kinds of actions; W is 0 if it is not split off.
        """


_MODULES: dict[str, _ScheduleModule] = {
    "gpipe": gpipe,
    "1f1b": one_f_one_b,
    "interleaved_1f1b": interleaved,
    "zb_h1": zero_bubble,
}
_SPLITTING_BACKWARD = {"zb_h1"}


def names() -> tuple[str, ...]:
    """Return the names of the schedules that can be built."""
    return tuple(_MODULES)


def build(name: str, *, ranks: int, stages_per_rank: int = 1, microbatches: int) -> PipelineSchedule:
    """Build the schedule of this name; stage s is on rank s % ranks.

    Args:
        name: one of `names()`; see the modules gpipe, one_f_one_b, interleaved and zero_bubble.
        ranks: number of ranks, at least 1.
        stages_per_rank: number of stages on each rank, at least 1.
        microbatches: number of microbatches, at least 1; it may be less than `ranks`.

    Raises:
        UsageError: there is no such schedule, or a number is not positive or too large.
    """
    module = _module(name)
    counts = {"ranks": ranks, "stages_per_rank": stages_per_rank, "microbatches": microbatches}
    for argument, count in counts.items():
        if not isinstance(count, int) or isinstance(count, bool) or count < 1:
            raise UsageError(f"pipeline schedule {name!r}: {argument} must be 1 or more, not {count!r}.")
    if 3 * ranks * stages_per_rank * microbatches > _MOST_ACTIONS:
        raise UsageError(
            f"pipeline schedule {name!r}: {microbatches} microbatches in {ranks} x "
            f"{stages_per_rank} stages are more than can be scheduled. Take fewer."
        )
    sizes = ScheduleSizes(ranks=ranks, stages_per_rank=stages_per_rank, microbatches=microbatches)
    return PipelineSchedule(
        name=name,
        microbatches=microbatches,
        rank_of=tuple(stage % ranks for stage in range(sizes.stages)),
        actions=tuple(tuple(module.rank_actions(sizes, rank)) for rank in range(ranks)),
        splits_backward=name in _SPLITTING_BACKWARD,
    )


def forward_only(schedule: PipelineSchedule, microbatches: int) -> PipelineSchedule:
    """Build a schedule of forward actions for the stages of another, on the same ranks.

    Each rank sorts its actions by microbatch + stage. As this sum grows along every dependency,
    no action waits for a later one.
    """
    actions = tuple(
        tuple(
            Action(Kind.FORWARD, stage, microbatch)
            for stage, microbatch in sorted(
                ((s, m) for s in schedule.stages_of(rank) for m in range(microbatches)),
                key=lambda pair: (sum(pair), pair),
            )
        )
        for rank in range(schedule.ranks)
    )
    return PipelineSchedule(name="forward", microbatches=microbatches, rank_of=schedule.rank_of, actions=actions)


def expected_peak_activations(schedule: PipelineSchedule) -> tuple[int, ...]:
    """Return the peak number of activations on each rank, by the schedule's formula (see `Timeline.activations`).

    `check` finds the same numbers by counting.

    Args:
        schedule: made by `build`.

    Raises:
        UsageError: `build` does not make this schedule.
    """
    module, sizes = _module(schedule.name), _sizes(schedule)
    return tuple(module.peak_activations(sizes, rank) for rank in range(schedule.ranks))


def expected_bubble(schedule: PipelineSchedule, *, forward: float, backward: float, weight: float) -> float | None:
    """Return the share of time that every rank is idle, by the formula of the literature.

    The formula holds where all stages take equally long, and messages take no time. With p ranks
    of v stages each and m microbatches, it is i / (i + m v (F + B + W)), where
    i = (p - 1) (F + B - W): so (p - 1) / (m v + p - 1) where the backward pass is not split. For
    ZB-H1 it holds if W <= F, B.

    Args:
        schedule: made by `build`.
        forward: F, the duration of a FORWARD action.
        backward: B, the duration of a BACKWARD action.
        weight: W, the duration of a WEIGHT action; 0 where the backward pass is not split.

    Returns:
        The share, from 0 to 1; None where there is no formula.

    Raises:
        UsageError: `build` does not make this schedule.
    """
    sizes = _sizes(schedule)
    steps = _module(schedule.name).idle_steps(sizes)
    if steps is None or weight > min(forward, backward):
        return None
    work = sizes.microbatches * sizes.stages_per_rank * (forward + backward + weight)
    idle = steps * (forward + backward - weight)
    return idle / (idle + work) if idle else 0.0


def _module(name: str) -> _ScheduleModule:
    if name not in _MODULES:
        raise UsageError(f"there is no pipeline schedule {name!r}; choose one of {', '.join(_MODULES)}.")
    return _MODULES[name]


def _sizes(schedule: PipelineSchedule) -> ScheduleSizes:
    ranks, stages = schedule.ranks, schedule.stages
    if schedule.rank_of != tuple(stage % max(ranks, 1) for stage in range(stages)) or (stages % max(ranks, 1)):
        raise UsageError(
            f"pipeline schedule {schedule.name!r} does not put stage s on rank s % {ranks}, "
            "so no formula is known for it; `check` counts what it holds."
        )
    return ScheduleSizes(ranks=ranks, stages_per_rank=stages // ranks, microbatches=schedule.microbatches)
