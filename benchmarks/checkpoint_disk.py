"""One rank of the checkpoint benchmark: save and load beside torch.distributed.checkpoint and the raw disk.

`checkpoint.py` starts it with `ferro run`. In every turn, each of them writes the same number of bytes, one after the
other; then each loads what it has written: from the page cache ("warm"), and after that has been emptied ("cold").
The time is that of the slowest rank.

    ferro        ferro_checkpoint.save and load
    torch        torch.distributed.checkpoint's save and load; FileSystemWriter with sync_files and threads
    raw          rank 0 alone: all bytes in order and fsync; one read into memory that was touched before
    raw, early   the same, but the disk is told after each 4 MiB to begin with them
    raw, each    if every rank needs all bytes: each of them reads the raw file
"""

from __future__ import annotations

import argparse
import ctypes
import functools
import json
import os
import time
from collections.abc import Callable
from pathlib import Path

import checkpoint_states as states
import numpy as np
import numpy.typing as npt

import ferro
from ferro_checkpoint import load, save

_WRITE_BYTES = 1 << 20  # of one call; longer ones take the kernel more time, see `ferro_checkpoint.storage.local_files`
_EARLY_BYTES = 4 << 20
_SYNC_FILE_RANGE_WRITE = 2
Bytes = npt.NDArray[np.uint8]
Operation = Callable[[], None]


class Measured:
    """Times operations of all ranks, and takes the memory that each needs.

    Attributes:
        seconds: of each operation, the slowest rank's, in each turn.
        extra_bytes: the most that a rank needed.
    """

    def __init__(self, group: ferro.ProcessGroup) -> None:
        self.seconds: dict[str, dict[str, list[float]]] = {}
        self.extra_bytes: dict[str, dict[str, int]] = {}
        self._group = group

    def time(self, kind: str, name: str, operation: Operation, *, counts: bool) -> None:
        """Run an operation on all ranks at once."""
        self._group.barrier()
        memory = states.ExtraMemory()
        self._group.barrier()
        start = time.perf_counter()
        operation()
        elapsed = time.perf_counter() - start
        most = self._group.all_reduce(np.array([elapsed, memory.peak()]), "max")
        if counts:
            self.seconds.setdefault(kind, {}).setdefault(name, []).append(float(most[0]))
            known = self.extra_bytes.setdefault(kind, {})
            known[name] = max(known.get(name, 0), int(most[1]))


def measure(
    group: ferro.ProcessGroup, layout: str, layers: int, turns: int, folder: Path, threads: int, *, with_torch: bool
) -> dict[str, object]:
    """Measure all operations in turns; return their seconds and memory."""
    rank, world_size, nbytes = group.rank, group.world_size, layers * states.LAYER_BYTES
    model = states.ferro_model(layout, layers, rank, world_size)
    memory = np.full(nbytes, 1 + rank, np.uint8) if rank == 0 or layout == "replicated" else np.empty(0, np.uint8)
    paths = {name: folder / name for name in ("ferro", "torch", "raw")}
    saves: dict[str, Operation] = {
        "ferro": lambda: save(paths["ferro"], {"model": model}, group),
        "raw": lambda: _write(paths["raw"], memory, early=False) if rank == 0 else None,
        "raw, early": lambda: _write(paths["raw"], memory, early=True) if rank == 0 else None,
    }
    loads: dict[str, Operation] = {
        "ferro": lambda: load(paths["ferro"], {"model": model}, group),
        "raw": lambda: _read(paths["raw"], memory) if rank == 0 else None,
    }
    if layout == "replicated" and world_size > 1:
        loads["raw, each"] = functools.partial(_read, paths["raw"], memory)
    if with_torch:
        state = states.torch_state(layout, layers, rank, world_size)
        saves["torch"] = lambda: _torch_save(paths["torch"], state, threads)
        loads["torch"] = lambda: _torch_load(paths["torch"], state)
    _check_loads(group, model, saves["ferro"], loads["ferro"], paths["ferro"])
    measured = Measured(group)
    cold_bytes = []
    for turn in range(-1, turns):
        counts = turn >= 0
        for name in _rotated(saves, turn):
            if rank == 0:
                states.remove(paths[name.split(",")[0]])
            measured.time("save", name, saves[name], counts=counts)
        for name in _rotated(loads, turn):
            measured.time("load, warm", name, loads[name], counts=counts)
        for name in _rotated(loads, turn) if counts else ():
            group.barrier()
            if rank == 0:
                states.drop_from_cache(paths[name.split(",")[0]])
            before = states.bytes_read("read_bytes")
            measured.time("load, cold", name, loads[name], counts=True)
            if name == "raw" and rank == 0:
                cold_bytes.append(states.bytes_read("read_bytes") - before)
    sizes = {name: states.directory_bytes(path) for name, path in paths.items() if path.is_dir()}
    group.barrier()
    if rank == 0:
        for path in paths.values():
            states.remove(path)
    return {
        "layout": layout,
        "ranks": world_size,
        "nbytes": nbytes,
        "turns": turns,
        "torch_threads": threads,
        "seconds": measured.seconds,
        "extra_bytes": measured.extra_bytes,
        "written_bytes": sizes,
        "cold_share": min(cold_bytes, default=0) / nbytes,  # of a cold read that came from the disk
    }


def _check_loads(
    group: ferro.ProcessGroup, model: states.Model, save_it: Operation, load_it: Operation, path: Path
) -> None:
    """Check once that a load brings back all bits."""
    if group.rank == 0:
        states.remove(path)
    group.barrier()
    save_it()
    kept = {name: piece.data.copy() for name, piece in model.pieces.items()}
    for piece in model.pieces.values():
        piece.data[...] = 0
    load_it()
    for name, piece in model.pieces.items():
        if not np.array_equal(piece.data, kept[name]):
            raise ArithmeticError(f"rank {group.rank}: {name} is not what was saved")


def _rotated(operations: dict[str, Operation], turn: int) -> list[str]:
    names = list(operations)
    first = turn % len(names)
    return [*names[first:], *names[:first]]


def _write(path: Path, memory: Bytes, *, early: bool) -> None:
    """Write a new file, and wait until it is on disk; tell the disk to begin before, if wanted."""
    library = ctypes.CDLL(None)
    fd = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL)
    at, told, view = 0, 0, memoryview(memory)
    while at < len(view):
        at += os.pwrite(fd, view[at : at + _WRITE_BYTES], at)
        if early and at - told >= _EARLY_BYTES:
            library.sync_file_range(fd, ctypes.c_int64(told), ctypes.c_int64(at - told), _SYNC_FILE_RANGE_WRITE)
            told = at
    os.fsync(fd)
    os.close(fd)
    states.sync_directory(path.parent)


def _read(path: Path, memory: Bytes) -> None:
    fd = os.open(path, os.O_RDONLY)
    at, view = 0, memoryview(memory)
    while at < len(view):
        at += os.preadv(fd, [view[at:]], at)
    os.close(fd)


def _torch_save(path: Path, state: dict[str, object], threads: int) -> None:
    import torch.distributed.checkpoint as dcp

    dcp.save(state, storage_writer=dcp.FileSystemWriter(path, sync_files=True, thread_count=threads))


def _torch_load(path: Path, state: dict[str, object]) -> None:
    import torch.distributed.checkpoint as dcp

    dcp.load(state, storage_reader=dcp.FileSystemReader(path))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, required=True, help="JSON file that rank 0 writes")
    parser.add_argument("--folder", type=Path, required=True, help="where checkpoints are written")
    parser.add_argument("--layouts", default="shards,replicated")
    parser.add_argument("--layers", type=int, default=64, help="of 16 MiB each")
    parser.add_argument("--turns", type=int, default=5)
    parser.add_argument("--threads", type=int, default=4, help="torch's thread_count; the best of 1, 2 and 4")
    parser.add_argument("--without-torch", action="store_true")
    options = parser.parse_args()
    with ferro.init("gloo") as group:
        if not options.without_torch:
            states.open_torch()
        records = [
            measure(
                group,
                layout,
                options.layers,
                options.turns,
                options.folder,
                options.threads,
                with_torch=not options.without_torch,
            )
            for layout in options.layouts.split(",")
        ]
        if not options.without_torch:
            states.close_torch()
        if group.rank == 0:
            options.out.write_text(json.dumps({"records": records}, indent=1))


if __name__ == "__main__":
    main()
