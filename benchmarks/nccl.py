"""Compare ferro over NCCL with bare `cupy.cuda.nccl` and torch.distributed's nccl in one run.

    ferro run -n 2 benchmarks/nccl.py --out benchmarks/results/nccl.json

It needs CuPy, NCCL and a GPU for each rank; torch with CUDA is measured if it can be imported.
Two ranks can share one GPU if NCCL allows it: set NCCL_MULTI_RANK_GPU_ENABLE=1 (NCCL 2.30.3 or
later; before, another NCCL_HOSTID for each rank) and NCCL_MAX_CTAS=4. Then the run compares the
libraries' layers, not the transport.

The libraries take turns on the same ranks, block by block. A block is a number of consecutive calls
on the default stream. It yields two times of a call:

    launch    how long the host is busy until the call returns
    device    from the start of the first call to the end of the last, by events on the stream

The time of a block is that of its slowest rank. all_reduce is in place, the others write to another
array. The reduction is the mean, which keeps the magnitude of the numbers. Before a case is timed,
the result of every library is compared with NumPy's.
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
from records import machine_facts

import ferro
import ferro_bench

SIZES = "4B:256MiB"
COLLECTIVES = ("all_reduce", "all_gather", "reduce_scatter")
_ROUNDS = 15
_BLOCK_S = 0.02  # approximate duration of a block
_MAX_CALLS = 50

Call = Callable[[], object]


@dataclass(frozen=True, slots=True)
class Case:
    """One collective of one size.

    Attributes:
        collective: name of the collective.
        count: float32 numbers in the larger of input and output, a multiple of n.
        n: number of ranks.
    """

    collective: str
    count: int
    n: int

    @property
    def counts(self) -> tuple[int, int]:
        """The number of elements of the input, and of the output."""
        part = self.count // self.n
        return {
            "all_reduce": (self.count, self.count),
            "all_gather": (part, self.count),
            "reduce_scatter": (self.count, part),
        }[self.collective]

    def input_of(self, rank: int) -> np.ndarray:
        """Return a rank's input: small integers, whose sums are exact."""
        return ((np.arange(self.counts[0]) * 7 + rank * 3) % 13 + 1).astype(np.float32)

    def expected(self, rank: int) -> np.ndarray:
        """Return the result on a rank."""
        inputs = [self.input_of(r) for r in range(self.n)]
        if self.collective == "all_gather":
            return np.concatenate(inputs)
        mean = np.mean(inputs, axis=0, dtype=np.float64).astype(np.float32)
        return mean if self.collective == "all_reduce" else np.split(mean, self.n)[rank]


class Library:
    """A library with an input and an output on the GPU; all_reduce uses the output for both."""

    def __init__(self, fill: Callable[[np.ndarray], None], call: Call, read: Callable[[], Any]):
        self.fill, self.call, self.read = fill, call, read


def cupy_library(case: Case, call: Callable[[Any, Any], object]) -> Library:
    """Return a library that works on CuPy arrays; `call` takes input and output."""
    import cupy

    x, out = (cupy.empty(count, cupy.float32) for count in case.counts)
    given = out if case.collective == "all_reduce" else x
    return Library(given.set, lambda: call(given, out), out.get)


def ferro_library(case: Case, group: ferro.ProcessGroup) -> Library:
    return cupy_library(
        case,
        {
            "all_reduce": lambda x, out: group.all_reduce(x, "mean", out=out),
            "all_gather": lambda x, out: group.all_gather(x, out=out),
            "reduce_scatter": lambda x, out: group.reduce_scatter(x, "mean", out=out),
        }[case.collective],
    )


def nccl_library(case: Case, communicator: Any) -> Library:
    """Return bare NCCL on the current stream, which is the lower bound."""
    from cupy.cuda import get_current_stream, nccl

    kind, average = nccl.NCCL_FLOAT32, nccl.NCCL_AVG
    stream = get_current_stream().ptr
    calls = {
        "all_reduce": lambda x, out: communicator.allReduce(x.data.ptr, out.data.ptr, x.size, kind, average, stream),
        "all_gather": lambda x, out: communicator.allGather(x.data.ptr, out.data.ptr, x.size, kind, stream),
        "reduce_scatter": lambda x, out: communicator.reduceScatter(
            x.data.ptr, out.data.ptr, out.size, kind, average, stream
        ),
    }
    return cupy_library(case, calls[case.collective])


def torch_library(case: Case) -> Library:
    """Return torch.distributed; its process group must be open."""
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
    return Library(lambda values: given.copy_(torch.from_numpy(values)), call, lambda: out.cpu().numpy())


def open_torch(group: ferro.ProcessGroup) -> bool:
    """Open torch's process group on the same ranks; return False if some rank cannot."""
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
    dist.init_process_group("nccl", init_method=f"tcp://{host}:{port}", rank=group.rank, world_size=group.world_size)
    return True


def block(group: ferro.ProcessGroup, call: Call, calls: int) -> tuple[float, float]:
    """Run a block of calls; return the seconds of one call on the host and on the device."""
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


def measure(group: ferro.ProcessGroup, case: Case, libraries: dict[str, Library], rounds: int) -> dict[str, object]:
    """Time one case; return medians, minima and ratios to bare NCCL.

    Raises:
        ArithmeticError: a result was wrong.
    """
    for name, library in libraries.items():
        library.fill(case.input_of(group.rank))
        library.call()
        if not np.allclose(library.read(), case.expected(group.rank), rtol=1e-6):
            raise ArithmeticError(f"{name}: wrong result of {case}")
    _, once_s = block(group, libraries["nccl"].call, 3)
    calls = max(1, min(_MAX_CALLS, int(_BLOCK_S / max(once_s, 1e-7))))
    calls = int(group.all_reduce(np.array(calls), "min"))
    times: dict[str, list[tuple[float, float]]] = {name: [] for name in libraries}
    for turn in range(-1, rounds):
        for name in libraries if turn % 2 else reversed(libraries):
            seconds = block(group, libraries[name].call, calls)
            if turn >= 0:
                times[name].append(seconds)
    record: dict[str, Any] = {"collective": case.collective, "nbytes": case.count * 4, "ranks": case.n, "calls": calls}
    for name, own in times.items():
        slowest = group.all_reduce(np.array(own), "max")
        record[name] = {
            f"{kind}_{statistic}_s": float(function(slowest[:, column]))
            for column, kind in enumerate(("launch", "device"))
            for statistic, function in (("median", np.median), ("min", np.min))
        }
    for name in libraries:
        for kind in ("launch", "device"):
            key = f"{kind}_median_s"
            record[name][f"{kind}_ratio_to_nccl"] = record[name][key] / record["nccl"][key]
    return record


def line(record: dict[str, Any]) -> str:
    """Format a case as one line of a table."""
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
    """Measure all cases, and return the results for JSON."""
    from cupy.cuda import nccl

    n = group.world_size
    unique_id = group.broadcast_object(nccl.get_unique_id() if group.rank == 0 else None)
    communicator = nccl.NcclCommunicator(n, unique_id, group.rank)
    with_torch = open_torch(group)
    records = []
    for collective in COLLECTIVES:
        for size in sizes:
            case = Case(collective, max(1, size // 4 // n) * n, n)
            libraries = {"ferro": ferro_library(case, group), "nccl": nccl_library(case, communicator)}
            if with_torch:
                libraries["torch"] = torch_library(case)
            records.append(measure(group, case, libraries, rounds))
            if group.rank == 0:
                print(line(records[-1]), flush=True)
    group.barrier()
    communicator.destroy()
    if with_torch:
        import torch.distributed as dist

        dist.destroy_process_group()
    return {"facts": machine_facts(), "nccl": nccl.get_version(), "records": records}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
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
