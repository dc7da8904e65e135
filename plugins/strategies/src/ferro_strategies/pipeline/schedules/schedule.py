"""PipelineSchedule: the actions of each rank of a pipeline, in order, as data.

A schedule does not list messages, because they follow from the actions. A forward action needs the output of the same
microbatch from the stage before, a backward action needs the gradient from the stage after; if that stage is on another
rank, its rank sends the array.
"""

from __future__ import annotations

import enum
from dataclasses import dataclass


class Kind(enum.StrEnum):
    """Kind of an action: what it computes for one stage and one microbatch."""

    FORWARD = "F"  # the stage's output
    BACKWARD = "B"  # the gradient of its input, and those of its parameters unless WEIGHT computes them
    WEIGHT = "W"  # the gradients of its parameters, where the schedule splits the backward pass


_WORDS = {
    Kind.FORWARD: "the forward pass",
    Kind.BACKWARD: "the backward pass",
    Kind.WEIGHT: "the parameters' gradients",
}


@dataclass(frozen=True, slots=True)
class Action:
    """One computation of a rank.

    Attributes:
        kind: forward, backward, or parameters' gradients.
        stage: number of the stage, 0 to stages - 1.
        microbatch: number of the microbatch, 0 to microbatches - 1.
    """

    kind: Kind
    stage: int
    microbatch: int

    def __str__(self) -> str:
        return f"{_WORDS[self.kind]} of stage {self.stage}, microbatch {self.microbatch}"


@dataclass(frozen=True, slots=True, kw_only=True)
class PipelineSchedule:
    """The actions of all ranks.

    Attributes:
        name: the name that users give, such as "1f1b".
        microbatches: number of microbatches.
        rank_of: the rank of each stage, first to last.
        actions: for each rank, its actions in order.
        splits_backward: whether separate WEIGHT actions compute the gradients of the parameters.
    """

    name: str
    microbatches: int
    rank_of: tuple[int, ...]
    actions: tuple[tuple[Action, ...], ...]
    splits_backward: bool = False

    @property
    def stages(self) -> int:
        """Number of stages."""
        return len(self.rank_of)

    @property
    def ranks(self) -> int:
        """Number of ranks."""
        return len(self.actions)

    @property
    def last_kind(self) -> Kind:
        """Kind of the action after which a stage no longer holds a microbatch's activations."""
        return Kind.WEIGHT if self.splits_backward else Kind.BACKWARD

    def stages_of(self, rank: int) -> tuple[int, ...]:
        """Return the stages of a rank, first to last."""
        return tuple(stage for stage, owner in enumerate(self.rank_of) if owner == rank)


@dataclass(frozen=True, slots=True, kw_only=True)
class ScheduleSizes:
    """The three numbers that a named schedule is built from; stage s is on rank s % ranks.

    Attributes:
        ranks: number of ranks.
        stages_per_rank: number of stages on each rank.
        microbatches: number of microbatches.
    """

    ranks: int
    stages_per_rank: int
    microbatches: int

    @property
    def stages(self) -> int:
        """Number of stages."""
        return self.ranks * self.stages_per_rank

    def stages_of(self, rank: int) -> range:
        """Return the stages of a rank, first to last."""
        return range(rank, self.stages, self.ranks)
