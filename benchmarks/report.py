"""Write the results page in Markdown: each benchmark's method, machine and tables."""

from __future__ import annotations

import statistics
from collections.abc import Mapping

import report_checkpoint
import report_collectives
import report_strategies
from records import Record, markdown_table

from ferro_bench import size_text, time_text

_METHODS = {
    "collectives": report_collectives.METHOD,
    "many": """\
Medians of all_reduce with 16 ranks, measured as above with few rounds.""",
    "mpi": """\
ferro over MPI and bare mpi4py in the same processes under one mpiexec, on communicators of their
own, taking turns; float32; medians. all_reduce and broadcast work in place; size is the whole
buffer. The cost is the time that ferro adds to a call: checks, labels, deadlines, and the order of
operations. The aim is 10 % or 1.5 us, whichever is more. "Persistent" are operations made once by
`group.persistent`, and by MPI's `MPI_Allreduce_init` and its like. mpi4py's broadcast returns at the
root before the other ranks have the data; ferro's waits until all ranks are known to make the same
call.""",
    "layers": """\
The parts of an all_reduce of 4 bytes. "Layer" is the same call of a group whose backend does
nothing: checks, the result's memory, sequence number, executor and deadline. "Barrier" is a barrier
less its own layer: the ranks publish their labels, wait for each other, and compare. The rest is
the copy into shared memory, the reduction out of it, and the Python around them. MPI's whole call
takes about as long as the barrier.""",
    "hosts": """\
The hosts are network namespaces, joined by a link whose rate `tc` limits; `sudo python
benchmarks/hosts.py` measures them. "Plain sockets" send the same bytes both ways without a
protocol: the share of the rate that frames and headers leave. "Hierarchical" is ferro's default,
"flat" is ferro with `shared_memory` off.""",
    "imports": """\
Each program runs in fresh interpreters, in turns with the others; the interpreter's own start is
not included. The first row is a difference of medians, and of minima.""",
    **report_strategies.METHODS,
    **report_checkpoint.METHODS,
}

NAMES = tuple(_METHODS)


def page(results: Mapping[str, Record]) -> str:
    """Return the page in Markdown for results by name."""
    parts = ["# Benchmark results", "Written by `make bench`; do not edit."]
    for name, text in _METHODS.items():
        if name not in results:
            continue
        parts += [f"## {name}", text, _machine(results[name]["machine"])]
        parts += _TABLES[name](results[name])
    return "\n\n".join(parts) + "\n"


def _machine(facts: Record) -> str:
    words = [f"{facts['cpu']}, {facts['cores']} cores, {facts['system']}"]
    words += [f"{name} {facts[name]}" for name in ("python", "numpy", "torch", "ferro")]
    return f"{facts['date']}: " + "; ".join(words)


def _imports(result: Record) -> list[str]:
    head = ("what", "median", "min", "limit")
    rows = [
        [f"`{r['name']}`", *(time_text(r[key]) for key in ("median_s", "min_s", "limit_s"))] for r in result["records"]
    ]
    return [markdown_table(head, rows)]


def _many(result: Record) -> list[str]:
    runs: Mapping[str, Record] = result["by_ranks"]
    names = list(next(iter(runs.values()))["records"][0]["results"])
    rows = [
        [
            f"{ranks} ranks",
            size_text(record["nbytes"]),
            *(time_text(record["results"][name]["median_s"]) for name in names),
        ]
        for ranks, run in runs.items()
        for record in run["records"]
    ]
    return [markdown_table(["", "size", *(report_collectives.TITLES[name] for name in names)], rows)]


def mpi_summary(record: Record) -> str:
    """Return in one line the number of cases in which ferro's cost over MPI is within the aim."""
    rows = record["records"]
    within = sum(_within(row) for row in rows)
    return f"{record['library']}, {record['ranks']} ranks: {within} of {len(rows)} within"


def _within(row: Record) -> bool:
    ours, bare = row["ferro"]["median_s"], row["mpi4py"]["median_s"]
    return ours <= max(1.1 * bare, bare + 1.5e-6)


def _mpi(result: Record) -> list[str]:
    parts = []
    for record in result["records"]:
        parts.append(f"### {mpi_summary(record)}")
        kinds = [kind for kind in ("", "_persistent") if f"ferro{kind}" in record["records"][0]]
        rows = []
        for row in record["records"]:
            cells = [row["collective"], size_text(row["nbytes"])]
            for kind in kinds:
                cells += [time_text(row[f"{name}{kind}"]["median_s"]) for name in ("ferro", "mpi4py")]
                cells += _cost(row, kind)
            rows.append([*cells, "yes" if _within(row) else "no"])
        head = ["", "size"]
        for kind in kinds:
            head += [f"{name}{kind.replace('_', ' ')}" for name in ("ferro", "mpi4py")] + ["cost", "share"]
        parts.append(markdown_table([*head, "ordinary call within"], rows))
    return parts


def _cost(row: Record, kind: str) -> tuple[str, str]:
    """Return the time that ferro adds to mpi4py's call, and its share of that call."""
    ours, bare = (row[f"{name}{kind}"]["median_s"] for name in ("ferro", "mpi4py"))
    return f"{(ours - bare) * 1e6:+.2f} us", f"{ours / bare - 1:+.0%}"


def _layers(result: Record) -> list[str]:
    rows = []
    for record in result["records"]:
        found = record["median_s"]
        barrier = found["barrier"] - found["barrier_layer"]
        rest = found["whole"] - found["layer"] - barrier
        parts = (found["whole"], found["layer"], barrier, rest)
        rows.append([f"{record['ranks']} ranks", *(time_text(max(0.0, part)) for part in parts)])
    return [markdown_table(("", "whole", "layer", "barrier", "rest"), rows)]


def _hosts(result: Record) -> list[str]:
    crossing_bytes = 2 * (result["hosts"] - 1) / result["hosts"] * result["nbytes"]
    rows = []
    for name, seconds in result["seconds"].items():
        median, best = statistics.median(seconds), min(seconds)
        share = crossing_bytes * 8 / median / (result["mbit"] * 1e6)
        rows.append([name, time_text(median), time_text(best), f"{share:.1%}"])
    setting = (
        f"{result['hosts']} hosts, {result['ranks_per_host']} ranks each, "
        f"{result['mbit']:g} Mbit/s each way, MTU {result['mtu']}, {size_text(result['nbytes'])}."
    )
    return [setting, markdown_table(("all_reduce", "median", "min", "share of the link's rate"), rows)]


_TABLES = {
    "collectives": report_collectives.tables,
    "many": _many,
    "mpi": _mpi,
    "layers": _layers,
    "hosts": _hosts,
    "imports": _imports,
    **report_strategies.TABLES,
    **report_checkpoint.TABLES,
}
