"""Routes: what a schedule makes travel from rank to rank, in what order, and when to expect it.

A message is known by the action that takes it: FORWARD of stage 2 takes the output of stage 1,
BACKWARD of stage 2 the gradient that stage 3 has of its input.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TypeAlias

from .call import Call
from .schedule import Action, Kind, PipelineSchedule

# A receive starts at most so many actions before the one that takes the message: early enough
# to be over by then, late enough that its deadline is not spent on this rank's own computing.
_ACTIONS_AHEAD = 2

# Names a route: the kind and stage of the actions that take what comes along it.
RouteKey: TypeAlias = tuple[Kind, int]


@dataclass(frozen=True, slots=True, kw_only=True)
class Route:
    """The way of one kind of message to one stage that is on another rank.

    Attributes:
        kind: FORWARD for the stage's inputs, BACKWARD for the gradients of its outputs.
        stage: the stage that takes them.
        source: rank that sends.
        target: rank that receives.
        order: microbatches, in the order in which they are sent.
    """

    kind: Kind
    stage: int
    source: int
    target: int
    order: tuple[int, ...]

    @property
    def key(self) -> RouteKey:
        """What tells it from the others."""
        return self.kind, self.stage

    def __str__(self) -> str:
        what = "inputs" if self.kind is Kind.FORWARD else "output gradients"
        return f"{what} of stage {self.stage}"


@dataclass(frozen=True, slots=True, kw_only=True)
class Plan:
    """What one rank does in one pass.

    Attributes:
        call: what all ranks do.
        stages: how many there are on all ranks.
        actions: this rank's, in order.
        splits_backward: see `PipelineSchedule`.
        incoming: the routes that end here.
        outgoing: the routes that begin here.
        asks: for each action, the messages whose receive is to start just before it.
    """

    call: Call
    stages: int
    actions: tuple[Action, ...]
    splits_backward: bool
    incoming: tuple[Route, ...]
    outgoing: tuple[Route, ...]
    asks: tuple[tuple[Action, ...], ...]


def plan_of(schedule: PipelineSchedule, rank: int, op: str) -> Plan:
    """Return what a rank does when the user calls `op`."""
    every = routes(schedule)
    actions = schedule.actions[rank]
    incoming = tuple(route for route in every if route.target == rank)
    return Plan(
        call=Call(op, schedule.microbatches),
        stages=schedule.stages,
        actions=actions,
        splits_backward=schedule.splits_backward,
        incoming=incoming,
        outgoing=tuple(route for route in every if route.source == rank),
        asks=_asks(actions, incoming),
    )


def routes(schedule: PipelineSchedule) -> tuple[Route, ...]:
    """Return the routes between different ranks, in the same order on every rank."""
    found: list[Route] = []
    for kind in (Kind.FORWARD, Kind.BACKWARD):
        for stage, target in enumerate(schedule.rank_of):
            giver = stage - 1 if kind is Kind.FORWARD else stage + 1
            if not 0 <= giver < schedule.stages or schedule.rank_of[giver] == target:
                continue
            source = schedule.rank_of[giver]
            order = tuple(
                action.microbatch
                for action in schedule.actions[source]
                if (action.kind, action.stage) == (kind, giver)
            )
            found.append(Route(kind=kind, stage=stage, source=source, target=target, order=order))
    return tuple(found)


def taker(action: Action, stages: int) -> Action | None:
    """Return the action that takes what this one computes, if one does."""
    if action.kind is Kind.WEIGHT:
        return None
    stage = action.stage + (1 if action.kind is Kind.FORWARD else -1)
    return Action(action.kind, stage, action.microbatch) if 0 <= stage < stages else None


def forward_only(schedule: PipelineSchedule, microbatches: int) -> PipelineSchedule:
    """Return a schedule of forward actions for the stages of another, on the same ranks.

    Each rank goes by microbatch + stage, which grows along every dependency, so nothing waits
    for what comes later.
    """
    actions = tuple(
        tuple(
            Action(Kind.FORWARD, stage, microbatch)
            for stage, microbatch in sorted(
                ((s, m) for s in schedule.stages_of(rank) for m in range(microbatches)),
                key=lambda place: (sum(place), place),
            )
        )
        for rank in range(schedule.ranks)
    )
    return PipelineSchedule(
        name="forward", microbatches=microbatches, rank_of=schedule.rank_of, actions=actions
    )


def _asks(
    actions: tuple[Action, ...], incoming: tuple[Route, ...]
) -> tuple[tuple[Action, ...], ...]:
    """Ask for each message one ahead: no earlier than the one before it is needed."""
    remote = {route.key for route in incoming}
    asks: list[list[Action]] = [[] for _ in actions]
    before = 0
    for position, action in enumerate(actions):
        if (action.kind, action.stage) in remote:
            asks[max(before, position - _ACTIONS_AHEAD)].append(action)
            before = position
    return tuple(map(tuple, asks))
