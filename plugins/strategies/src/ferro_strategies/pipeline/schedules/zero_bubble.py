"""ZB-H1: 1F1B that delays the gradients of parameters, and fills the idle time with them.

    4 ranks, 6 microbatches; a digit is a forward pass, a letter the gradient of its input (a is
    that of 0), a capital that of the parameters

    rank 0  0123...aA4bB5cCdDeEfF
    rank 1  .012..a3bA4cB5dCeDfEF
    rank 2  ..01.a2b3cA4dB5eCfDEF
    rank 3  ...0a1b2c3dA4eB5fCDEF

The previous stage waits only for the gradient of the input, so it is sent before the gradients of the parameters are
computed. Rank r delays these by r microbatches, for which it has memory, because it would otherwise hold r microbatches
fewer than rank 0. No rank holds more than rank 0 does with 1F1B, and each is idle for a third of the time of 1F1B if
the three parts take equally long.

Source: Qi et al., "Zero Bubble Pipeline Parallelism", 2023, the schedule ZB-H1. With several
stages per rank, the same is done to interleaved 1F1B.
"""

from __future__ import annotations

from .interleaved import count_real_forwards, padded_passes, warm_up_forwards, without_padding
from .schedule import Action, Kind, ScheduleSizes


def rank_actions(sizes: ScheduleSizes, rank: int) -> list[Action]:
    """Return the actions of a rank, in order."""
    forward, backward = padded_passes(sizes, rank)
    weight = [Action(Kind.WEIGHT, action.stage, action.microbatch) for action in backward]
    warm_up = min(warm_up_forwards(sizes, rank), len(forward))
    pairs = len(forward) - warm_up
    actions, weights_done = forward[:warm_up], 0
    for index, action in enumerate(backward):
        actions += [*forward[warm_up + index : warm_up + index + 1], action]
        if index >= rank or index >= pairs:  # after the last forward pass the rank is idle anyway
            actions.append(weight[weights_done])
            weights_done += 1
    return without_padding(sizes, actions + weight[weights_done:])


def peak_activations(sizes: ScheduleSizes, rank: int) -> int:
    """Return the peak number of activations on a rank: warm-up, delayed backward passes, and one.

    With one stage per rank, that is min(m, p) on every one of p ranks, with m microbatches. With
    v stages, it is min(m v, 2 (p - 1) - r + (v - 1) p + 1) on rank r, where microbatches fill
    whole groups; less where they do not.
    """
    return count_real_forwards(sizes, warm_up_forwards(sizes, rank) + rank + 1)


def idle_steps(sizes: ScheduleSizes) -> int | None:
    """Return n such that each rank is idle for n times the duration F + B - W.

    That is p - 1 with p ranks; B and W are the durations of the two parts of a backward pass. It is None where there
    are fewer microbatches than ranks, or they do not fill whole groups.
    """
    if sizes.microbatches < sizes.ranks:
        return None
    if sizes.stages_per_rank > 1 and sizes.microbatches % sizes.ranks:
        return None
    return sizes.ranks - 1
