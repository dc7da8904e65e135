"""Building a schedule by its name, and what is known of it beforehand."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from ferro import UsageError

from . import gpipe, interleaved, one_f_one_b, zero_bubble
from .schedule import Action, PipelineSchedule
from .sizes import Sizes

_MOST_ACTIONS = 1 << 22  # some 500 MB of them: more is a slip of the pen


@dataclass(frozen=True, slots=True, kw_only=True)
class _Family:
    """What is known of the schedules of one name.

    Attributes:
        order: the actions of a rank.
        activations: the most stage-microbatches that a rank holds.
        idle_steps: how often F + B - W fits into the time that each rank is idle, or None; these
            are how long the actions of each kind take, and W is 0 where it is not split off.
        splits_backward: whether WEIGHT actions are apart from BACKWARD ones.
    """

    order: Callable[[Sizes, int], list[Action]]
    activations: Callable[[Sizes, int], int]
    idle_steps: Callable[[Sizes], int | None]
    splits_backward: bool = False


_FAMILIES = {
    "gpipe": _Family(order=gpipe.order, activations=gpipe.activations, idle_steps=gpipe.idle_steps),
    "1f1b": _Family(
        order=one_f_one_b.order,
        activations=one_f_one_b.activations,
        idle_steps=one_f_one_b.idle_steps,
    ),
    "interleaved_1f1b": _Family(
        order=interleaved.order,
        activations=interleaved.activations,
        idle_steps=interleaved.idle_steps,
    ),
    "zb_h1": _Family(
        order=zero_bubble.order,
        activations=zero_bubble.activations,
        idle_steps=zero_bubble.idle_steps,
        splits_backward=True,
    ),
}


def names() -> tuple[str, ...]:
    """Return the names of the schedules that can be built."""
    return tuple(_FAMILIES)


def build(
    name: str, *, ranks: int, stages_per_rank: int = 1, microbatches: int
) -> PipelineSchedule:
    """Return the schedule of this name; stage s is on rank s % ranks.

    Args:
        name: one of `names()`; see the modules gpipe, one_f_one_b, interleaved and zero_bubble.
        ranks: how many, at least 1.
        stages_per_rank: how many stages each rank has, at least 1.
        microbatches: how many, at least 1; any number, also fewer than ranks.

    Raises:
        UsageError: there is no such schedule, or a number makes no sense.
    """
    family = _family(name)
    counts = {"ranks": ranks, "stages_per_rank": stages_per_rank, "microbatches": microbatches}
    for what, count in counts.items():
        if not isinstance(count, int) or isinstance(count, bool) or count < 1:
            raise UsageError(
                f"pipeline schedule {name!r}: {what} must be 1 or more, not {count!r}."
            )
    if 3 * ranks * stages_per_rank * microbatches > _MOST_ACTIONS:
        raise UsageError(
            f"pipeline schedule {name!r}: {microbatches} microbatches in {ranks} x "
            f"{stages_per_rank} stages are more than can be scheduled. Take fewer."
        )
    sizes = Sizes(ranks=ranks, stages_per_rank=stages_per_rank, microbatches=microbatches)
    return PipelineSchedule(
        name=name,
        microbatches=microbatches,
        rank_of=tuple(stage % ranks for stage in range(sizes.stages)),
        actions=tuple(tuple(family.order(sizes, rank)) for rank in range(ranks)),
        splits_backward=family.splits_backward,
    )


def promised_activations(schedule: PipelineSchedule) -> tuple[int, ...]:
    """Return the most stage-microbatches that each rank holds at once, by its family's formula.

    The formulas are in `activations` of the modules gpipe, one_f_one_b, interleaved and
    zero_bubble; `check` finds the same by counting.

    Raises:
        UsageError: it is not a schedule that `build` makes.
    """
    family, sizes = _family(schedule.name), _sizes(schedule)
    return tuple(family.activations(sizes, rank) for rank in range(schedule.ranks))


def expected_bubble(
    schedule: PipelineSchedule, *, forward: float, backward: float, weight: float
) -> float | None:
    """Return the share of time that every rank is idle, by the formula of the literature.

    It holds where all stages take equally long, and messages no time. With p ranks of v stages
    each and m microbatches, it is i / (i + m v (F + B + W)), where i = (p - 1) (F + B - W): so
    (p - 1) / (m v + p - 1) where the backward pass is not split. ZB-H1's holds for W <= F, B.

    Args:
        schedule: what `build` has made.
        forward: F, how long a FORWARD action takes.
        backward: B, how long a BACKWARD action takes.
        weight: W, how long a WEIGHT action takes; 0 where the backward pass is not split.

    Returns:
        The share, from 0 to 1; None where there is no formula.

    Raises:
        UsageError: it is not a schedule that `build` makes.
    """
    sizes = _sizes(schedule)
    steps = _family(schedule.name).idle_steps(sizes)
    if steps is None or weight > min(forward, backward):
        return None
    work = sizes.microbatches * sizes.stages_per_rank * (forward + backward + weight)
    idle = steps * (forward + backward - weight)
    return idle / (idle + work) if idle else 0.0


def _family(name: str) -> _Family:
    if name not in _FAMILIES:
        raise UsageError(
            f"there is no pipeline schedule {name!r}; choose one of {', '.join(_FAMILIES)}."
        )
    return _FAMILIES[name]


def _sizes(schedule: PipelineSchedule) -> Sizes:
    ranks, stages = schedule.ranks, schedule.stages
    if schedule.rank_of != tuple(stage % max(ranks, 1) for stage in range(stages)) or (
        stages % max(ranks, 1)
    ):
        raise UsageError(
            f"pipeline schedule {schedule.name!r} does not put stage s on rank s % {ranks}, "
            "so no formula is known for it; `check` counts what it holds."
        )
    return Sizes(ranks=ranks, stages_per_rank=stages // ranks, microbatches=schedule.microbatches)
