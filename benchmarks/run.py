"""Measure ferro beside torch.distributed gloo, Open MPI and MPICH; write JSON, a page, a heat map.

    python benchmarks/run.py --compare torch-gloo,openmpi=PYTHON,mpich=PYTHON   half an hour
    python benchmarks/run.py --only collectives --compare …                     of them, a quarter hour
    python benchmarks/run.py --only collectives --ranks 2 --ops all_reduce,barrier --sizes 4B,64KiB --compare …
    python benchmarks/run.py --quick                                            two minutes

PYTHON is the interpreter of an environment with mpi4py and that MPI; `make bench` prepares them.
All ranks are on one host. No time makes a benchmark fail; a wrong result does.

Where --ranks, --ops or --sizes choose a part of the collectives, only these cells are written anew. `--quick` writes
to a folder of its own.
"""

from __future__ import annotations

import argparse
import importlib.util
import json
import os
import subprocess
import sys
import tempfile
from collections.abc import Callable
from pathlib import Path

import checkpoint
import collectives
import heatmap
import imports
import parity
import report
import report_collectives
import report_strategies
from records import integers, machine_facts

import ferro_bench

_HERE = Path(__file__).resolve().parent
_TRAINING_RANKS = 2
_FEW_RANKS = (2, 4)
# Strategy, ranks, optimizer, and widths of the layers, of 10 and 100 million parameters.
_MEMORY = (
    ("ddp", 2, "sgd", "784,2048*3,10"),
    ("ddp", 4, "adamw", "784,1024*95,10"),
    ("fsdp", 4, "adamw", "784,1024*95,10"),
    ("fsdp", 4, "adamw", "784,2048*24,10"),
)
_QUICK_MEMORY = (("ddp", 2, "sgd", "784,256*3,10"), ("fsdp", 2, "adamw", "784,256*3,10"))
# Widths of the layers, rows in a rank's batch, and number of rounds. A larger batch has more arithmetic for as many
# gradients.
_TIMED = (("784,2048*3,10", 64, 16), ("784,2048*3,10", 256, 8), ("784,2048*24,10", 64, 4))
_DEADLINE_S = 600.0
# All libraries compute in one thread and use the loopback interface; root may run Open MPI.
_ENVIRONMENT = {
    "OMP_NUM_THREADS": "1",
    "OPENBLAS_NUM_THREADS": "1",
    "MKL_NUM_THREADS": "1",
    "GLOO_SOCKET_IFNAME": "lo",
    "OMPI_ALLOW_RUN_AS_ROOT": "1",
    "OMPI_ALLOW_RUN_AS_ROOT_CONFIRM": "1",
}


def main() -> None:
    options = _options()
    options.out.mkdir(parents=True, exist_ok=True)
    for name in options.only or _BENCHMARKS:
        print(f"-- {name}", flush=True)
        result = {"machine": machine_facts(), **_BENCHMARKS[name](options)}
        (options.out / f"{name}.json").write_text(json.dumps(result, indent=1) + "\n")
    written = {
        name: json.loads((options.out / f"{name}.json").read_text())
        for name in report.NAMES
        if (options.out / f"{name}.json").exists()
    }
    (options.out / "README.md").write_text(report.page(written))


def _options() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add = parser.add_argument
    add("--only", action="append", choices=_BENCHMARKS, help="may be repeated")
    add("--quick", action="store_true", help="fewer rounds and sizes: under a minute")
    add("--ops", type=lambda text: text.split(","), help=f"collectives: {','.join(collectives.OPS)}")
    add("--sizes", type=ferro_bench.parse_sizes, help=f"of collectives; {collectives.SIZES} by default")
    add("--ranks", type=integers, help="2,4,8 by default; 2,4 for layers and mpi")
    add("--compare", type=ferro_bench.parse_peers, default={}, help="as in `ferro bench --help`")
    add("--out", type=Path, help="folder to write to; benchmarks/results, or benchmarks/results-quick")
    options = parser.parse_args()
    if options.out is None:
        options.out = _HERE / ("results-quick" if options.quick else "results")
    if unknown := set(options.ops or ()) - set(collectives.OPS):
        parser.error(f"--ops: unknown {', '.join(sorted(unknown))}; there are {', '.join(collectives.OPS)}")
    return options


def _collectives(options: argparse.Namespace) -> dict[str, object]:
    quick = options.quick
    selection = collectives.Selection(
        ops=options.ops or collectives.OPS,
        sizes=options.sizes or ferro_bench.parse_sizes(collectives.QUICK_SIZES if quick else collectives.SIZES),
        peers=options.compare,
        rounds=collectives.QUICK_ROUNDS if quick else None,
    )
    written = options.out / "collectives.json"
    part = any((options.ops, options.sizes, options.ranks))
    runs = json.loads(written.read_text())["by_ranks"] if part and written.exists() else {}
    for ranks in options.ranks or (collectives.QUICK_RANKS if quick else collectives.RANKS):
        run, earlier = collectives.measure(selection, ranks), runs.get(str(ranks))
        runs[str(ranks)] = collectives.merged(earlier, run) if earlier else run
    runs = dict(sorted(runs.items(), key=lambda item: int(item[0])))
    print(*report_collectives.summary(runs), sep="\n", flush=True)
    if importlib.util.find_spec("matplotlib") is not None:
        heatmap.draw(runs, options.out / "heatmap.png")
    return {"by_ranks": runs}


def _imports(options: argparse.Namespace) -> dict[str, object]:
    records = imports.measure(1 if options.quick else 21)
    for record in records:
        median, limit = (ferro_bench.time_text(record["median_s"]), ferro_bench.time_text(record["limit_s"]))
        print(f"{record['name']}: {median}, limit {limit}", flush=True)
    return {"records": records}


def _training(options: argparse.Namespace) -> dict[str, object]:
    """Measure memory and time of training steps under ferro's and torch's DDP and FSDP."""
    quick = options.quick
    memory = []
    for strategy, ranks, optimizer, widths in _QUICK_MEMORY if quick else _MEMORY:
        arguments = [f"--strategy={strategy}", f"--optimizer={optimizer}", f"--widths={widths}"]
        arguments += ["--rounds=2", "--batch=16"]
        memory.append(_run_ranks(_ferro_run(ranks), "training.py", ["memory", *arguments]))
        ratio = memory[-1]["ratio"]
        print(f"{strategy}, {ranks} ranks: peak {ratio:.3f} x the expected bytes", flush=True)
    times = []
    for widths, batch, rounds in (("784,256*3,10", 64, 2),) if quick else _TIMED:
        arguments = ["times", f"--widths={widths}", f"--batch={batch}", f"--rounds={rounds}"]
        peer = [] if "torch-gloo" in options.compare else ["--without-torch"]
        times.append(_run_ranks(_ferro_run(_TRAINING_RANKS), "training.py", [*arguments, *peer]))
        observed = [*arguments, "--without-torch", "--observed"]
        times[-1]["observed"] = _run_ranks(_ferro_run(_TRAINING_RANKS), "training.py", observed)["steps"]
        for name, step in times[-1]["steps"].items():
            overhead = report_strategies.overhead_text(name, times[-1]["steps"])
            print(f"step, {name}: {ferro_bench.time_text(step['median_s'])} {overhead}", flush=True)
    return {"memory": memory, "times": times}


def _pipeline(options: argparse.Namespace) -> dict[str, object]:
    """Measure the bubble of pipelines on two ranks that compute, and on four that wait."""
    records = []
    for ranks, kind in ((2, "arithmetic"), (4, "device")):
        arguments = [f"--kind={kind}", f"--microbatches={'2' if options.quick else '4,8'}"]
        arguments += ["--rows=8", "--width=64"] if options.quick else []
        records += _run_ranks(_ferro_run(ranks), "pipeline.py", arguments)["records"]
    for record in records:
        simulated, measured = (record[key]["bubble"] for key in ("simulated", "measured"))
        name = f"{record['schedule']}, {record['ranks']} ranks, m={record['microbatches']}"
        print(f"{name}: bubble {measured:.1%}, by the schedule {simulated:.1%}", flush=True)
    return {"records": records}


def _parity(options: argparse.Namespace) -> dict[str, object]:
    """Compare every strategy with one process; ranks are processes, or threads if quick."""
    ranks = (1, 2) if options.quick else parity.RANKS
    return parity.measure(ranks, simulate=options.quick)


def _many(options: argparse.Namespace) -> dict[str, object]:
    """Measure all_reduce with more ranks than cores."""
    selection = collectives.Selection(
        ops=["all_reduce"],
        sizes=ferro_bench.parse_sizes(collectives.MANY_SIZES),
        peers=options.compare,
        rounds=collectives.QUICK_ROUNDS if options.quick else collectives.MANY_ROUNDS,
    )
    return {"by_ranks": {str(n): collectives.measure(selection, n) for n in collectives.MANY_RANKS}}


def _mpi(options: argparse.Namespace) -> dict[str, object]:
    """Measure ferro over MPI and bare mpi4py in the same processes."""
    arguments = [f"--rounds={8 if options.quick else 60}"]
    arguments.append("--sizes=4B,64KiB" if options.quick else "--sizes=4B:64MiB")
    records = []
    for name in sorted({"openmpi", "mpich"} & set(options.compare)):
        peer = ferro_bench.find(name, options.compare[name])
        assert peer.mpiexec is not None, "an MPI has a launcher"
        oversubscribe = [] if name == "mpich" else ["--oversubscribe"]
        for ranks in options.ranks or _FEW_RANKS:
            launch = [peer.mpiexec, *oversubscribe, "-n", str(ranks), peer.python]
            records.append(_run_ranks(launch, "mpi_rank.py", arguments))
            print(report.mpi_summary(records[-1]), flush=True)
    return {"records": records}


def _layers(options: argparse.Namespace) -> dict[str, object]:
    arguments = [f"--rounds={4 if options.quick else 20}"]
    records = [_run_ranks(_ferro_run(ranks), "layers.py", arguments) for ranks in options.ranks or _FEW_RANKS]
    for record in records:
        parts = ", ".join(f"{k} {ferro_bench.time_text(v)}" for k, v in record["median_s"].items())
        print(f"{record['ranks']} ranks: {parts}", flush=True)
    return {"records": records}


def _checkpoint(options: argparse.Namespace) -> dict[str, object]:
    """Measure checkpoints beside torch's and the raw disk; the folder of temporary files is on that disk."""
    ranks = checkpoint.Ranks(None, quick=options.quick, with_torch="torch-gloo" in options.compare)
    return checkpoint.measure(ranks, options.out)


_BENCHMARKS: dict[str, Callable[[argparse.Namespace], dict[str, object]]] = {
    "collectives": _collectives,
    "many": _many,
    "mpi": _mpi,
    "layers": _layers,
    "imports": _imports,
    "training": _training,
    "pipeline": _pipeline,
    "parity": _parity,
    "checkpoint": _checkpoint,
}


def _ferro_run(ranks: int) -> list[str]:
    return [sys.executable, "-m", "ferro", "run", "-n", str(ranks)]


def _run_ranks(launch: list[str], script: str, arguments: list[str]) -> dict[str, object]:
    """Run a script as ranks and show its output; return the record that rank 0 wrote."""
    with tempfile.TemporaryDirectory() as folder:
        written = Path(folder) / "result.json"
        subprocess.run(
            [*launch, str(_HERE / script), *arguments, f"--out={written}"],
            env=os.environ | _ENVIRONMENT,
            check=True,
            timeout=_DEADLINE_S,
        )
        return json.loads(written.read_text())


if __name__ == "__main__":
    main()
