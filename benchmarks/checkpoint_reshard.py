"""One rank of the checkpoint benchmark: the bytes that a load by another number of ranks reads.

`checkpoint.py` starts it with `ferro run`: once with "save", and with other numbers of ranks with "load". The bytes are
those of all calls that read, by `/proc/self/io`, of all ranks together, also of the record, the headers and the index;
less what the same ranks read in a barrier. They are divided by the bytes that the ranks hold. Each checkpoint is loaded
twice, and the second load counts, so that no module of Python is read meanwhile.
"""

from __future__ import annotations

import argparse
import functools
import json
from collections.abc import Callable
from pathlib import Path

import checkpoint_states as states
import numpy as np

import ferro
from ferro_checkpoint import load, save


def run(
    group: ferro.ProcessGroup, layout: str, layers: int, folder: Path, *, loads: bool, with_torch: bool
) -> dict[str, object]:
    """Save or load the state with ferro and with torch."""
    rank, world_size = group.rank, group.world_size
    model = states.ferro_model(layout, layers, rank, world_size)
    paths = {name: folder / f"{layout}-{name}" for name in ("ferro", "torch")}
    operations: dict[str, Callable[[], object]] = {
        "ferro": lambda: (load if loads else save)(paths["ferro"], {"model": model}, group)
    }
    needed = {"ferro": model.nbytes}
    if with_torch:
        state = states.torch_state(layout, layers, rank, world_size)
        operations["torch"] = functools.partial(_torch, state, paths["torch"], loads=loads)
        needed["torch"] = sum(_torch_bytes(tensor) for tensor in state.values())
    if not loads:
        for operation in operations.values():
            operation()
        return {}
    operations["nothing"] = lambda: None
    read = dict.fromkeys(operations, 0)
    for _ in range(2):
        for name, operation in operations.items():
            group.barrier()
            before = states.bytes_read()
            operation()
            read[name] = states.bytes_read() - before
            group.barrier()
    names = list(needed)
    own = np.array([[read[name] - read["nothing"], needed[name]] for name in names])
    summed = group.all_reduce(own, "sum").tolist()
    return {
        "layout": layout,
        "to": world_size,
        "nbytes": layers * states.LAYER_BYTES,
        "read_bytes": {name: each[0] for name, each in zip(names, summed, strict=True)},
        "needed_bytes": {name: each[1] for name, each in zip(names, summed, strict=True)},
    }


def _torch(state: dict[str, object], path: Path, *, loads: bool) -> None:
    import torch.distributed.checkpoint as dcp

    if loads:
        dcp.load(state, storage_reader=dcp.FileSystemReader(path))
    else:
        dcp.save(state, storage_writer=dcp.FileSystemWriter(path))


def _torch_bytes(tensor: object) -> int:
    local = tensor.to_local()  # type: ignore[attr-defined]
    return int(local.numel()) * 4


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("action", choices=("save", "load"))
    parser.add_argument("--out", type=Path, required=True, help="JSON file that rank 0 writes")
    parser.add_argument("--folder", type=Path, required=True, help="where the checkpoints are")
    parser.add_argument("--layouts", default="shards,columns")
    parser.add_argument("--layers", type=int, default=16, help="of 16 MiB each")
    parser.add_argument("--without-torch", action="store_true")
    options = parser.parse_args()
    with_torch, loads = not options.without_torch, options.action == "load"
    with ferro.init("gloo") as group:
        if with_torch:
            states.open_torch()
        records = [
            run(group, layout, options.layers, options.folder, loads=loads, with_torch=with_torch)
            for layout in options.layouts.split(",")
        ]
        if with_torch:
            states.close_torch()
        if group.rank == 0:
            options.out.write_text(json.dumps({"records": records}, indent=1))


if __name__ == "__main__":
    main()
