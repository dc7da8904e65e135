"""One rank of the checkpoint benchmark: the bytes that a load by another number of ranks reads.

`checkpoint.py` starts it with `ferro run`: once with "save", and with other numbers of ranks with "load". The bytes are
those of all calls that read, by `/proc/self/io`, of all ranks together, also of the record, the headers and the index;
less what the same ranks read in a barrier. They are divided by the bytes that the ranks hold. Each checkpoint is loaded
twice, and the second load counts, so that no module of Python is read meanwhile.
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path

import checkpoint_states as states
import numpy as np

import ferro
from ferro_checkpoint import load, save


def run(group: ferro.ProcessGroup, layout: str, layers: int, folder: Path, *, loads: bool) -> dict[str, object]:
    """Save or load the state with ferro and with torch."""
    import torch.distributed.checkpoint as dcp

    rank, world_size = group.rank, group.world_size
    model = states.ferro_model(layout, layers, rank, world_size)
    state = states.torch_state(layout, layers, rank, world_size)
    ferro_path, torch_path = folder / f"{layout}-ferro", folder / f"{layout}-torch"
    if not loads:
        save(ferro_path, {"model": model}, group)
        dcp.save(state, storage_writer=dcp.FileSystemWriter(torch_path))
        return {}
    operations = {
        "ferro": lambda: load(ferro_path, {"model": model}, group),
        "torch": lambda: dcp.load(state, storage_reader=dcp.FileSystemReader(torch_path)),
        "nothing": lambda: None,
    }
    read = dict.fromkeys(operations, 0)
    for _ in range(2):
        for name, operation in operations.items():
            group.barrier()
            before = states.bytes_read()
            operation()
            read[name] = states.bytes_read() - before
            group.barrier()
    own = [read[name] - read["nothing"] for name in ("ferro", "torch")]
    held = np.array([*own, model.nbytes, sum(_torch_bytes(tensor) for tensor in state.values())])
    ferro_bytes, torch_bytes, ferro_needed, torch_needed = group.all_reduce(held, "sum").tolist()
    return {
        "layout": layout,
        "to": world_size,
        "nbytes": layers * states.LAYER_BYTES,
        "read_bytes": {"ferro": ferro_bytes, "torch": torch_bytes},
        "needed_bytes": {"ferro": ferro_needed, "torch": torch_needed},
    }


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
    options = parser.parse_args()
    with ferro.init("gloo") as group:
        states.open_torch()
        records = [
            run(group, layout, options.layers, options.folder, loads=options.action == "load")
            for layout in options.layouts.split(",")
        ]
        states.close_torch()
        if group.rank == 0:
            options.out.write_text(json.dumps({"records": records}, indent=1))


if __name__ == "__main__":
    main()
