"""Write the results page in Markdown: each benchmark's method, machine and tables."""

from __future__ import annotations

import statistics
from collections.abc import Mapping, Sequence

import report_strategies
from records import Record, markdown_table

from ferro_bench import size_text, time_text

_TITLES = {
    "ferro-private": "ferro private",
    "ferro-group": "ferro group",
    "torch-gloo": "torch gloo",
    "openmpi": "Open MPI",
    "mpich": "MPICH",
}
_MPIS = {"openmpi", "mpich"}
# Accesses of the whole buffer's size to memory that n ranks on one host cannot do without: every
# input is read once and every output written once. All inputs of all_gather together, and all
# outputs of reduce_scatter together, have that size.
_MEMORY_PASSES = {
    "all_reduce": lambda n: 2 * n,
    "all_to_all": lambda n: 2 * n,
    "all_gather": lambda n: 1 + n,
    "reduce_scatter": lambda n: n + 1,
    "broadcast": lambda n: n,
}
_METHODS = {
    "collectives": """\
float32 on one host, by `ferro bench`. Each library has processes of its own, with one thread for
arithmetic. The libraries take turns within one run, each first as often as last, while the others
wait without using a core. In a turn the ranks write fresh numbers, enter their library's barrier,
make one warm-up call, and then the timed calls, back to back. Every result is compared to the bit.
The time of a call is that of its slowest rank. Each cell has the median and, after the stroke, the
minimum over all calls. "private" is NumPy's memory, "group" is `group.empty`'s. Ratios are of
medians; above 1 ferro is faster. "MPI" is the better of Open MPI and MPICH at that size. all_reduce
and broadcast work in place. Size is the whole buffer (the result of all_gather, the input of the
others). As calls are back to back, the root of a small broadcast may be ahead of the receivers;
such times are those of a stream of broadcasts.

Bound: the bytes that must be read and written at least (all_reduce and all_to_all 2 n times the
size, all_gather and reduce_scatter n + 1 times, broadcast n times), over the memory bandwidth, read
and write, of all cores copying arrays of their own at once, measured before and after in the same
run. The share is the bound over the time: of the median and, after the stroke, of the minimum.
Private arrays must be staged, which costs more than the bound. In caches the share may pass 100 %.

![Median times](collectives.png)""",
    "many": """\
Medians of all_reduce with more ranks than cores, measured as above with few rounds. The more ranks
there are, the smaller is the share of a core that each rank has.""",
    "mpi": """\
ferro over MPI and bare mpi4py in the same processes under one mpiexec, on communicators of their
own, taking turns; float32. all_reduce and broadcast work in place; size is the whole buffer. The
cost is the time that ferro adds to a call: checks, labels, deadlines, and the order of operations.
The aim is 10 % or 2 us, whichever is more. mpi4py's broadcast returns at the root before the other
ranks have the data; ferro's waits until all ranks are known to make the same call.""",
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


def _collectives(result: Record) -> list[str]:
    runs: Mapping[str, Record] = result["by_ranks"]
    parts = []
    for run in runs.values():
        records = run["records"]
        parts.append(_libraries(records[0]["ranks"], run))
        for collective in dict.fromkeys(record["collective"] for record in records):
            chosen = [record for record in records if record["collective"] == collective]
            names = list(chosen[0]["results"])
            parts.append(f"### {collective}, {chosen[0]['ranks']} ranks")
            rows = [_collective_row(record, run["bandwidth_b_s"]) for record in chosen]
            parts.append(markdown_table(["size", *(_TITLES[name] for name in names), *_ratio_heads(names)], rows))
    return parts


def _libraries(ranks: int, run: Record) -> str:
    versions = ", ".join(run["versions"].values())
    bandwidth = run["bandwidth_b_s"] / 1e9
    return f"{ranks} ranks: {versions}; memory, all cores copying: {bandwidth:.1f} GB/s."


def _ratio_heads(names: Sequence[str]) -> list[str]:
    """Return the heads of the columns after the times."""
    heads = ["torch / private"] if "torch-gloo" in names else []
    heads += ["MPI / private", "MPI / group"] if _MPIS & set(names) else []
    return [*heads, "bound / private", "bound / group"]


def _collective_row(record: Record, bandwidth_b_s: float) -> list[str]:
    results = record["results"]
    private, group = (results[name] for name in ("ferro-private", "ferro-group"))
    row = [size_text(record["nbytes"])]
    row += [f"{time_text(r['median_s'])} / {time_text(r['min_s'])}" for r in results.values()]
    if "torch-gloo" in results:
        row.append(_ratio(results["torch-gloo"]["median_s"], private))
    if mpis := [results[name]["median_s"] for name in _MPIS & set(results)]:
        row += [_ratio(min(mpis), private), _ratio(min(mpis), group)]
    passes = _MEMORY_PASSES[record["collective"]](record["ranks"])
    bound_s = passes * record["nbytes"] / bandwidth_b_s
    shares = [[bound_s / ours[key] for key in ("median_s", "min_s")] for ours in (private, group)]
    return [*row, *(f"{median:.0%} / {best:.0%}" for median, best in shares)]


def _ratio(theirs_s: float, ours: Record) -> str:
    return f"{theirs_s / ours['median_s']:.2f}"


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
    return [markdown_table(["", "size", *(_TITLES[name] for name in names)], rows)]


def mpi_summary(record: Record) -> str:
    """Return in one line the number of cases in which ferro's cost over MPI is within the aim."""
    rows = record["records"]
    within = sum(_within(row) for row in rows)
    return f"{record['library']}, {record['ranks']} ranks: {within} of {len(rows)} within"


def _within(row: Record) -> bool:
    ours, bare = row["ferro"]["median_s"], row["mpi4py"]["median_s"]
    return ours <= max(1.1 * bare, bare + 2e-6)


def _mpi(result: Record) -> list[str]:
    parts = []
    for record in result["records"]:
        parts.append(f"### {mpi_summary(record)}")
        rows = []
        for row in record["records"]:
            ours, bare = row["ferro"], row["mpi4py"]
            more_s = ours["median_s"] - bare["median_s"]
            rows.append(
                [
                    row["collective"],
                    size_text(row["nbytes"]),
                    *(f"{time_text(r['median_s'])} / {time_text(r['min_s'])}" for r in (ours, bare)),
                    f"{more_s * 1e6:+.2f} us",
                    f"{more_s / bare['median_s']:+.0%}",
                    "yes" if _within(row) else "no",
                ]
            )
        head = ("", "size", "ferro", "mpi4py", "cost", "share", "within")
        parts.append(markdown_table(head, rows))
    return parts


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
    "collectives": _collectives,
    "many": _many,
    "mpi": _mpi,
    "layers": _layers,
    "hosts": _hosts,
    "imports": _imports,
    **report_strategies.TABLES,
}
