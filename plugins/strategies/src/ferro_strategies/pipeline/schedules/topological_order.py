"""Topological order: the actions of all ranks, each after the action whose result it needs."""

from __future__ import annotations

from collections import deque
from collections.abc import Iterator

from ferro import UsageError

from .schedule import Action, Kind, PipelineSchedule


def producer(action: Action, stages: int) -> Action | None:
    """Return the action of another stage whose result an action needs, or None.

    A backward pass also needs its stage's own forward pass, and the parameters' gradients need that backward pass.
    These dependencies within a rank are left out, because the order of its actions satisfies them.
    """
    if action.kind is Kind.WEIGHT:
        return None
    return _at_stage(action, action.stage + (-1 if action.kind is Kind.FORWARD else 1), stages)


def consumer(action: Action, stages: int) -> Action | None:
    """Return the action of another stage that needs the result of an action, or None."""
    if action.kind is Kind.WEIGHT:
        return None
    return _at_stage(action, action.stage + (1 if action.kind is Kind.FORWARD else -1), stages)


def _at_stage(action: Action, stage: int, stages: int) -> Action | None:
    return Action(action.kind, stage, action.microbatch) if 0 <= stage < stages else None


def topological_order(schedule: PipelineSchedule) -> Iterator[tuple[int, Action]]:
    """Yield every action with its rank: each rank's in its order, each after its `producer`.

    If one order reaches the end, every order does, whatever the durations: an action that can run stays able to run.

    Args:
        schedule: contains each action once.

    Raises:
        UsageError: some ranks wait for each other for ever; names them.
    """
    done: set[Action] = set()
    waiting: dict[Action, int] = {}
    positions = [0] * schedule.ranks
    ready = deque(range(schedule.ranks))
    while ready:
        rank = ready.popleft()
        actions = schedule.actions[rank]
        while positions[rank] < len(actions):
            action = actions[positions[rank]]
            needed = producer(action, schedule.stages)
            if needed is not None and needed not in done:
                waiting[needed] = rank
                break
            yield rank, action
            done.add(action)
            positions[rank] += 1
            if action in waiting:
                ready.append(waiting.pop(action))
    if waiting:
        raise _deadlock(schedule, {rank: needed for needed, rank in waiting.items()}, positions)


def _deadlock(schedule: PipelineSchedule, needed: dict[int, Action], positions: list[int]) -> UsageError:
    """Find a cycle of ranks that wait for each other, and describe it."""
    rank = min(needed)
    path: list[int] = []
    while rank not in path:
        path.append(rank)
        rank = schedule.rank_of[needed[rank].stage]
    cycle = path[path.index(rank) :]
    waits = [f"rank {rank} before {schedule.actions[rank][positions[rank]]}, for {needed[rank]}" for rank in cycle]
    return UsageError(
        f"pipeline schedule {schedule.name!r} never ends, for these wait for each other: "
        f"{'; '.join(waits)}. Change the order of one of these ranks.",
        rank=cycle[0],
    )
