"""ferro over NCCL beside bare `cupy.cuda.nccl` and torch.distributed's nccl, in one run.

    ferro run -n 2 benchmarks/nccl.py --out benchmarks/results/nccl.json

It needs CuPy, NCCL and a GPU for each rank; torch with CUDA joins in where it can be imported.
On one GPU two ranks can take turns where NCCL allows it: set NCCL_MULTI_RANK_GPU_ENABLE=1 (NCCL
2.30.3 or later; before, another NCCL_HOSTID for each rank) and NCCL_MAX_CTAS=4. What is compared
then is the libraries' layers, not the transport.

Contestants take turns, block by block, on the same ranks. A block is some calls one after the
other on the default stream; of each block two times are kept, for one call:

    launch    how long the host is busy until the call has returned
    device    from the first call's begin to the last one's end, by events on the stream

A block takes as long as on the slowest rank. all_reduce is in place, the others go from one array
to another; the reduction is the mean, under which numbers stay of one size. Before a case counts,
every contestant's result is compared with NumPy's.
"""

from __future__ import annotations

import argparse
import json
import socket
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from machine import facts

import ferro
import ferro_bench

SIZES = "4B:256MiB"
COLLECTIVES = ("all_reduce", "all_gather", "reduce_scatter")
_ROUNDS = 15
_BLOCK_S = 0.02  # about how long a block may take
_MOST_CALLS = 50

Call = Callable[[], object]


@dataclass(frozen=True, slots=True)
class Case:
    """One collective of one size.

    Attributes:
        collective: its name.
        count: float32 numbers in the whole: the larger of input and output, a multiple of n.
        n: number of ranks.
    """

    collective: str
    count: int
    n: int

    @property
    def counts(self) -> tuple[int, int]:
        """Numbers in the input and in the output."""
        part = self.count // self.n
        return {
            "all_reduce": (self.count, self.count),
            "all_gather": (part, self.count),
            "reduce_scatter": (self.count, part),
        }[self.collective]

    def given(self, rank: int) -> np.ndarray:
        """Return a rank's numbers: whole and small, so that sums of them are exact."""
        return ((np.arange(self.counts[0]) * 7 + rank * 3) % 13 + 1).astype(np.float32)

    def wanted(self, rank: int) -> np.ndarray:
        """Return the result on a rank."""
        everyones = [self.given(r) for r in range(self.n)]
        if self.collective == "all_gather":
            return np.concatenate(everyones)
        mean = np.mean(everyones, axis=0, dtype=np.float64).astype(np.float32)
        return mean if self.collective == "all_reduce" else np.split(mean, self.n)[rank]


class Contestant:
    """A library with an input and an output on the GPU; all_reduce works in the output."""

    def __init__(self, fill: Callable[[np.ndarray], None], call: Call, read: Callable[[], Any]):
        self.fill, self.call, self.read = fill, call, read


def on_cupy(case: Case, call: Callable[[Any, Any], object]) -> Contestant:
    """Return a contestant that works on CuPy arrays; `call` is given input and output."""
    import cupy

    x, out = (cupy.empty(count, cupy.float32) for count in case.counts)
    given = out if case.collective == "all_reduce" else x
    return Contestant(given.set, lambda: call(given, out), out.get)


def on_ferro(case: Case, group: ferro.ProcessGroup) -> Contestant:
    """Return ferro."""
    return on_cupy(
        case,
        {
            "all_reduce": lambda x, out: group.all_reduce(x, "mean", out=out),
            "all_gather": lambda x, out: group.all_gather(x, out=out),
            "reduce_scatter": lambda x, out: group.reduce_scatter(x, "mean", out=out),
        }[case.collective],
    )


def on_nccl(case: Case, communicator: Any) -> Contestant:
    """Return bare NCCL, on the stream that is current: the least that is possible."""
    from cupy.cuda import get_current_stream, nccl

    kind, average = nccl.NCCL_FLOAT32, nccl.NCCL_AVG
    stream = get_current_stream().ptr
    calls = {
        "all_reduce": lambda x, out: communicator.allReduce(
            x.data.ptr, out.data.ptr, x.size, kind, average, stream
        ),
        "all_gather": lambda x, out: communicator.allGather(
            x.data.ptr, out.data.ptr, x.size, kind, stream
        ),
        "reduce_scatter": lambda x, out: communicator.reduceScatter(
            x.data.ptr, out.data.ptr, out.size, kind, average, stream
        ),
    }
    return on_cupy(case, calls[case.collective])


def on_torch(case: Case) -> Contestant:
    """Return torch.distributed, whose process group is open."""
    import torch
    import torch.distributed as dist

    x, out = (torch.empty(count, device="cuda") for count in case.counts)
    given = out if case.collective == "all_reduce" else x
    average = dist.ReduceOp.AVG
    call = {
        "all_reduce": lambda: dist.all_reduce(out, average),
        "all_gather": lambda: dist.all_gather_into_tensor(out, x),
        "reduce_scatter": lambda: dist.reduce_scatter_tensor(out, x, average),
    }[case.collective]
    return Contestant(
        lambda values: given.copy_(torch.from_numpy(values)), call, lambda: out.cpu().numpy()
    )


def open_torch(group: ferro.ProcessGroup) -> bool:
    """Open torch's process group on the same ranks; say whether all of them could."""
    try:
        import torch
        import torch.distributed as dist

        able = torch.cuda.is_available() and dist.is_nccl_available()
    except ImportError:
        able = False
    if not all(group.all_gather_object(able)):
        return False
    hosts = group.all_gather_object(socket.gethostname())
    host = hosts[0] if len(set(hosts)) > 1 else "127.0.0.1"
    with socket.socket() as free:
        free.bind(("", 0))
        port = free.getsockname()[1]
    port = group.broadcast_object(port)
    torch.cuda.set_device(group.local_rank % torch.cuda.device_count())
    dist.init_process_group(
        "nccl", init_method=f"tcp://{host}:{port}", rank=group.rank, world_size=group.world_size
    )
    return True


def block(group: ferro.ProcessGroup, call: Call, calls: int) -> tuple[float, float]:
    """Return the seconds of one call for the host and for the device, over a block of calls."""
    import cupy

    stream = cupy.cuda.get_current_stream()
    begin, end = cupy.cuda.Event(), cupy.cuda.Event()
    stream.synchronize()
    group.barrier()
    stream.record(begin)
    start = time.perf_counter()
    for _ in range(calls):
        call()
    launched = time.perf_counter() - start
    stream.record(end)
    end.synchronize()
    return launched / calls, cupy.cuda.get_elapsed_time(begin, end) / 1e3 / calls


def measure(
    group: ferro.ProcessGroup, case: Case, contestants: dict[str, Contestant], rounds: int
) -> dict[str, object]:
    """Return one case's times, with medians, minima and ratios to bare NCCL.

    Raises:
        ArithmeticError: a result was wrong.
    """
    for name, contestant in contestants.items():
        contestant.fill(case.given(group.rank))
        contestant.call()
        if not np.allclose(contestant.read(), case.wanted(group.rank), rtol=1e-6):
            raise ArithmeticError(f"{name}: wrong result of {case}")
    _, once = block(group, contestants["nccl"].call, 3)
    calls = max(1, min(_MOST_CALLS, int(_BLOCK_S / max(once, 1e-7))))
    calls = int(group.all_reduce(np.array(calls), "min"))
    times: dict[str, list[tuple[float, float]]] = {name: [] for name in contestants}
    for turn in range(-1, rounds):
        for name in contestants if turn % 2 else reversed(contestants):
            found = block(group, contestants[name].call, calls)
            if turn >= 0:
                times[name].append(found)
    record: dict[str, Any] = {
        "collective": case.collective,
        "nbytes": case.count * 4,
        "ranks": case.n,
        "calls": calls,
    }
    for name, own in times.items():
        slowest = group.all_reduce(np.array(own), "max")
        record[name] = {
            f"{what}_{how}_s": float(function(slowest[:, column]))
            for column, what in enumerate(("launch", "device"))
            for how, function in (("median", np.median), ("min", np.min))
        }
    for name in contestants:
        for what in ("launch", "device"):
            key = f"{what}_median_s"
            record[name][f"{what}_ratio_to_nccl"] = record[name][key] / record["nccl"][key]
    return record


def line(record: dict[str, Any]) -> str:
    """Return a case as one line of a table."""
    words = [f"{record['collective']:<14} {ferro_bench.size_text(record['nbytes']):>8}"]
    for name in ("ferro", "nccl", "torch"):
        if name in record:
            own = record[name]
            launch = ferro_bench.time_text(own["launch_median_s"])
            device = ferro_bench.time_text(own["device_median_s"])
            words.append(f"{name}: launch {launch:>8} device {device:>8}")
    words.append(f"ferro/nccl {record['ferro']['device_ratio_to_nccl']:.2f}")
    return "   ".join(words)


def compare(group: ferro.ProcessGroup, sizes: list[int], rounds: int) -> dict[str, object]:
    """Measure all cases; return the results, ready for JSON."""
    from cupy.cuda import nccl

    n = group.world_size
    unique_id = group.broadcast_object(nccl.get_unique_id() if group.rank == 0 else None)
    communicator = nccl.NcclCommunicator(n, unique_id, group.rank)
    with_torch = open_torch(group)
    records = []
    for collective in COLLECTIVES:
        for size in sizes:
            case = Case(collective, max(1, size // 4 // n) * n, n)
            contestants = {"ferro": on_ferro(case, group), "nccl": on_nccl(case, communicator)}
            if with_torch:
                contestants["torch"] = on_torch(case)
            records.append(measure(group, case, contestants, rounds))
            if group.rank == 0:
                print(line(records[-1]), flush=True)
    group.barrier()
    communicator.destroy()
    if with_torch:
        import torch.distributed as dist

        dist.destroy_process_group()
    return {"facts": facts(), "nccl": nccl.get_version(), "records": records}


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--out", type=Path, help="JSON file that rank 0 writes")
    parser.add_argument("--sizes", default=SIZES, help="bytes, such as 4B,1MiB or 4B:256MiB")
    parser.add_argument("--rounds", type=int, default=_ROUNDS)
    options = parser.parse_args()
    found = ferro.backends.available()["nccl"]
    if not found.ok:
        sys.exit(f"benchmarks/nccl.py needs CuPy, NCCL and a GPU: {found.reason}. {found.hint}")
    with ferro.init("nccl") as group:
        record = compare(group, ferro_bench.parse_sizes(options.sizes), options.rounds)
        if group.rank == 0 and options.out:
            options.out.write_text(json.dumps(record, indent=1))


if __name__ == "__main__":
    main()
