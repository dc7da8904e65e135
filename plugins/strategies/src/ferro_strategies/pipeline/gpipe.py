"""GPipe: all forward passes, then all backward passes.

    4 ranks, 4 microbatches; a digit is a forward pass, a letter the backward pass (a is that of 0)

    rank 0  0123......abcd
    rank 1  .0123....abcd
    rank 2  ..0123..abcd
    rank 3  ...0123abcd

Source: Huang et al., "GPipe: Efficient Training of Giant Neural Networks using Pipeline
Parallelism", 2019. There the last microbatch goes backward first, here the first one does, which
takes as long. With several stages per rank, all microbatches go through the first before any
goes through the second (breadth first: Lamy-Poirier, "Breadth-First Pipeline Parallelism", 2022).
"""

from __future__ import annotations

from .schedule import Action, Kind
from .sizes import Sizes


def order(sizes: Sizes, rank: int) -> list[Action]:
    """Return the actions of a rank."""
    microbatches, stages = range(sizes.microbatches), sizes.stages_of(rank)
    forward = [Action(Kind.FORWARD, s, m) for s in stages for m in microbatches]
    return forward + [Action(Kind.BACKWARD, s, m) for s in reversed(stages) for m in microbatches]


def activations(sizes: Sizes, rank: int) -> int:
    """Return the most stage-microbatches that a rank holds: all of them."""
    del rank  # all alike
    return sizes.stages_per_rank * sizes.microbatches


def idle_steps(sizes: Sizes) -> int | None:
    """Return for how many forward and backward passes of one stage each rank is idle.

    That is p - 1 with p ranks, as long as a rank's second stage need not wait for the first
    microbatch to come round; None otherwise.
    """
    if sizes.stages_per_rank > 1 and sizes.microbatches < sizes.ranks:
        return None
    return sizes.ranks - 1
