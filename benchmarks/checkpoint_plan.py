"""One process of the checkpoint benchmark: planning a save of many tensors, and opening a checkpoint of many.

`checkpoint.py` starts it with `ferro run`. ferro's plan is the first of a state, with nothing known from before;
torch's is that of its `DefaultSavePlanner`, without the storage's part. Opening reads and checks the record and
the headers; for torch, it reads the metadata. The two take turns.
"""

from __future__ import annotations

import argparse
import json
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np

import ferro
from ferro_checkpoint import save
from ferro_checkpoint.opened.checkpoint import OpenedCheckpoint
from ferro_checkpoint.saving.save_plan import plan_save
from ferro_checkpoint.storage.opening import split_path

_SHAPES = ((8, 4), (8,), (4, 8), (4,))  # of small tensors, in turns


def _arrays(count: int) -> dict[str, np.ndarray]:
    return {f"layers.{index // 4}.{index % 4}": np.ones(_SHAPES[index % 4], np.float32) for index in range(count)}


def plan(group: ferro.ProcessGroup, count: int, turns: int, *, with_torch: bool) -> dict[str, list[float]]:
    """Measure the seconds of a plan."""
    arrays = _arrays(count)
    own = None if group.world_size == 1 else group.subgroup(range(group.world_size))
    operations: dict[str, Callable[[], object]] = {"ferro": lambda: plan_save({"model": arrays}, own)}
    if with_torch:
        tensors = _tensors(arrays)
        operations["torch"] = lambda: _torch_plan(tensors)
    return _seconds(group, operations, turns)


def _torch_plan(tensors: dict[str, object]) -> None:
    from torch.distributed.checkpoint.default_planner import DefaultSavePlanner

    planner = DefaultSavePlanner()
    planner.set_up_planner(tensors, is_coordinator=True)
    (final,), _ = planner.create_global_plan([planner.create_local_plan()])
    planner.finish_plan(final)


def open_many(
    group: ferro.ProcessGroup, count: int, turns: int, folder: Path, *, with_torch: bool
) -> dict[str, list[float]]:
    """Measure the seconds in which a checkpoint is opened."""
    arrays = _arrays(count)
    paths = {name: folder / name for name in ("ferro", "torch")}
    save(paths["ferro"], {"model": arrays})
    storage, name = split_path(paths["ferro"])
    operations: dict[str, Callable[[], object]] = {"ferro": lambda: OpenedCheckpoint.open(storage, name).close()}
    if with_torch:
        import torch.distributed.checkpoint as dcp

        dcp.save(_tensors(arrays), storage_writer=dcp.FileSystemWriter(paths["torch"]), no_dist=True)
        operations["torch"] = lambda: dcp.FileSystemReader(paths["torch"]).read_metadata()
    return _seconds(group, operations, turns)


def _tensors(arrays: dict[str, np.ndarray]) -> dict[str, object]:
    import torch

    return {name: torch.from_numpy(array) for name, array in arrays.items()}


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
    parser.add_argument("--without-torch", action="store_true", help="with several ranks, torch never takes part")
    options = parser.parse_args()
    with_torch = not options.without_torch
    with ferro.init("gloo") as group:
        ranks = {"ranks": group.world_size}
        planned = plan(group, options.planned, options.turns, with_torch=with_torch)
        records = [ranks | {"what": "plan", "tensors": options.planned, "seconds": planned}]
        if group.world_size == 1:
            opened = open_many(group, options.opened, options.turns, options.folder, with_torch=with_torch)
            records.append(ranks | {"what": "open", "tensors": options.opened, "seconds": opened})
        if group.rank == 0:
            options.out.write_text(json.dumps({"records": records}, indent=1))


if __name__ == "__main__":
    main()
