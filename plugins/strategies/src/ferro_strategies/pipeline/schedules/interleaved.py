"""Interleaved 1F1B: several stages per rank, and so a shorter wait for the first microbatch.

    2 ranks with 2 stages each (stages 0 and 2, 1 and 3), 4 microbatches; a digit is a forward
    pass, a letter the backward pass (a is that of 0), with a dash at the rank's second stage

    rank 0  0 1 0'1'2 a'3 b'2'a 3'b . c'. d'c d
    rank 1  . 0 1 0'a'1'b'2 a 3 b 2'c'3'd'c d

A rank runs forward passes by groups of as many microbatches as there are ranks: one group through its first stage, then
the same group through its second stage, and so on; then the next group. Backward passes go the same way, last stage
first. After a warm-up, forward and backward passes alternate.

Source: Narayanan et al., "Efficient Large-Scale Language Model Training on GPU Clusters Using Megatron-LM", 2021,
    section 2.2. There the number of microbatches must be a multiple of the group size. Here the last group is padded
    with microbatches that do not exist, whose actions are then left out. The other actions keep their order, so no rank
    can deadlock or hold more than with the padding.
"""

from __future__ import annotations

from .schedule import Action, Kind, ScheduleSizes


def rank_actions(sizes: ScheduleSizes, rank: int) -> list[Action]:
    """Return the actions of a rank, in order."""
    forward, backward = padded_passes(sizes, rank)
    warm_up = min(warm_up_forwards(sizes, rank), len(forward))
    pairs = len(forward) - warm_up
    actions = forward[:warm_up]
    for pair in zip(forward[warm_up:], backward, strict=False):
        actions += pair
    return without_padding(sizes, actions + backward[pairs:])


def peak_activations(sizes: ScheduleSizes, rank: int) -> int:
    """Return the peak number of activations on a rank: one more than its warm-up has forward passes.

    On rank r of p with v stages each, that is min(m v, 2 (p - r - 1) + (v - 1) p + 1), or
    min(m, p - r) if v is 1, where m microbatches fill whole groups; less where they do not.
    """
    return count_real_forwards(sizes, warm_up_forwards(sizes, rank) + 1)


def idle_steps(sizes: ScheduleSizes) -> int | None:
    """Return the number of forward and backward passes that fit into each rank's idle time.

    That is p - 1 with p ranks, where microbatches fill whole groups; None where they do not.
    """
    if sizes.stages_per_rank > 1 and sizes.microbatches % sizes.ranks:
        return None
    return sizes.ranks - 1


def padded_passes(sizes: ScheduleSizes, rank: int) -> tuple[list[Action], list[Action]]:
    """Return the forward and the backward passes of a rank, with the last group padded."""
    stages = sizes.stages_of(rank)
    groups = [range(g, g + sizes.ranks) for g in range(0, sizes.microbatches, sizes.ranks)]
    return (
        [Action(Kind.FORWARD, s, m) for group in groups for s in stages for m in group],
        [Action(Kind.BACKWARD, s, m) for group in groups for s in reversed(stages) for m in group],
    )


def warm_up_forwards(sizes: ScheduleSizes, rank: int) -> int:
    """Return the number of forward passes that a rank runs before its first backward pass."""
    ranks_after = sizes.ranks - rank - 1
    if sizes.stages_per_rank == 1:
        return ranks_after
    return 2 * ranks_after + (sizes.stages_per_rank - 1) * sizes.ranks


def without_padding(sizes: ScheduleSizes, actions: list[Action]) -> list[Action]:
    """Leave out the microbatches that only pad the last group."""
    return [action for action in actions if action.microbatch < sizes.microbatches]


def count_real_forwards(sizes: ScheduleSizes, count: int) -> int:
    """Count the passes that are no padding among a rank's first `count` forward passes."""
    total = 0
    for start in range(0, sizes.microbatches, sizes.ranks):
        real = min(sizes.ranks, sizes.microbatches - start)
        for _ in range(sizes.stages_per_rank):
            total += max(0, min(count, real))
            count -= sizes.ranks
    return total
