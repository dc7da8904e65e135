"""One rank of the layers benchmark, which splits the time of a small all_reduce into parts.

`run.py` starts it with `ferro run -n N`. Calls of four kinds take turns, all on 4 bytes:

    all_reduce, gloo    the whole
    all_reduce, idle    the same call of a group whose backend does nothing: ferro's own layer
    barrier, gloo       a call in which ranks only wait for each other
    barrier, idle       the layer of that call

The barrier itself takes the third less the fourth. The rest of the whole is the copy into shared
memory, the reduction out of it, and the Python around them.
"""

from __future__ import annotations

import argparse
import json
import statistics
import time
from pathlib import Path

import numpy as np

import ferro
from ferro.backend import Backend
from ferro.group.group_info import GroupInfo
from ferro.rendezvous import MemoryStore

_CALLS = 500


class IdleBackend(Backend):
    """A backend whose operations do nothing."""

    def send(self, buffer, peer, *, tag, deadline):
        """Send nothing."""

    def recv(self, buffer, peer, *, tag, deadline):
        """Receive nothing."""

    def close(self):
        """Close nothing."""

    def agree(self, call, *, deadline):
        """Agree on nothing."""

    def barrier(self, *, deadline):
        """Wait for no rank."""

    def all_reduce(self, buffer, reduction, *, deadline):
        """Reduce nothing."""


def _idle_group(rank: int, world_size: int) -> ferro.ProcessGroup:
    store = MemoryStore()
    members = GroupInfo(
        name="idle",
        backend_name="idle",
        global_ranks=tuple(range(world_size)),
        hosts=("localhost",) * world_size,
        job_store=store,
        store=store,
    )
    return ferro.ProcessGroup(IdleBackend(rank, world_size), members)


def _times(call) -> list[float]:
    times = []
    for _ in range(_CALLS):
        start = time.perf_counter()
        call()
        times.append(time.perf_counter() - start)
    return times


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--out", type=Path, required=True, help="JSON file that rank 0 writes")
    parser.add_argument("--rounds", type=int, default=20)
    options = parser.parse_args()
    with ferro.init("gloo") as group:
        idle = _idle_group(group.rank, group.world_size)
        x = np.zeros(1, np.float32)
        calls = {
            "whole": lambda: group.all_reduce(x, out=x),
            "layer": lambda: idle.all_reduce(x, out=x),
            "barrier": lambda: group.barrier(),
            "barrier_layer": lambda: idle.barrier(),
        }
        times: dict[str, list[float]] = {name: [] for name in calls}
        for _ in range(options.rounds):
            for name, call in calls.items():
                group.barrier()
                times[name] += _times(call)
        if group.rank == 0:
            found = {name: statistics.median(values) for name, values in times.items()}
            options.out.write_text(json.dumps({"ranks": group.world_size, "median_s": found}))


if __name__ == "__main__":
    main()
