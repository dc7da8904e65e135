"""One rank of the pipeline benchmark: the idle share of a step, beside what its schedule says.

`run.py` starts it with `ferro run`. Each rank first computes its stages' actions by themselves,
all ranks at once, so that they share the machine as they do in a step: that gives the durations
of the forward pass (and the loss, behind the last stage), of the backward pass and of its put-off
part. From these `simulate` says how long a step takes and which part of it a rank waits, if
messages took no time and all stages as long. Measured are how long a step takes, and in which
share of it the ranks do not compute (`Pipeline.busy_s`).

The stages are perceptrons in one thread ("arithmetic"), with as many multiplications for each
number sent on as a transformer's block has; or, for more ranks than this machine has cores, they
wait instead of computing, as a process does whose device computes ("device").
"""

from __future__ import annotations

import argparse
import json
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np

import ferro
from ferro_strategies import Pipeline, nn
from ferro_strategies.pipeline.schedules.timeline import simulate

_WIDTH, _DEPTH = 768, 12
_DEVICE_S = 0.02
_TURNS = 3
_SAMPLES = 2  # of each action by itself, in each turn


class Device(nn.Module):
    """Takes its time, in both directions, and changes nothing."""

    def vjp(self, x: nn.Array) -> tuple[nn.Array, nn.Pullback]:
        """Wait; the pullback waits twice as long."""
        time.sleep(_DEVICE_S)

        def pullback(grad_y: nn.Array) -> nn.Array:
            time.sleep(2 * _DEVICE_S)
            return grad_y

        return x, pullback


def make_stage(kind: str) -> nn.Module:
    """Return a stage; all are alike, so that no rank is slower than others."""
    if kind == "device":
        return Device()
    layers: list[nn.Module] = []
    for index in range(_DEPTH):
        layers += [nn.Linear(_WIDTH, _WIDTH, rng=index), nn.ReLU()]
    return nn.Sequential(*layers)


def measure(
    group: ferro.ProcessGroup,
    kind: str,
    name: str,
    *,
    stages_per_rank: int,
    microbatches: int,
    rows: int,
) -> dict[str, object]:
    """Return durations of the actions, and bubble and step time as simulated and as measured."""
    stages = [make_stage(kind) for _ in range(stages_per_rank)]
    pipeline = Pipeline(stages, group, schedule=name, microbatches=microbatches)
    schedule = pipeline.schedule
    scores = group.rank == group.world_size - 1
    x = np.random.default_rng(0).standard_normal((rows * microbatches, _WIDTH), np.float32)
    steps: list[tuple[float, float]] = []
    durations: list[tuple[float, float, float]] = []
    for turn in range(-1, _TURNS):
        group.barrier()
        own = _durations(stages, x[:rows], split=schedule.splits_backward, scores=scores)
        group.barrier()
        start = time.perf_counter()
        pipeline.step(x, x, nn.mse_loss)
        group.barrier()
        if turn >= 0:
            steps.append((time.perf_counter() - start, pipeline.busy_s))
            durations.append(own)
        pipeline.zero_grad()
    everyones = group.all_gather(np.median(durations, axis=0)[None])
    forward, backward, weight = everyones.mean(axis=0).tolist()
    timeline = simulate(
        schedule,
        forward=forward,
        backward=backward + weight,
        weight=weight if schedule.splits_backward else None,
    )
    step, busy = group.all_reduce(np.median(steps, axis=0), "mean").tolist()
    return {
        "schedule": name,
        "kind": kind,
        "ranks": group.world_size,
        "stages_per_rank": stages_per_rank,
        "microbatches": microbatches,
        "action_s": {"forward": forward, "backward": backward, "weight": weight},
        "simulated": {"step_s": timeline.makespan, "bubble": timeline.bubble_fraction},
        "measured": {"step_s": step, "bubble": 1 - busy / step},
        "peak_activations": pipeline.peak_activations,
    }


def _durations(
    stages: list[nn.Module], x: nn.Array, *, split: bool, scores: bool
) -> tuple[float, float, float]:
    """Return the mean seconds of a forward action, a backward one, and of its put-off part."""
    totals = np.zeros(3)
    for _ in range(_SAMPLES):
        for stage in stages:
            start = time.perf_counter()
            y, pullback = stage.vjp(x)
            if scores and stage is stages[-1]:
                nn.mse_loss(y, x)
            forward = time.perf_counter()
            products: list[Callable[[], None]] = []
            if split:
                with nn.deferring(stage.parameters()) as products:
                    pullback(y)
            else:
                pullback(y)
            backward = time.perf_counter()
            for product in products:
                product()
            totals += np.diff([start, forward, backward, time.perf_counter()])
    totals /= _SAMPLES * len(stages)
    for stage in stages:
        stage.zero_grad()
    return tuple(totals.tolist())


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--out", type=Path, required=True, help="JSON file that rank 0 writes")
    parser.add_argument("--kind", choices=("arithmetic", "device"), default="arithmetic")
    parser.add_argument("--microbatches", default="4,8")
    parser.add_argument("--rows", type=int, default=512, help="of a microbatch")
    options = parser.parse_args()
    schedules = [("gpipe", 1), ("1f1b", 1), ("interleaved_1f1b", 2)]
    schedules += [("zb_h1", 1)] if options.kind == "arithmetic" else []
    with ferro.init("gloo") as group:
        records = [
            measure(
                group,
                options.kind,
                name,
                stages_per_rank=stages_per_rank,
                microbatches=int(count),
                rows=options.rows,
            )
            for name, stages_per_rank in schedules
            for count in options.microbatches.split(",")
        ]
        if group.rank == 0:
            options.out.write_text(json.dumps({"records": records}, indent=1))


if __name__ == "__main__":
    main()
