"""PassPlan: one rank's part of a pass: its actions, its edges to other ranks, and the start of receives.

An edge connects a stage to the next one, forward or backward, if the two are on different ranks. A message is
identified by the action that needs it: FORWARD of stage 2 takes the output of stage 1, BACKWARD of stage 2 takes the
gradient of stage 3's input.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TypeAlias

from ..schedules.schedule import Action, Kind, PipelineSchedule

STEP = "Pipeline.step"
FORWARD = "Pipeline.forward"
OPS = (STEP, FORWARD)

# A receive starts at most this many actions before the action that needs the message: early enough to end before it,
# late enough that its deadline does not pass while this rank computes.
_ACTIONS_AHEAD = 2

# Kind and stage of the actions that need the messages of an edge.
EdgeKey: TypeAlias = tuple[Kind, int]


@dataclass(frozen=True, slots=True)
class PipelineCall:
    """The method that a user called on all ranks; each message carries it.

    Attributes:
        op: name of the method, one of OPS.
        microbatches: the number of parts of the batch.
    """

    op: str
    microbatches: int

    def __str__(self) -> str:
        return f"{self.op} with microbatches={self.microbatches}"


@dataclass(frozen=True, slots=True, kw_only=True)
class Edge:
    """The messages of one kind to one stage, from a neighbouring stage on another rank.

    Attributes:
        kind: FORWARD for the stage's inputs, BACKWARD for the gradients of its outputs.
        stage: number of the receiving stage.
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
    def key(self) -> EdgeKey:
        """Kind and stage, which no other edge has."""
        return self.kind, self.stage

    def __str__(self) -> str:
        content = "inputs" if self.kind is Kind.FORWARD else "output gradients"
        return f"{content} of stage {self.stage}"


@dataclass(frozen=True, slots=True, kw_only=True)
class PassPlan:
    """The actions and transfers of one rank in one pass.

    Attributes:
        call: the method that all ranks execute.
        stages: number of stages on all ranks.
        actions: this rank's actions, in order.
        splits_backward: see `PipelineSchedule`.
        incoming: the edges that end on this rank.
        outgoing: the edges that begin on this rank.
        receives: for each action, the messages whose receive starts just before it.
    """

    call: PipelineCall
    stages: int
    actions: tuple[Action, ...]
    splits_backward: bool
    incoming: tuple[Edge, ...]
    outgoing: tuple[Edge, ...]
    receives: tuple[tuple[Action, ...], ...]


def make_plan(schedule: PipelineSchedule, rank: int, op: str) -> PassPlan:
    """Make the plan of a rank for a call of `op`."""
    every = edges(schedule)
    actions = schedule.actions[rank]
    incoming = tuple(edge for edge in every if edge.target == rank)
    return PassPlan(
        call=PipelineCall(op, schedule.microbatches),
        stages=schedule.stages,
        actions=actions,
        splits_backward=schedule.splits_backward,
        incoming=incoming,
        outgoing=tuple(edge for edge in every if edge.source == rank),
        receives=_plan_receives(actions, incoming),
    )


def edges(schedule: PipelineSchedule) -> tuple[Edge, ...]:
    """Return the edges between different ranks, in the same order on every rank."""
    found: list[Edge] = []
    for kind in (Kind.FORWARD, Kind.BACKWARD):
        for stage, target in enumerate(schedule.rank_of):
            producer = stage - 1 if kind is Kind.FORWARD else stage + 1
            if not 0 <= producer < schedule.stages or schedule.rank_of[producer] == target:
                continue
            source = schedule.rank_of[producer]
            order = tuple(
                action.microbatch
                for action in schedule.actions[source]
                if (action.kind, action.stage) == (kind, producer)
            )
            found.append(Edge(kind=kind, stage=stage, source=source, target=target, order=order))
    return tuple(found)


def _plan_receives(actions: tuple[Action, ...], incoming: tuple[Edge, ...]) -> tuple[tuple[Action, ...], ...]:
    """Start each receive early, but not before the previous message of the edge has been used."""
    remote = {edge.key for edge in incoming}
    receives: list[list[Action]] = [[] for _ in actions]
    previous = 0
    for position, action in enumerate(actions):
        if (action.kind, action.stage) in remote:
            receives[max(previous, position - _ACTIONS_AHEAD)].append(action)
            previous = position
    return tuple(map(tuple, receives))
