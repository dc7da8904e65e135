"""Write the part of the results page about collectives: which cells are behind, all ratios, all times."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from ratios import COLUMNS, all_records, behind, ratio_text, row_name
from records import Record, markdown_table

from ferro_bench import size_text, spread, time_text

TITLES = {
    "ferro-private": "ferro private",
    "ferro-group": "ferro group",
    "ferro-private-persistent": "ferro persistent",
    "torch-gloo": "torch gloo",
    "openmpi": "Open MPI",
    "openmpi-sm": "Open MPI, coll/sm",
    "mpich": "MPICH",
    "openmpi-persistent": "Open MPI persistent",
    "openmpi-sm-persistent": "Open MPI, coll/sm persistent",
    "mpich-persistent": "MPICH persistent",
}
# Accesses of the whole buffer's size to memory that n ranks on one host cannot do without: every
# input is read once and every output written once. All inputs of all_gather together, and all
# outputs of reduce_scatter together, have that size.
_MEMORY_PASSES = {
    "all_reduce": lambda n: 2 * n,
    "all_to_all": lambda n: 2 * n,
    "all_gather": lambda n: 1 + n,
    "reduce_scatter": lambda n: n + 1,
    "broadcast": lambda n: n,
    "reduce": lambda n: n + 1,
    "gather": lambda n: 2,
    "scatter": lambda n: 2,
    "barrier": lambda n: 0,
}
METHOD = """\
float32 on one host, by `ferro bench`. Each library has processes of its own, with one thread for
arithmetic. The libraries take turns within one run, each first as often as last, while the others
wait without using a core. In a turn the ranks write fresh numbers, enter their library's barrier,
make one warm-up call, and then the timed calls, back to back, each on buffers of its own. Every
result is compared to the bit. The time of a call is that of its slowest rank; the tables have
medians, collectives.json also minima and deciles. all_reduce and broadcast work in place. Size is
the whole buffer (the result of all_gather and gather, the input of the others), and at least one
element for each rank where it is cut into blocks. As calls are back to back, ranks of small rooted
collectives may run ahead of the others: the root of broadcast and scatter, the senders of reduce and
gather; such times are those of a stream of calls. Rows with "apart" have a barrier, which is not
timed, before each call, as the OSU micro-benchmarks do.

"private" is ferro's ordinary call with NumPy's memory, "group" with `group.empty`'s, "persistent" is
an operation that `group.persistent` made once, with NumPy's memory. Ratios are of medians; above 1
ferro is faster. "MPI" is the best of the MPIs in that cell; for "persistent" the best of their
ordinary calls and of their own persistent operations (`MPI_Allreduce_init` and its like).

All libraries run under the same conditions, which were the best that we found for the MPIs. No
rank is bound to a core: `--bind-to core` made no difference to either MPI with 2 ranks on 2 cores, and
cost Open MPI a third with 4. Ranks spin as their library does by default. Open MPI spins, and yields
the processor between two looks if there are more ranks than cores (`mpi_yield_when_idle`, which it
sets by itself under `--oversubscribe`); MPICH always yields after 1000 looks
(`MPIR_CVAR_POLLS_BEFORE_YIELD`; 0 and 10 made no difference); ferro's gloo spins briefly, then
sleeps. Both MPIs copy large messages from one process to the other in one step, by the kernel (CMA:
smsc/cma, UCX). "coll/sm" is Open MPI with `--mca coll_sm_priority 90`, its collectives over a shared
segment, which it does not choose by default: quicker for small arrays with 2 ranks, measured there; 5 to 20
times as slow with more ranks than cores, so not measured there.

Bound: the bytes that must be read and written at least, over the memory bandwidth, read and write,
of all cores copying arrays of their own at once, measured before and after in the same run. In
caches the share may pass 100 %.

![Ratios](heatmap.png)"""


def tables(result: Record) -> list[str]:
    """Return the paragraphs of the page."""
    runs: Mapping[str, Record] = result["by_ranks"]
    times = sorted(record["measured"] for record in all_records(runs.values()))
    parts = [f"Measured from {times[0]} to {times[-1]}."]
    parts += [_libraries(ranks, run) for ranks, run in runs.items()]
    # With more ranks than cores some calls take far longer than others, whatever else uses the machine.
    cores = result["machine"]["cores"]
    if noise := spread([record for record in all_records(runs.values()) if record["ranks"] <= cores]):
        parts.append(f"{' '.join(noise).capitalize()}.")
    if lines := summary(runs):  # there is none without peers
        parts.append("\n".join(f"- {line}" for line in lines))
        parts.append("### Ratios")
        parts += [_ratios(ranks, run) for ranks, run in runs.items()]
    parts.append("### Times")
    parts += [_times(run) for run in runs.values()]
    return parts


def summary(runs: Mapping[str, Record]) -> list[str]:
    """Return a line for each column of ratios, with the cells in which ferro is slower."""
    lines = []
    for column in COLUMNS:
        slower, count = behind(runs, column)
        if not count:
            continue
        words: dict[str, list[str]] = {}
        for record in slower:
            cell = f"{size_text(record['size'])} {ratio_text(column.ratio(record))}" if record["size"] else ""
            words.setdefault(f"{row_name(record)} of {record['ranks']}", []).append(
                cell or ratio_text(column.ratio(record))
            )
        cells = "; ".join(f"{name}: {', '.join(sizes)}" for name, sizes in words.items())
        lines.append(f"{column.name}: {count - len(slower)} of {count} cells are 1 or more. Below: {cells or 'none'}")
    return lines


def _libraries(ranks: str, run: Record) -> str:
    versions = ", ".join(dict.fromkeys(run["versions"].values()))
    bandwidth = run["bandwidth_b_s"] / 1e9
    return f"{ranks} ranks: {versions}; memory, all cores copying: {bandwidth:.1f} GB/s."


def _ratios(ranks: str, run: Record) -> str:
    """Return one table with a row for each collective and column of ratios, and a column for each size."""
    records = run["records"]
    sizes = sorted({record["size"] for record in records if record["size"]}) or [0]
    rows = []
    for op in dict.fromkeys(map(row_name, records)):
        for column in COLUMNS:
            cells = {r["size"]: ratio_text(column.ratio(r)) for r in records if row_name(r) == op}
            row = [cells.get(size, "") for size in sizes]
            row[0] = row[0] or cells.get(0, "")  # a barrier has no size
            if any(row):
                rows.append([op, column.name, *row])
    return markdown_table([f"{ranks} ranks", "", *(size_text(size) for size in sizes)], rows)


def _times(run: Record) -> str:
    records = run["records"]
    names = [name for name in TITLES if any(name in record["results"] for record in records)]
    head = [f"{records[0]['ranks']} ranks", "size", *(TITLES[name] for name in names), "bound / group"]
    return markdown_table(head, [_times_row(record, names, run["bandwidth_b_s"]) for record in records])


def _times_row(record: Record, names: Sequence[str], bandwidth_b_s: float) -> list[str]:
    results = record["results"]
    row = [row_name(record), size_text(record["size"]) if record["size"] else ""]
    row += [time_text(results[name]["median_s"]) if name in results else "" for name in names]
    bound_s = _MEMORY_PASSES[record["collective"]](record["ranks"]) * record["nbytes"] / bandwidth_b_s
    group = results.get("ferro-group")
    return [*row, f"{bound_s / group['median_s']:.0%}" if group and bound_s else ""]
