"""One rank of the DDP benchmark: memory of a training step, and its time beside torch's DDP.

`run.py` starts it with `ferro run -n 2`, once for memory and once for time, for tracing
allocations slows everything down.

Memory. NumPy reports its arrays to tracemalloc. Tracing starts before the model is made; the peak
is taken over whole steps after the first, so it is what training needs, and compared with what
must be there: parameters, gradients (once, in the buckets), the optimizer's state, and the
activations that one pass keeps (counted: the bytes alive after `vjp` that were not before it).
The rest is working memory: temporaries of the arithmetic, segments being received.

Time. The same multilayer perceptron, batch, loss and optimizer in both libraries, one thread for
arithmetic each; blocks of steps take turns in the same processes. A step takes as long as on the
slowest rank. NumPy's and torch's matrix products come from different libraries, so this compares
whole training steps; "alone" are ferro's without DDP, so the difference is what DDP costs.
"""

from __future__ import annotations

import argparse
import json
import time
import tracemalloc
from collections.abc import Callable
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path

import numpy as np
import numpy.typing as npt

import ferro
from ferro_strategies import DDP
from ferro_strategies.nn import Linear, ReLU, Sequential, cross_entropy
from ferro_strategies.optim import SGD

_BATCH = 64
_CLASSES = 10
_STEPS_IN_BLOCK = 3
_LR, _MOMENTUM = 0.01, 0.9

Step = Callable[[], float]


@dataclass(frozen=True, slots=True)
class Batch:
    """This rank's part of the data, the same in every step."""

    x: npt.NDArray[np.float32]
    labels: npt.NDArray[np.int64]

    @classmethod
    def make(cls, rank: int, features: int) -> Batch:
        """Return random data of its own for a rank."""
        random = np.random.default_rng(rank)
        x = random.standard_normal((_BATCH, features), np.float32)
        return cls(x, random.integers(0, _CLASSES, _BATCH))


class FerroTraining:
    """A perceptron of the given widths, under ferro's DDP or, without a group, each rank alone."""

    def __init__(self, widths: list[int], batch: Batch, group: ferro.ProcessGroup | None) -> None:
        layers = []
        for wide, narrow in pairwise(widths):
            layers += [Linear(wide, narrow), ReLU()]
        perceptron = Sequential(*layers[:-1])
        self.model = perceptron if group is None else DDP(perceptron, group)
        self.optimizer = SGD(self.model.parameters(), lr=_LR, momentum=_MOMENTUM)
        self.activation_bytes = 0
        self._batch = batch

    def step(self) -> float:
        """Train on the batch once; return the loss."""
        before = _traced()
        logits, pullback = self.model.vjp(self._batch.x)
        self.activation_bytes = _traced() - before
        loss, grad = cross_entropy(logits, self._batch.labels)
        pullback(grad)
        self.optimizer.step()
        self.optimizer.zero_grad()
        return float(loss)

    @property
    def parameter_bytes(self) -> int:
        """Size of all parameters."""
        return sum(p.data.nbytes for p in self.model.parameters())


def torch_step(widths: list[int], batch: Batch) -> Step:
    """Return the same training step under torch's DDP; torch's process group must be open."""
    import torch
    from torch.nn.parallel import DistributedDataParallel

    layers: list[torch.nn.Module] = []
    for wide, narrow in pairwise(widths):
        layers += [torch.nn.Linear(wide, narrow), torch.nn.ReLU()]
    model = DistributedDataParallel(torch.nn.Sequential(*layers[:-1]))
    optimizer = torch.optim.SGD(model.parameters(), lr=_LR, momentum=_MOMENTUM)
    x, labels = torch.from_numpy(batch.x), torch.from_numpy(batch.labels)

    def step() -> float:
        loss = torch.nn.functional.cross_entropy(model(x), labels)
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        return loss.item()

    return step


def _open_torch() -> None:
    """Open torch's process group over gloo, with one thread for arithmetic."""
    import torch
    import torch.distributed

    torch.set_num_threads(1)
    torch.distributed.init_process_group("gloo")


def _close_torch() -> None:
    import torch.distributed

    torch.distributed.destroy_process_group()


def memory(widths: list[int], group: ferro.ProcessGroup, steps: int) -> dict[str, object]:
    """Return what a step needs at its peak on this rank, and what must be there, in bytes."""
    batch = Batch.make(group.rank, widths[0])
    tracemalloc.start()
    before = _traced()
    training = FerroTraining(widths, batch, group)
    construction = tracemalloc.get_traced_memory()[1] - before
    losses = [training.step()]
    tracemalloc.reset_peak()
    losses += [training.step() for _ in range(steps)]
    peak = tracemalloc.get_traced_memory()[1] - before
    tracemalloc.stop()
    _check(losses)
    parameters = training.parameter_bytes
    parts = {
        "parameters": parameters,
        "gradients": parameters,
        "optimizer_state": parameters,  # the momentum
        "activations": training.activation_bytes,
    }
    return {
        "parts": parts,
        "expected_bytes": sum(parts.values()),
        "peak_bytes": peak,
        "construction_peak_bytes": construction,
        "ratio": peak / sum(parts.values()),
    }


def times(
    widths: list[int], group: ferro.ProcessGroup, rounds: int, *, with_torch: bool
) -> dict[str, object]:
    """Return the seconds of a step in each library and without DDP; blocks of steps take turns."""
    batch = Batch.make(group.rank, widths[0])
    steps: dict[str, Step] = {
        "ferro": FerroTraining(widths, batch, group).step,
        "alone": FerroTraining(widths, batch, None).step,
    }
    if with_torch:
        _open_torch()
        steps["torch"] = torch_step(widths, batch)
    seconds: dict[str, list[float]] = {name: [] for name in steps}
    losses: dict[str, list[float]] = {name: [] for name in steps}
    for turn in range(-1, rounds):
        for name in steps if turn % 2 else reversed(steps):
            group.barrier()
            for _ in range(_STEPS_IN_BLOCK):
                start = time.perf_counter()
                losses[name].append(steps[name]())
                if turn >= 0:
                    seconds[name].append(time.perf_counter() - start)
    record: dict[str, object] = {}
    for name, own in seconds.items():
        _check(losses[name])
        slowest = group.all_reduce(np.array(own), "max")
        record[name] = {"median_s": float(np.median(slowest)), "min_s": float(slowest.min())}
    if with_torch:
        _close_torch()
        record["ratio"] = record["torch"]["median_s"] / record["ferro"]["median_s"]
    return record


def _check(losses: list[float]) -> None:
    if not losses[-1] < losses[0]:
        raise ArithmeticError(f"the loss did not fall: {losses[0]} at first, {losses[-1]} at last")


def _traced() -> int:
    return tracemalloc.get_traced_memory()[0]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("what", choices=("memory", "times"))
    parser.add_argument("--out", type=Path, required=True, help="JSON file that rank 0 writes")
    parser.add_argument("--widths", default="784,2048,2048,2048,10", help="of the layers")
    parser.add_argument("--rounds", type=int, required=True)
    parser.add_argument("--without-torch", action="store_true")
    options = parser.parse_args()
    widths = [int(text) for text in options.widths.split(",")]
    # tracemalloc sees no shared memory: what is traced must be ordinary.
    backend_options = {"shared_memory": options.what != "memory"}
    with ferro.init("gloo", backend_options=backend_options) as group:
        if options.what == "memory":
            record = memory(widths, group, options.rounds)
        else:
            record = times(widths, group, options.rounds, with_torch=not options.without_torch)
        if group.rank == 0:
            setting = {"widths": widths, "batch": _BATCH, "ranks": group.world_size}
            options.out.write_text(json.dumps(setting | record, indent=1))


if __name__ == "__main__":
    main()
