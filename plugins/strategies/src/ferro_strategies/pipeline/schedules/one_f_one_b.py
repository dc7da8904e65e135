"""1F1B: after a warm-up, forward and backward passes alternate.

    4 ranks, 6 microbatches; a digit is a forward pass, a letter the backward pass (a is that of 0)

    rank 0  0123...a4b5c.d.e.f
    rank 1  .012..a3b4c5d.e.f
    rank 2  ..01.a2b3c4d5e.f
    rank 3  ...0a1b2c3d4e5f

1F1B is as fast as GPipe, but a rank holds the activations of few microbatches, however many there are.

Source: Narayanan et al., "PipeDream: Generalized Pipeline Parallelism for DNN Training", 2019;
with flushes as in "Memory-Efficient Pipeline-Parallel DNN Training", 2021.

If a forward pass takes as long as a backward pass, and microbatches enter every two steps, then
with S stages

    forward of stage s, microbatch m     at step  s + 2 m
    backward of stage s, microbatch m    at step  2 S - 1 - s + 2 m

and each stage has 1F1B's order. A rank with several stages merges their orders by these steps:
the inputs of an action are computed at earlier steps, so no rank waits for ever.
"""

from __future__ import annotations

from .schedule import Action, Kind, ScheduleSizes


def rank_actions(sizes: ScheduleSizes, rank: int) -> list[Action]:
    """Return the actions of a rank, in order."""
    timed = [
        item
        for stage in sizes.stages_of(rank)
        for m in range(sizes.microbatches)
        for item in (
            # Within one step the backward pass comes first, which frees memory, and the later
            # stage comes first, on all ranks alike, so that messages arrive in the order in
            # which they are needed.
            (_backward_step(sizes, stage, m), 0, -stage, m),
            (_forward_step(stage, m), 1, -stage, m),
        )
    ]
    kinds = (Kind.BACKWARD, Kind.FORWARD)
    return [Action(kinds[index], -stage, m) for _, index, stage, m in sorted(timed)]


def peak_activations(sizes: ScheduleSizes, rank: int) -> int:
    """Return the peak number of activations on a rank.

    With one stage per rank, that is min(m, p - r) on rank r of p, with m microbatches. With
    several it is at most the sum of min(m, S - s) over its stages s of S. It is found by counting:
    the microbatches that have gone forward by some step, less those that have gone backward.
    """
    steps = range(_backward_step(sizes, 0, sizes.microbatches - 1))
    return max(sum(_held(sizes, stage, step) for stage in sizes.stages_of(rank)) for step in steps)


def idle_steps(sizes: ScheduleSizes) -> int | None:
    """Return the number of forward and backward passes that fit into each rank's idle time.

    That is p - 1 with p ranks and one stage on each; no formula is known for more.
    """
    return sizes.ranks - 1 if sizes.stages_per_rank == 1 else None


def _forward_step(stage: int, microbatch: int) -> int:
    return stage + 2 * microbatch


def _backward_step(sizes: ScheduleSizes, stage: int, microbatch: int) -> int:
    return 2 * sizes.stages - 1 - stage + 2 * microbatch


def _held(sizes: ScheduleSizes, stage: int, step: int) -> int:
    """Count the microbatches that a stage holds at the end of a step."""
    forward = (step - _forward_step(stage, 0)) // 2 + 1
    backward = (step - _backward_step(sizes, stage, 0)) // 2 + 1
    return _clamp(forward, sizes.microbatches) - _clamp(backward, sizes.microbatches)


def _clamp(count: int, most: int) -> int:
    return min(max(count, 0), most)
