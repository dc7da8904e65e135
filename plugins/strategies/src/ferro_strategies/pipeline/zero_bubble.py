"""ZB-H1: 1F1B that puts off the gradients of parameters, and fills the wait with them.

    4 ranks, 6 microbatches; a digit is a forward pass, a letter the gradient of its input (a is
    that of 0), a capital that of the parameters

    rank 0  0123...aA4bB5cCdDeEfF
    rank 1  .012..a3bA4cB5dCeDfEF
    rank 2  ..01.a2b3cA4dB5eCfDEF
    rank 3  ...0a1b2c3dA4eB5fCDEF

The stage before waits only for the gradient of the input, so it is sent after half the backward
pass; rank r puts off the other half by r microbatches, for which it has memory left when compared
with rank 0. No rank holds more than rank 0 does with 1F1B, and all wait a third as long as with
1F1B if the three parts take equally long.

Source: Qi et al., "Zero Bubble Pipeline Parallelism", 2023, the schedule ZB-H1. With several
stages per rank, the same is done to interleaved 1F1B.
"""

from __future__ import annotations

from .interleaved import existing, existing_forwards, passes, warm_up
from .schedule import Action, Kind
from .sizes import Sizes


def order(sizes: Sizes, rank: int) -> list[Action]:
    """Return the actions of a rank."""
    forward, backward = passes(sizes, rank)
    weight = [Action(Kind.WEIGHT, action.stage, action.microbatch) for action in backward]
    warm = min(warm_up(sizes, rank), len(forward))
    turns = len(forward) - warm
    actions, ended = forward[:warm], 0
    for turn, action in enumerate(backward):
        actions += [*forward[warm + turn : warm + turn + 1], action]
        if turn >= rank or turn >= turns:  # behind the last forward pass there is time to wait
            actions.append(weight[ended])
            ended += 1
    return existing(sizes, actions + weight[ended:])


def activations(sizes: Sizes, rank: int) -> int:
    """Return the most stage-microbatches that a rank holds: its warm-up, what it puts off, and one.

    With one stage per rank, that is min(m, p) on every one of p ranks, with m microbatches. With
    v stages, it is min(m v, 2 (p - 1) - r + (v - 1) p + 1) on rank r, where microbatches fill
    whole groups; less where they do not.
    """
    return existing_forwards(sizes, warm_up(sizes, rank) + rank + 1)


def idle_steps(sizes: Sizes) -> int | None:
    """Return how often each rank is idle for a forward pass, and for B - W: p - 1 with p ranks.

    B and W are the two parts of a backward pass. None where microbatches are fewer than ranks, or
    do not fill whole groups.
    """
    if sizes.microbatches < sizes.ranks:
        return None
    if sizes.stages_per_rank > 1 and sizes.microbatches % sizes.ranks:
        return None
    return sizes.ranks - 1
