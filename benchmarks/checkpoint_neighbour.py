"""One rank of the checkpoint benchmark: a state restored from the ranks' memories, beside a load from disk.

`checkpoint.py` starts it with `ferro run -n 3`. Ranks 0 and 1 save, into their memories and to disk. Then rank 2, which
has nothing, takes the place of rank 1, and the two restore the state: from memory, where rank 0 has its own part and a
copy of rank 1's, and from disk, with the files in the page cache and without.
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
from ferro_checkpoint import Checkpointer, load, save

_TIMEOUT_S = 120.0


def turn(
    world: ferro.ProcessGroup, saving: ferro.ProcessGroup | None, layout: str, layers: int, folder: Path
) -> dict[str, float]:
    """Save and restore once; return the seconds of the slower rank."""
    path = folder / layout
    own: Checkpointer | None = None
    if saving is not None:
        model = states.ferro_model(layout, layers, saving.rank, 2)
        save(path, {"model": model}, saving)
        own = Checkpointer(None, saving, in_memory=True, timeout_s=_TIMEOUT_S)
        own.save(1, {"model": model})
        own.wait()
    restoring = None if world.rank == 1 else world.subgroup([0, 2])
    seconds: dict[str, float] = {}
    if restoring is not None:
        state = {"model": states.ferro_model(layout, layers, restoring.rank, 2)}
        if own is None:
            own = Checkpointer(None, restoring, in_memory=True, timeout_s=_TIMEOUT_S)
        keeper = own
        seconds["disk, warm"] = _seconds(restoring, lambda: load(path, state, restoring))
        if restoring.rank == 0:
            states.drop_from_cache(path)
        seconds["disk, cold"] = _seconds(restoring, lambda: load(path, state, restoring))
        expected = [piece.data.copy() for piece in state["model"].pieces.values()]
        for piece in state["model"].pieces.values():
            piece.data[...] = 0
        seconds["memory"] = _seconds(restoring, lambda: keeper.resume(into=state, group=restoring))
        for piece, data in zip(state["model"].pieces.values(), expected, strict=True):
            if not np.array_equal(piece.data, data):
                raise ArithmeticError(f"rank {world.rank}: what was restored is not what was saved")
    world.barrier(timeout_s=_TIMEOUT_S)
    if own is not None:
        own.close()
    if restoring is not None:
        restoring.close()
    if world.rank == 0:
        states.remove(path)
    return seconds


def _seconds(group: ferro.ProcessGroup, operation: Callable[[], object]) -> float:
    group.barrier()
    start = time.perf_counter()
    operation()
    return float(group.all_reduce(np.array([time.perf_counter() - start]), "max")[0])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, required=True, help="JSON file that rank 0 writes")
    parser.add_argument("--folder", type=Path, required=True, help="where checkpoints are written")
    parser.add_argument("--layouts", default="shards,replicated")
    parser.add_argument("--layers", type=int, default=64, help="of 16 MiB each")
    parser.add_argument("--turns", type=int, default=5)
    options = parser.parse_args()
    records = []
    with ferro.init("gloo") as world:
        saving = None if world.rank == 2 else world.subgroup([0, 1])
        for layout in options.layouts.split(","):
            times = [turn(world, saving, layout, options.layers, options.folder) for _ in range(options.turns)]
            seconds = {name: [each[name] for each in times] for name in times[0]}
            records.append({"layout": layout, "nbytes": options.layers * states.LAYER_BYTES, "seconds": seconds})
        if world.rank == 0:
            options.out.write_text(json.dumps({"records": records}, indent=1))


if __name__ == "__main__":
    main()
