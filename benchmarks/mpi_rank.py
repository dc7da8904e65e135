"""One rank of the comparison of ferro over MPI with bare mpi4py, in the same processes.

mpiexec starts it. ferro and mpi4py make the same calls, each on a communicator of its own: ordinary
ones, and persistent operations. They take turns, each first as often as last. A turn begins with a
call on fresh numbers, whose result is checked. Then it makes calls back to back, and yields their
mean time.
"""

from __future__ import annotations

import argparse
import json
import statistics
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np

import ferro
import ferro_bench

_S_PER_BYTE = 2e-9  # a rough estimate, from which the number of calls in a turn follows
_TURN_S = 0.005
_MAX_CALLS = 50  # more sums in place could overflow float32 on 4 ranks


class Case:
    """One collective at one size, with the same buffers for both libraries."""

    def __init__(self, collective: str, nbytes: int, group: ferro.ProcessGroup, comm) -> None:
        from mpi4py import MPI  # ferro.init has initialized MPI

        n, rank = group.world_size, group.rank
        whole = max(1, nbytes // 4 // n) * n if collective in _BLOCKWISE else max(1, nbytes // 4)
        part = whole // n
        self.whole = np.empty(whole, np.float32)
        self.part = np.empty(part, np.float32)
        self.calls: dict[str, Callable[[], object]] = {}
        self._fill: Callable[[], None]
        self._correct: Callable[[], bool]
        total = n * (n + 1) // 2
        w, p = self.whole, self.part
        if collective == "all_reduce":
            self.calls["ferro"] = lambda: group.all_reduce(w, out=w)
            self.calls["mpi4py"] = lambda: comm.Allreduce(MPI.IN_PLACE, w)
            self._make_persistent(group.persistent(collective, w, out=w), comm.Allreduce_init(MPI.IN_PLACE, w))
            self._fill = lambda: w.fill(rank + 1)
            self._correct = lambda: bool((w == total).all())
        elif collective == "all_gather":
            self.calls["ferro"] = lambda: group.all_gather(p, out=w)
            self.calls["mpi4py"] = lambda: comm.Allgather(p, w)
            self._make_persistent(group.persistent(collective, p, out=w), comm.Allgather_init(p, w))
            self._fill = lambda: (p.fill(rank + 1), w.fill(0))
            self._correct = lambda: bool((w.reshape(n, -1) == np.arange(1, n + 1)[:, None]).all())
        elif collective == "reduce_scatter":
            self.calls["ferro"] = lambda: group.reduce_scatter(w, out=p)
            self.calls["mpi4py"] = lambda: comm.Reduce_scatter_block(w, p)
            self._make_persistent(group.persistent(collective, w, out=p), comm.Reduce_scatter_block_init(w, p))
            self._fill = lambda: (w.fill(rank + 1), p.fill(0))
            self._correct = lambda: bool((p == total).all())
        else:
            self.calls["ferro"] = lambda: group.broadcast(w, out=w)
            self.calls["mpi4py"] = lambda: comm.Bcast(w)
            self._make_persistent(group.persistent(collective, w, out=w), comm.Bcast_init(w))
            self._fill = lambda: w.fill(rank + 1)
            self._correct = lambda: bool((w == 1).all())

    def _make_persistent(self, step: Callable[[], object], request) -> None:
        """Add the calls that repeat a persistent operation of ferro's and one of MPI's."""
        start, wait = request.Start, request.Wait

        def repeat() -> None:
            start()
            wait()

        self.calls |= {"ferro_persistent": step, "mpi4py_persistent": repeat}
        self.close = lambda: (step.close(), request.Free())

    def check(self, library: str) -> None:
        """Make one call on fresh numbers, and check its result."""
        self._fill()
        self.calls[library]()
        if not self._correct():
            raise ArithmeticError(f"{library} has a wrong result")
        self._fill()


_BLOCKWISE = ("all_gather", "reduce_scatter")
COLLECTIVES = ("all_reduce", "all_gather", "reduce_scatter", "broadcast")


def _mean_s(call: Callable[[], object], calls: int) -> float:
    """Return the mean seconds of calls that are made back to back."""
    began = time.perf_counter()
    for _ in range(calls):
        call()
    return (time.perf_counter() - began) / calls


def _measure(case: Case, comm, nbytes: int, rounds: int) -> dict[str, dict[str, float]]:
    from mpi4py import MPI

    calls = max(3, min(_MAX_CALLS, int(_TURN_S / (1e-5 + nbytes * _S_PER_BYTE))))
    times: dict[str, list[float]] = {name: [] for name in case.calls}
    for turn in range(rounds):
        names = list(case.calls) if turn % 2 else list(case.calls)[::-1]
        for name in names:
            case.check(name)
            comm.Barrier()
            own_s = _mean_s(case.calls[name], calls)
            times[name].append(comm.allreduce(own_s, MPI.MAX))  # the time of the slowest rank
    return {name: {"median_s": statistics.median(found), "min_s": min(found)} for name, found in times.items()}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--out", type=Path, required=True, help="JSON file that rank 0 writes")
    parser.add_argument("--sizes", type=ferro_bench.parse_sizes, required=True)
    parser.add_argument("--rounds", type=int, default=60)
    options = parser.parse_args()
    with ferro.init("mpi") as group:
        from mpi4py import MPI

        comm = MPI.COMM_WORLD.Dup()
        records = []
        for collective in COLLECTIVES:
            for nbytes in options.sizes:
                case = Case(collective, nbytes, group, comm)
                found = _measure(case, comm, nbytes, options.rounds)
                case.close()
                records.append({"collective": collective, "nbytes": nbytes, **found})
        version = " ".join(MPI.Get_library_version().splitlines()[0].partition(",")[0].split())
        if group.rank == 0:
            result = {"ranks": group.world_size, "library": version, "records": records}
            options.out.write_text(json.dumps(result))


if __name__ == "__main__":
    main()
