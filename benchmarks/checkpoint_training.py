"""One rank of the checkpoint benchmark: saves while training goes on, beside torch's `async_save`.

`checkpoint.py` starts it with `ferro run`. A perceptron is trained with NumPy under a strategy of ferro, and the same
one with torch under the strategy of that name; the two take turns. A turn has one save, and steps until that is on disk
and then some more:

    saving      the step after which the state is saved, with the call that saves it
    beside      a step that begins while the save is being written
    ordinary    another one; the first after a save is left out

A step's time is that of its slowest rank. In each turn, the rank's share of the state is also copied once in memory.
"""

from __future__ import annotations

import argparse
import json
import shutil
import statistics
import time
from collections.abc import Callable
from pathlib import Path
from typing import Protocol

import checkpoint_states as states
import numpy as np
import training

import ferro
from ferro_checkpoint import Checkpointer

_ORDINARY = 4  # steps in a turn, at least
_MOST_BESIDE = 40


class Loop(Protocol):
    """A training loop that saves."""

    state_bytes: int

    def step(self) -> None:
        """Train once."""

    def save(self) -> Callable[[], bool]:
        """Begin a save; return a function that says whether it is on disk. The one before has ended."""

    def close(self) -> None:
        """End it."""


class FerroLoop:
    """ferro's loop: `Checkpointer(async_=True)`, of which `step` is called in every step."""

    def __init__(self, setting: training.Setting, strategy: str, group: ferro.ProcessGroup, folder: Path) -> None:
        self._training = training.Training(setting, strategy, group)
        self._folder = folder
        self._keeper = Checkpointer(folder, group)
        self._count = 0
        self._state = {"model": self._training.model, "optimizer": self._training.optimizer}
        self.state_bytes = 0

    def step(self) -> None:
        """Train once."""
        self._training.step()
        self._count += 1
        self._keeper.step(self._count, self._state)

    def save(self) -> Callable[[], bool]:
        """Begin a save."""
        result = self._keeper.save(self._count, self._state)
        self.state_bytes = result.bytes
        return result.done

    def close(self) -> None:
        """Wait for the save."""
        self._keeper.close()


class TorchLoop:
    """torch's loop: `async_save` in a thread, with a staging buffer that is used again, and a group of its own."""

    def __init__(self, setting: training.Setting, strategy: str, group: ferro.ProcessGroup, folder: Path) -> None:
        import torch.distributed
        from torch.distributed.checkpoint.staging import DefaultStager, StagingOptions

        self._step, self._model, self._optimizer = training.torch_training(setting, strategy, group.rank)
        self._folder, self._count = folder, 0
        # The other options need an accelerator.
        self._stager = DefaultStager(StagingOptions(False, False, False, False))
        self._group = torch.distributed.new_group(backend="gloo")
        held = (getattr(parameter, "_local_tensor", parameter) for parameter in self._model.parameters())
        self.state_bytes = 2 * 4 * sum(tensor.numel() for tensor in held)  # with the momentum

    def step(self) -> None:
        """Train once."""
        self._step()

    def save(self) -> Callable[[], bool]:
        """Begin a save."""
        import torch.distributed.checkpoint as dcp
        from torch.distributed.checkpoint.state_dict import get_state_dict

        self._count += 1
        model, optimizer = get_state_dict(self._model, self._optimizer)
        future = dcp.async_save(
            {"model": model, "optimizer": optimizer},
            storage_writer=dcp.FileSystemWriter(self._folder / str(self._count), sync_files=True),
            async_stager=self._stager,
            process_group=self._group,
        )
        return future.done

    def close(self) -> None:
        """End it; the turns have waited for the saves."""
        self._stager.close()


class Turns:
    """The times of steps, by what they were, and those of copies."""

    def __init__(self, group: ferro.ProcessGroup, rank_folder: Path) -> None:
        self.seconds: dict[str, list[float]] = {"ordinary": [], "saving": [], "beside": [], "copy": [], "written": []}
        self._group, self._folder = group, rank_folder
        self._memory = np.zeros((2, 1), np.uint8)

    def run(self, loop: Loop, *, counts: bool) -> None:
        """Run a turn: ordinary steps, a save, and steps until it is written."""
        self._timed(loop.step)
        ordinary = [self._timed(loop.step) for _ in range(_ORDINARY)]
        ended: list[Callable[[], bool]] = []

        def saving() -> None:
            loop.step()
            ended.append(loop.save())

        step = self._timed(saving)
        start = time.perf_counter()
        beside = []
        while not self._on_all(ended[0]()) and len(beside) < _MOST_BESIDE:
            beside.append(self._timed(loop.step))
        while not ended[0]():
            time.sleep(0.01)
        written = time.perf_counter() - start
        self._group.barrier()
        copy = self._copy(loop.state_bytes)
        if self._group.rank == 0:
            for path in self._folder.iterdir():
                shutil.rmtree(path)
            states.sync_directory(self._folder)
        self._group.barrier()
        if counts:
            self.seconds["ordinary"] += ordinary
            self.seconds["beside"] += beside
            self.seconds["saving"].append(step)
            self.seconds["written"].append(written)
            self.seconds["copy"].append(copy)

    def _timed(self, step: Callable[[], None]) -> float:
        self._group.barrier()
        start = time.perf_counter()
        step()
        return float(self._group.all_reduce(np.array([time.perf_counter() - start]), "max")[0])

    def _on_all(self, done: bool) -> bool:
        return bool(self._group.all_reduce(np.array([done], np.uint8), "min")[0])

    def _copy(self, nbytes: int) -> float:
        """Copy as many bytes in memory, all ranks at once."""
        if self._memory.shape[1] != nbytes:
            self._memory = np.ones((2, nbytes), np.uint8)
        return self._timed(lambda: np.copyto(self._memory[0], self._memory[1]))


def measure(
    group: ferro.ProcessGroup, setting: training.Setting, strategy: str, turns: int, folder: Path, *, with_torch: bool
) -> dict[str, object]:
    """Run turns of both loops; return the median times."""
    folders = {"ferro": folder / f"{strategy}-ferro", "torch": folder / f"{strategy}-torch"}
    loops: dict[str, Loop] = {}
    for name, kind in (("ferro", FerroLoop), ("torch", TorchLoop)):
        if name == "ferro" or with_torch:
            folders[name].mkdir(parents=True, exist_ok=True)
            loops[name] = kind(setting, strategy, group, folders[name])
    found = {name: Turns(group, folders[name]) for name in loops}
    for turn in range(-1, turns):
        for name in loops if turn % 2 else reversed(loops):
            found[name].run(loops[name], counts=turn >= 0)
    for loop in loops.values():
        loop.close()
    results = {}
    for name, each in found.items():
        medians = {kind: statistics.median(times) for kind, times in each.seconds.items() if times}
        counts = {kind: len(times) for kind, times in each.seconds.items()}
        results[name] = {"state_bytes": loops[name].state_bytes, "median_s": medians, "counts": counts}
    return {"strategy": strategy, "ranks": group.world_size, "turns": turns, "results": results}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, required=True, help="JSON file that rank 0 writes")
    parser.add_argument("--folder", type=Path, required=True, help="where checkpoints are written")
    parser.add_argument("--strategies", default="ddp,fsdp")
    parser.add_argument("--widths", default="784,2048*7,10")
    parser.add_argument("--batch", type=int, default=128)
    parser.add_argument("--turns", type=int, default=5)
    parser.add_argument("--without-torch", action="store_true")
    options = parser.parse_args()
    setting = training.Setting(training.widths_of(options.widths), options.batch, "sgd")
    with ferro.init("gloo") as group:
        if not options.without_torch:
            states.open_torch()
        records = [
            measure(group, setting, name, options.turns, options.folder, with_torch=not options.without_torch)
            for name in options.strategies.split(",")
        ]
        if not options.without_torch:
            states.close_torch()
        if group.rank == 0:
            record = {"widths": options.widths, "batch": options.batch, "records": records}
            options.out.write_text(json.dumps(record, indent=1))


if __name__ == "__main__":
    main()
