"""Interleaved 1F1B: several stages per rank, and so a shorter wait for the first microbatch.

    2 ranks with 2 stages each (stages 0 and 2, 1 and 3), 4 microbatches; a digit is a forward
    pass, a letter the backward pass (a is that of 0), with a dash at the rank's second stage

    rank 0  0 1 0'1'2 a'3 b'2'a 3'b . c'. d'c d
    rank 1  . 0 1 0'a'1'b'2 a 3 b 2'c'3'd'c d

A rank makes forward passes in rounds: a group of as many microbatches as there are ranks through
its first stage, the same group through its second, and so on; then the next group. Backward
passes go the same way, last stage first. After a warm-up the two take turns.

Source: Narayanan et al., "Efficient Large-Scale Language Model Training on GPU Clusters Using
Megatron-LM", 2021, section 2.2. There microbatches must come in whole groups. Here the last group
is filled up with microbatches that do not exist, whose actions are then left out: what remains is
in an order that was right before, so nobody waits for ever, and holds no more than before.
"""

from __future__ import annotations

from .schedule import Action, Kind
from .sizes import Sizes


def order(sizes: Sizes, rank: int) -> list[Action]:
    """Return the actions of a rank."""
    forward, backward = passes(sizes, rank)
    warm = min(warm_up(sizes, rank), len(forward))
    turns = len(forward) - warm
    actions = forward[:warm]
    for pair in zip(forward[warm:], backward, strict=False):
        actions += pair
    return existing(sizes, actions + backward[turns:])


def activations(sizes: Sizes, rank: int) -> int:
    """Return the most stage-microbatches that a rank holds: its warm-up, and one.

    On rank r of p with v stages each, that is min(m v, 2 (p - r - 1) + (v - 1) p + 1), or
    min(m, p - r) if v is 1, where m microbatches fill whole groups; less where they do not.
    """
    return existing_forwards(sizes, warm_up(sizes, rank) + 1)


def idle_steps(sizes: Sizes) -> int | None:
    """Return for how many forward and backward passes of one stage each rank is idle.

    That is p - 1 with p ranks, where microbatches fill whole groups; None where they do not.
    """
    if sizes.stages_per_rank > 1 and sizes.microbatches % sizes.ranks:
        return None
    return sizes.ranks - 1


def passes(sizes: Sizes, rank: int) -> tuple[list[Action], list[Action]]:
    """Return the forward and the backward passes of a rank, the last group filled up."""
    stages = sizes.stages_of(rank)
    groups = [range(g, g + sizes.ranks) for g in range(0, sizes.microbatches, sizes.ranks)]
    return (
        [Action(Kind.FORWARD, s, m) for group in groups for s in stages for m in group],
        [Action(Kind.BACKWARD, s, m) for group in groups for s in reversed(stages) for m in group],
    )


def warm_up(sizes: Sizes, rank: int) -> int:
    """Return how many forward passes a rank makes before it takes turns."""
    after = sizes.ranks - rank - 1
    if sizes.stages_per_rank == 1:
        return after
    return 2 * after + (sizes.stages_per_rank - 1) * sizes.ranks


def existing(sizes: Sizes, actions: list[Action]) -> list[Action]:
    """Leave out the microbatches that only fill up the last group."""
    return [action for action in actions if action.microbatch < sizes.microbatches]


def existing_forwards(sizes: Sizes, count: int) -> int:
    """Return how many of a rank's first `count` forward passes are of microbatches that exist."""
    total = 0
    for start in range(0, sizes.microbatches, sizes.ranks):
        exist = min(sizes.ranks, sizes.microbatches - start)
        for _ in range(sizes.stages_per_rank):
            total += max(0, min(count, exist))
            count -= sizes.ranks
    return total
