"""PipelineSchedule: what each rank of a pipeline computes, in what order, as data.

Communication is not written down: it follows. A forward action needs the output of the same
microbatch from the stage before, a backward action the gradient from the stage after; where
these stages are on other ranks, the one that computes sends.
"""

from __future__ import annotations

import enum
from dataclasses import dataclass


class Kind(enum.StrEnum):
    """What an action computes for one stage and one microbatch."""

    FORWARD = "F"  # the stage's output
    BACKWARD = "B"  # the gradient of its input; that of its parameters too, unless split
    WEIGHT = "W"  # the gradient of its parameters, where the schedule splits the backward pass


@dataclass(frozen=True, slots=True)
class Action:
    """One thing that a rank computes.

    Attributes:
        kind: what.
        stage: for which stage, 0 to stages - 1.
        microbatch: for which microbatch, 0 to microbatches - 1.
    """

    kind: Kind
    stage: int
    microbatch: int


@dataclass(frozen=True, slots=True, kw_only=True)
class PipelineSchedule:
    """The actions of all ranks.

    Attributes:
        name: what users call it, such as "1f1b".
        microbatches: how many.
        rank_of: the rank of each stage, first to last.
        actions: for each rank, its actions in order.
        splits_backward: whether WEIGHT actions are apart from BACKWARD ones.
    """

    name: str
    microbatches: int
    rank_of: tuple[int, ...]
    actions: tuple[tuple[Action, ...], ...]
    splits_backward: bool = False

    @property
    def stages(self) -> int:
        """How many stages there are."""
        return len(self.rank_of)

    @property
    def ranks(self) -> int:
        """How many ranks there are."""
        return len(self.actions)

    def stages_of(self, rank: int) -> tuple[int, ...]:
        """Return the stages of a rank, first to last."""
        return tuple(stage for stage, owner in enumerate(self.rank_of) if owner == rank)
