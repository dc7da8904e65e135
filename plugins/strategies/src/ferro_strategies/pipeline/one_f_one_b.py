"""1F1B: after a warm-up, one forward pass, one backward pass, and so on in turn.

    4 ranks, 6 microbatches; a digit is a forward pass, a letter the backward pass (a is that of 0)

    rank 0  0123...a4b5c.d.e.f
    rank 1  .012..a3b4c5d.e.f
    rank 2  ..01.a2b3c4d5e.f
    rank 3  ...0a1b2c3d4e5f

As fast as GPipe, but a rank holds few activations, however many microbatches there are.

Source: Narayanan et al., "PipeDream: Generalized Pipeline Parallelism for DNN Training", 2019;
with flushes as in "Memory-Efficient Pipeline-Parallel DNN Training", 2021.

Were a forward pass as long as a backward pass, and microbatches let in one every two steps, then
with S stages

    forward of stage s, microbatch m     at step  s + 2 m
    backward of stage s, microbatch m    at step  2 S - 1 - s + 2 m

and each stage does them in 1F1B's order. With several stages per rank, a rank merges their orders
by these steps: whatever an action needs comes at an earlier step, so nobody waits for ever.
"""

from __future__ import annotations

from .schedule import Action, Kind
from .sizes import Sizes


def order(sizes: Sizes, rank: int) -> list[Action]:
    """Return the actions of a rank."""
    timed = [
        item
        for stage in sizes.stages_of(rank)
        for m in range(sizes.microbatches)
        for item in (
            # Of one step: backward first, which frees memory; and the later stage first, on all
            # ranks alike, so that messages arrive in the order in which they are needed.
            (_backward_step(sizes, stage, m), 0, -stage, m),
            (_forward_step(stage, m), 1, -stage, m),
        )
    ]
    kinds = (Kind.BACKWARD, Kind.FORWARD)
    return [Action(kinds[which], -stage, m) for _, which, stage, m in sorted(timed)]


def activations(sizes: Sizes, rank: int) -> int:
    """Return the most stage-microbatches that a rank holds.

    With one stage per rank, that is min(m, p - r) on rank r of p, with m microbatches. With
    several it is at most the sum of min(m, S - s) over its stages s of S, and found by counting:
    those that have gone forward by some step, less those that have gone backward.
    """
    steps = range(_backward_step(sizes, 0, sizes.microbatches - 1))
    return max(sum(_held(sizes, stage, step) for stage in sizes.stages_of(rank)) for step in steps)


def idle_steps(sizes: Sizes) -> int | None:
    """Return for how many forward and backward passes of one stage each rank is idle.

    That is p - 1 with p ranks and one stage on each; no formula is known for more.
    """
    return sizes.ranks - 1 if sizes.stages_per_rank == 1 else None


def _forward_step(stage: int, microbatch: int) -> int:
    return stage + 2 * microbatch


def _backward_step(sizes: Sizes, stage: int, microbatch: int) -> int:
    return 2 * sizes.stages - 1 - stage + 2 * microbatch


def _held(sizes: Sizes, stage: int, step: int) -> int:
    """Return how many microbatches a stage holds at the end of a step."""
    forward = (step - _forward_step(stage, 0)) // 2 + 1
    backward = (step - _backward_step(sizes, stage, 0)) // 2 + 1
    return _between(forward, sizes.microbatches) - _between(backward, sizes.microbatches)


def _between(count: int, most: int) -> int:
    return min(max(count, 0), most)
