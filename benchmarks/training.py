"""One rank of the training benchmarks: memory of a step, and its time beside torch's strategies.

`run.py` starts it with `ferro run`, once for memory and once for time, because tracing allocations
slows down every step.

Memory. NumPy reports its arrays to tracemalloc. Tracing starts before the model is made, and the
peak is taken over whole steps after the first. It is compared with the bytes that training needs:
parameters, gradients, the optimizer's state (for FSDP this rank's share of each, and two gathered
units), and the activations that one pass keeps (the growth of allocated bytes during `vjp`). The
rest is working memory: temporaries of the arithmetic, and segments being received.

Time. Both libraries train the same multilayer perceptron with the same batch, loss and optimizer,
and with one thread for arithmetic. Blocks of steps take turns in the same processes. The time of a
step is that of its slowest rank. "alone" is a step without a strategy, "torch-alone" torch's: the
arithmetic. The matrix products of NumPy and torch come from different libraries, so the times of the
two cannot be compared; what a strategy adds to its own library's "alone" can.

With --observed an observer records how long a strategy's collectives ran; the part of that by which a
step is not longer than "alone" was hidden behind the arithmetic. Observed collectives take the longer way
through the group, so the times are measured in a run without it.
"""

from __future__ import annotations

import argparse
import gc
import json
import time
import tracemalloc
from collections.abc import Callable
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

import ferro
from ferro_strategies import DDP, FSDP
from ferro_strategies.nn import Linear, Module, ReLU, Sequential, cross_entropy
from ferro_strategies.optim import SGD, AdamW

_CLASSES = 10
_STEPS_IN_BLOCK = 2
_LR = {"sgd": 1e-3, "adamw": 1e-5}  # small, for many layers without normalization
_STATE_ARRAYS = {"sgd": 1, "adamw": 2}  # arrays of a parameter's size in the optimizer's state

Step = Callable[[], float]


@dataclass(frozen=True, slots=True)
class Setting:
    """The training to measure.

    Attributes:
        widths: widths of the layers.
        batch: rows in a rank's batch.
        optimizer: "sgd" or "adamw".
    """

    widths: list[int]
    batch: int
    optimizer: str

    def data(self, rank: int) -> tuple[npt.NDArray[np.float32], npt.NDArray[np.int64]]:
        """Return a rank's random inputs and labels, the same in every step."""
        random = np.random.default_rng(rank)
        x = random.standard_normal((self.batch, self.widths[0]), np.float32)
        return x, random.integers(0, _CLASSES, self.batch)


class Training:
    """A perceptron under one of ferro's strategies, or without a strategy ("alone")."""

    def __init__(self, setting: Setting, strategy: str, group: ferro.ProcessGroup) -> None:
        self.model = _wrapped(_perceptron(setting.widths), strategy, group)
        parameters = self.model.parameters()
        self.optimizer: SGD | AdamW = (
            SGD(parameters, lr=_LR[setting.optimizer], momentum=0.9)
            if setting.optimizer == "sgd"
            else AdamW(parameters, lr=_LR[setting.optimizer])
        )
        self.activation_bytes = 0
        self._x, self._labels = setting.data(group.rank)

    def step(self) -> float:
        """Train on the batch once, and return the loss."""
        before = _traced()
        logits, pullback = self.model.vjp(self._x)
        self.activation_bytes = _traced() - before
        loss, grad = cross_entropy(logits, self._labels)
        pullback(grad)
        self.optimizer.step()
        self.optimizer.zero_grad()
        return float(loss)


def _perceptron(widths: list[int]) -> Sequential:
    layers: list[Module] = []
    for wide, narrow in pairwise(widths):
        layers += [Linear(wide, narrow, rng=0), ReLU()]
    return Sequential(*layers[:-1])


def _wrapped(model: Module, strategy: str, group: ferro.ProcessGroup) -> Module:
    if strategy == "ddp":
        return DDP(model, group)
    if strategy == "fsdp":
        return FSDP(model, group)
    return model


def torch_training(setting: Setting, strategy: str, rank: int) -> tuple[Step, Any, Any]:
    """Return the same training step under torch's DDP or FSDP2, or alone, with its model and its optimizer.

    torch's group must be open.
    """
    import torch
    from torch.distributed.fsdp import fully_shard
    from torch.nn.parallel import DistributedDataParallel

    layers: list[torch.nn.Module] = []
    for wide, narrow in pairwise(setting.widths):
        layers += [torch.nn.Linear(wide, narrow), torch.nn.ReLU()]
    model: torch.nn.Module = torch.nn.Sequential(*layers[:-1])
    if strategy == "ddp":
        model = DistributedDataParallel(model, gradient_as_bucket_view=True)  # without copies into buckets
    elif strategy == "fsdp":
        for layer in layers:
            if isinstance(layer, torch.nn.Linear):
                fully_shard(layer)
        fully_shard(model)
    optimizer = (
        torch.optim.SGD(model.parameters(), lr=_LR[setting.optimizer], momentum=0.9)
        if setting.optimizer == "sgd"
        else torch.optim.AdamW(model.parameters(), lr=_LR[setting.optimizer])
    )
    x, labels = map(torch.from_numpy, setting.data(rank))

    def step() -> float:
        loss = torch.nn.functional.cross_entropy(model(x), labels)
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        return loss.item()

    return step, model, optimizer


class Spans:
    """An observer that records the times during which collectives ran."""

    def __init__(self) -> None:
        self.seconds: list[tuple[float, float]] = []

    def started(self, event: ferro.Event) -> None:
        """Do nothing; the event at the end has both times."""

    def finished(self, event: ferro.Event) -> None:
        """Record an operation, except the barriers between blocks."""
        if event.op != "barrier":
            self.seconds.append((event.start_s, event.start_s + event.seconds))

    def close(self) -> None:
        """Do nothing; the recorded times are still read."""

    def take(self) -> float:
        """Return the seconds since the last call during which a collective ran."""
        busy, end = 0.0, 0.0
        for start, stop in sorted(self.seconds):
            busy += max(0.0, stop - max(start, end))
            end = max(end, stop)
        self.seconds = []
        return busy


def memory(setting: Setting, strategy: str, group: ferro.ProcessGroup, steps: int) -> dict[str, object]:
    """Measure this rank's peak bytes in training steps; return them beside the expected bytes."""
    whole = 4 * sum(wide * narrow + narrow for wide, narrow in pairwise(setting.widths))
    units = sorted(4 * (wide * narrow + narrow) for wide, narrow in pairwise(setting.widths))
    share = -(-whole // group.world_size) if strategy == "fsdp" else whole
    gc.collect()
    tracemalloc.start()
    before = _traced()
    training = Training(setting, strategy, group)
    construction = tracemalloc.get_traced_memory()[1] - before
    losses = [training.step()]
    tracemalloc.reset_peak()
    losses += [training.step() for _ in range(steps)]
    peak = tracemalloc.get_traced_memory()[1] - before
    tracemalloc.stop()
    _check(losses)
    parts = {
        "parameters": share,
        "gradients": share,
        "optimizer_state": _STATE_ARRAYS[setting.optimizer] * share,
        "activations": training.activation_bytes,
    }
    if strategy == "fsdp":
        parts["two_gathered_units"] = sum(units[-2:])
    return {
        "strategy": strategy,
        "parts": parts,
        "expected_bytes": sum(parts.values()),
        "peak_bytes": peak,
        "construction_peak_bytes": construction,
        "ratio": peak / sum(parts.values()),
    }


def times(
    setting: Setting, group: ferro.ProcessGroup, rounds: int, spans: Spans | None, *, with_torch: bool
) -> dict[str, object]:
    """Measure the seconds of a step under each strategy, in blocks that take turns."""
    steps: dict[str, Step] = {name: Training(setting, name, group).step for name in ("alone", "ddp", "fsdp")}
    if with_torch:
        _open_torch()
        for name in ("alone", "ddp", "fsdp"):
            steps[f"torch-{name}"] = torch_training(setting, name, group.rank)[0]
    seconds: dict[str, list[float]] = {name: [] for name in steps}
    busy: dict[str, list[float]] = {name: [] for name in steps}
    losses: dict[str, list[float]] = {name: [] for name in steps}
    for turn in range(-1, rounds):
        for name in steps if turn % 2 else reversed(steps):
            for _ in range(_STEPS_IN_BLOCK):
                group.barrier()
                if spans is not None:
                    spans.take()
                start = time.perf_counter()
                losses[name].append(steps[name]())
                if turn >= 0:
                    seconds[name].append(time.perf_counter() - start)
                    if spans is not None:
                        busy[name].append(spans.take())
    record: dict[str, object] = {}
    for name in steps:
        _check(losses[name])
        slowest = group.all_reduce(np.array(seconds[name]), "max")
        record[name] = {"median_s": float(np.median(slowest)), "min_s": float(slowest.min())}
        if spans is not None:
            record[name]["collectives_s"] = float(np.median(busy[name]))
    if with_torch:
        _close_torch()
    return {"steps": record}


def _open_torch() -> None:
    """Open torch's process group over gloo, with one thread for arithmetic."""
    import torch
    import torch.distributed

    torch.set_num_threads(1)
    torch.distributed.init_process_group("gloo")


def _close_torch() -> None:
    import torch.distributed

    torch.distributed.destroy_process_group()


def _check(losses: list[float]) -> None:
    if not losses[-1] < losses[0]:
        raise ArithmeticError(f"the loss did not fall: {losses[0]} at first, {losses[-1]} at last")


def _traced() -> int:
    return tracemalloc.get_traced_memory()[0]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("quantity", choices=("memory", "times"))
    parser.add_argument("--out", type=Path, required=True, help="JSON file that rank 0 writes")
    parser.add_argument("--widths", required=True, help="of the layers: a size, or size*count, …")
    parser.add_argument("--batch", type=int, default=64, help="rows of a rank")
    parser.add_argument("--optimizer", choices=_STATE_ARRAYS, default="sgd")
    parser.add_argument("--strategy", choices=("ddp", "fsdp"), help="for memory")
    parser.add_argument("--rounds", type=int, required=True)
    parser.add_argument("--without-torch", action="store_true")
    parser.add_argument("--observed", action="store_true", help="for times: record how long collectives ran")
    options = parser.parse_args()
    setting = Setting(widths_of(options.widths), options.batch, options.optimizer)
    # tracemalloc does not see shared memory, so memory is measured without it.
    backend_options = {"shared_memory": options.quantity != "memory"}
    spans = Spans() if options.observed else None
    observers = () if spans is None else (spans,)
    with ferro.init("gloo", backend_options=backend_options, observers=observers) as group:
        if options.quantity == "memory":
            record = memory(setting, options.strategy, group, options.rounds)
        else:
            with_torch = not options.without_torch
            record = times(setting, group, options.rounds, spans, with_torch=with_torch)
        if group.rank == 0:
            parameters = sum(a * b + b for a, b in pairwise(setting.widths))
            settings = {
                "widths": options.widths,
                "parameters": parameters,
                "batch": setting.batch,
                "optimizer": setting.optimizer,
                "ranks": group.world_size,
            }
            options.out.write_text(json.dumps(settings | record, indent=1))


def widths_of(text: str) -> list[int]:
    """Parse widths of layers: a size, or size*count, separated by commas."""
    widths: list[int] = []
    for part in text.split(","):
        size, _, count = part.partition("*")
        widths += [int(size)] * int(count or 1)
    return widths


if __name__ == "__main__":
    main()
