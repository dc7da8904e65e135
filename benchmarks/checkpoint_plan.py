"""One process of the checkpoint benchmark: planning a save of many tensors, and opening a checkpoint of many.

`checkpoint.py` starts it with `ferro run`. ferro's plan is the first of a state, with nothing known from before; torch's
is that of its `DefaultSavePlanner`, without the storage's part. Opening reads and checks the record and the headers;
for torch, it reads the metadata. The two take turns.
"""

from __future__ import annotations

import argparse
import json
import time
from collections.abc import Callable
from pathlib import Path

import checkpoint_states as states
import numpy as np

import ferro
from ferro_checkpoint import save
from ferro_checkpoint.opened.checkpoint import OpenedCheckpoint
from ferro_checkpoint.saving.save_plan import plan_save
from ferro_checkpoint.storage.opening import split_path

_SHAPES = ((8, 4), (8,), (4, 8), (4,))  # of small tensors, in turns


def _arrays(count: int) -> dict[str, np.ndarray]:
    return {f"layers.{index // 4}.{index % 4}": np.ones(_SHAPES[index % 4], np.float32) for index in range(count)}


def plan(group: ferro.ProcessGroup, count: int, turns: int) -> dict[str, list[float]]:
    """Measure the seconds of a plan."""
    import torch
    from torch.distributed.checkpoint.default_planner import DefaultSavePlanner

    arrays = _arrays(count)
    tensors = {name: torch.from_numpy(array) for name, array in arrays.items()}
    own = None if group.world_size == 1 else group.subgroup(range(group.world_size))

    def torch_plan() -> None:
        planner = DefaultSavePlanner()
        planner.set_up_planner(tensors, is_coordinator=group.rank == 0)
        local = planner.create_local_plan()
        gathered = [local]
        if group.world_size > 1:
            gathered = [local] * group.world_size
            torch.distributed.all_gather_object(gathered, local)
        if group.rank == 0:
            gathered, _ = planner.create_global_plan(gathered)
        final = [gathered[0]]
        if group.world_size > 1:
            torch.distributed.scatter_object_list(final, gathered, src=0)
        planner.finish_plan(final[0])

    return _seconds(group, {"ferro": lambda: plan_save({"model": arrays}, own), "torch": torch_plan}, turns)


def open_many(group: ferro.ProcessGroup, count: int, turns: int, folder: Path) -> dict[str, list[float]]:
    """Measure the seconds in which a checkpoint is opened."""
    import torch
    import torch.distributed.checkpoint as dcp

    arrays = _arrays(count)
    save(folder / "ferro", {"model": arrays})
    tensors = {name: torch.from_numpy(array) for name, array in arrays.items()}
    dcp.save(tensors, storage_writer=dcp.FileSystemWriter(folder / "torch"), no_dist=True)
    storage, name = split_path(folder / "ferro")

    def ferro_open() -> None:
        OpenedCheckpoint.open(storage, name).close()

    operations = {"ferro": ferro_open, "torch": lambda: dcp.FileSystemReader(folder / "torch").read_metadata()}
    seconds = _seconds(group, operations, turns)
    for path in (folder / "ferro", folder / "torch"):
        states.remove(path)
    return seconds


def _seconds(
    group: ferro.ProcessGroup, operations: dict[str, Callable[[], object]], turns: int
) -> dict[str, list[float]]:
    seconds: dict[str, list[float]] = {name: [] for name in operations}
    for turn in range(-1, turns):
        for name in operations if turn % 2 else reversed(operations):
            group.barrier()
            start = time.perf_counter()
            operations[name]()
            elapsed = group.all_reduce(np.array([time.perf_counter() - start]), "max")
            if turn >= 0:
                seconds[name].append(float(elapsed[0]))
    return seconds


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, required=True, help="JSON file that rank 0 writes")
    parser.add_argument("--folder", type=Path, required=True, help="where checkpoints are written")
    parser.add_argument("--planned", type=int, default=100_000, help="number of tensors")
    parser.add_argument("--opened", type=int, default=10_000, help="number of tensors")
    parser.add_argument("--turns", type=int, default=5)
    options = parser.parse_args()
    with ferro.init("gloo") as group:
        states.open_torch()
        ranks = {"ranks": group.world_size}
        planned = plan(group, options.planned, options.turns)
        records = [ranks | {"what": "plan", "tensors": options.planned, "seconds": planned}]
        if group.world_size == 1:
            opened = open_many(group, options.opened, options.turns, options.folder)
            records.append(ranks | {"what": "open", "tensors": options.opened, "seconds": opened})
        states.close_torch()
        if group.rank == 0:
            options.out.write_text(json.dumps({"records": records}, indent=1))


if __name__ == "__main__":
    main()
