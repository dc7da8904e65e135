"""One rank of the pipeline benchmark: the idle share of a step, measured and simulated.

`run.py` starts it with `ferro run`. Each rank first runs its stages' actions outside a step, all
ranks at once, so that they share the machine as they do in a step. This gives the durations of the
forward pass (with the loss, on the last stage), of the backward pass and of its deferred part. From
these `simulate` computes the duration of a step and its idle share, if messages take no time and
all stages take equally long. The benchmark measures the duration of a step, and the share of it in
which the ranks do not compute (`Pipeline.busy_s`).

The stages are perceptrons in one thread ("arithmetic"), with as many multiplications for each
number that is sent as a transformer's block has. For more ranks than this machine has cores, they
wait instead, as a process does while its device computes ("device").
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

_DEPTH = 12
_DEVICE_S = 0.02
_TURNS = 3
_WARM_UPS = 3  # from the third step on, the messages between stages go through persistent operations
_SAMPLES = 2  # runs of each action outside a step, in each turn


class Device(nn.Module):
    """A layer that waits in both directions, and changes nothing."""

    def vjp(self, x: nn.Array) -> tuple[nn.Array, nn.Pullback]:
        """Wait, and return the input; the pullback waits twice as long."""
        time.sleep(_DEVICE_S)

        def pullback(grad_y: nn.Array) -> nn.Array:
            time.sleep(2 * _DEVICE_S)
            return grad_y

        return x, pullback


def make_stage(kind: str, width: int) -> nn.Module:
    """Return a stage; all stages are alike, so that no rank is slower than others."""
    if kind == "device":
        return Device()
    layers: list[nn.Module] = []
    for index in range(_DEPTH):
        layers += [nn.Linear(width, width, rng=index), nn.ReLU()]
    return nn.Sequential(*layers)


def measure(
    group: ferro.ProcessGroup, kind: str, name: str, *, stages_per_rank: int, microbatches: int, rows: int, width: int
) -> dict[str, object]:
    """Measure the durations of actions and steps; return them beside the simulated step."""
    stages = [make_stage(kind, width) for _ in range(stages_per_rank)]
    pipeline = Pipeline(stages, group, schedule=name, microbatches=microbatches)
    schedule = pipeline.schedule
    has_loss = group.rank == group.world_size - 1
    x = np.random.default_rng(0).standard_normal((rows * microbatches, width), np.float32)
    steps: list[tuple[float, float]] = []
    durations: list[tuple[float, float, float]] = []
    for turn in range(-_WARM_UPS, _TURNS):
        group.barrier()
        own = _durations(stages, x[:rows], split=schedule.splits_backward, has_loss=has_loss)
        group.barrier()
        start = time.perf_counter()
        pipeline.step(x, x, nn.mse_loss)
        group.barrier()
        if turn >= 0:
            steps.append((time.perf_counter() - start, pipeline.busy_s))
            durations.append(own)
        pipeline.zero_grad()
    medians = group.all_gather(np.median(durations, axis=0)[None])
    forward, backward, weight = medians.mean(axis=0).tolist()
    timeline = simulate(
        schedule, forward=forward, backward=backward + weight, weight=weight if schedule.splits_backward else None
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


def _durations(stages: list[nn.Module], x: nn.Array, *, split: bool, has_loss: bool) -> tuple[float, float, float]:
    """Return the mean seconds of a forward action, a backward action, and its deferred part."""
    totals = np.zeros(3)
    for _ in range(_SAMPLES):
        for stage in stages:
            start = time.perf_counter()
            y, pullback = stage.vjp(x)
            if has_loss and stage is stages[-1]:
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
    parser.add_argument("--width", type=int, default=768, help="of a stage's layers")
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
                width=options.width,
            )
            for name, stages_per_rank in schedules
            for count in options.microbatches.split(",")
        ]
        if group.rank == 0:
            options.out.write_text(json.dumps({"records": records}, indent=1))


if __name__ == "__main__":
    main()
