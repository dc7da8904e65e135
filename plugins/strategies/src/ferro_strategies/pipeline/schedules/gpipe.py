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

from .schedule import Action, Kind, ScheduleSizes


def rank_actions(sizes: ScheduleSizes, rank: int) -> list[Action]:
    """Return the actions of a rank, in order."""
    microbatches, stages = range(sizes.microbatches), sizes.stages_of(rank)
    forward = [Action(Kind.FORWARD, s, m) for s in stages for m in microbatches]
    return forward + [Action(Kind.BACKWARD, s, m) for s in reversed(stages) for m in microbatches]


def peak_activations(sizes: ScheduleSizes, rank: int) -> int:
    """Return the peak number of activations on a rank: every microbatch in every stage of the rank."""
    del rank  # all ranks are alike
    return sizes.stages_per_rank * sizes.microbatches


def idle_steps(sizes: ScheduleSizes) -> int | None:
    """Return the number of forward and backward passes that fit into each rank's idle time.

    That is p - 1 with p ranks, as long as a rank's second stage need not wait for the first
    microbatch to come round; None otherwise.
    """
    if sizes.stages_per_rank > 1 and sizes.microbatches < sizes.ranks:
        return None
    return sizes.ranks - 1
