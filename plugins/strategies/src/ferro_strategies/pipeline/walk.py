"""The walk: takes the actions of all ranks in an order in which each finds what it needs."""

from __future__ import annotations

from collections import deque
from collections.abc import Iterator

from ferro import UsageError

from .schedule import Action, Kind, PipelineSchedule

_WORDS = {
    Kind.FORWARD: "the forward pass",
    Kind.BACKWARD: "the backward pass",
    Kind.WEIGHT: "the parameters' gradients",
}


def need(schedule: PipelineSchedule, action: Action) -> Action | None:
    """Return what another stage must have computed before an action, or None.

    The stage's own forward pass before its backward pass, and that before its parameters'
    gradients, are not told here: they are of the same rank, and come first in its order.
    """
    kind, stage = action.kind, action.stage
    if kind is Kind.FORWARD and stage > 0:
        return Action(kind, stage - 1, action.microbatch)
    if kind is Kind.BACKWARD and stage < schedule.stages - 1:
        return Action(kind, stage + 1, action.microbatch)
    return None


def in_words(action: Action) -> str:
    """Name an action, for messages."""
    return f"{_WORDS[action.kind]} of stage {action.stage}, microbatch {action.microbatch}"


def walk(schedule: PipelineSchedule) -> Iterator[tuple[int, Action]]:
    """Yield every action with its rank: each rank's in its order, each after what it `need`s.

    Whether this comes to an end does not depend on how long anything takes: a rank that can go on
    still can when others have gone on first.

    Args:
        schedule: one in which each action is there once.

    Raises:
        UsageError: some ranks wait for each other for ever; names them.
    """
    ended: set[Action] = set()
    waiting: dict[Action, int] = {}
    positions = [0] * schedule.ranks
    ready = deque(range(schedule.ranks))
    while ready:
        rank = ready.popleft()
        actions = schedule.actions[rank]
        while positions[rank] < len(actions):
            action = actions[positions[rank]]
            missing = need(schedule, action)
            if missing is not None and missing not in ended:
                waiting[missing] = rank
                break
            yield rank, action
            ended.add(action)
            positions[rank] += 1
            if action in waiting:
                ready.append(waiting.pop(action))
    if waiting:
        raise _deadlock(schedule, {rank: missing for missing, rank in waiting.items()}, positions)


def _deadlock(
    schedule: PipelineSchedule, missing: dict[int, Action], positions: list[int]
) -> UsageError:
    """Follow who waits for whom until it comes round."""
    rank = min(missing)
    path: list[int] = []
    while rank not in path:
        path.append(rank)
        rank = schedule.rank_of[missing[rank].stage]
    circle = path[path.index(rank) :]
    waits = [
        f"rank {rank} before {in_words(schedule.actions[rank][positions[rank]])}, "
        f"for {in_words(missing[rank])}"
        for rank in circle
    ]
    return UsageError(
        f"pipeline schedule {schedule.name!r} never ends, for these wait for each other: "
        f"{'; '.join(waits)}. Change the order of one of these ranks.",
        rank=circle[0],
    )
