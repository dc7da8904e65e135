"""The results as a page to read: what was measured, how, and the numbers."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TypeAlias

from units import size_text, time_text

# What was read from JSON: numbers, words, and records and lists of them.
Record: TypeAlias = Mapping[str, object]

_HOW = {
    "collectives": """\
float32 over TCP on loopback. Both libraries are open in the same processes, with one thread for
arithmetic each, and take turns block by block, each going first in every other round; before a
block all inputs are renewed and the ranks meet in a barrier. A call takes as long as on its
slowest rank. Median and minimum are over all calls of all rounds. Ratio: torch's median over
ferro's, so more than 1 is faster than torch. Rounds won: how often ferro's median of a round was
not above torch's. Every result was compared with the exact sum. all_reduce and broadcast work in
place; size is the whole buffer (the result of all_gather, the input of reduce_scatter).""",
    "imports": """\
Each measured in fresh interpreters taking turns, without the interpreter's own start. The first
row is a difference of medians, and of minima.""",
    "ddp": """\
A multilayer perceptron under DDP with SGD and momentum. Memory is the peak of what Python and
NumPy allocated (tracemalloc) on rank 0 over whole steps after the first, beside what must be
there; parameters, gradients (once, in the buckets) and momentum have one size. Step times are
those of the slowest rank, ferro and torch taking turns in the same processes, one thread each;
they include the arithmetic, which is not ferro's.""",
}


def page(results: Mapping[str, Record]) -> str:
    """Return the page, in Markdown, for the results by name."""
    parts = ["# Benchmark results", "Written by `make bench`; do not edit."]
    for name, text in _HOW.items():
        if name not in results:
            continue
        parts += [f"## {name}", text, _machine(results[name]["machine"])]
        parts += _TABLES[name](results[name]["records"])
    return "\n\n".join(parts) + "\n"


def _machine(facts: Record) -> str:
    words = [f"{facts['cpu']}, {facts['cores']} cores, {facts['system']}"]
    words += [f"{name} {facts[name]}" for name in ("python", "numpy", "torch", "ferro")]
    return f"{facts['date']}: " + "; ".join(words)


def _collectives(records: Sequence[Record]) -> list[str]:
    tables = []
    for key in dict.fromkeys((r["collective"], r["ranks"]) for r in records):
        chosen = [r for r in records if (r["collective"], r["ranks"]) == key]
        head = ("size", "ferro median", "min", "torch median", "min", "ratio", "rounds won")
        rows = [_collective_row(record) for record in chosen]
        tables += [f"### {key[0]}, {key[1]} ranks", _table(head, rows)]
    return tables


def _collective_row(record: Record) -> list[str]:
    row = [size_text(record["nbytes"])]
    for peer in ("ferro", "torch"):
        times = record.get(peer)
        row += [time_text(times[key]) if times else "-" for key in ("median_s", "min_s")]
    if "ratio" not in record:
        return [*row, "-", "-"]
    return [*row, f"{record['ratio']:.2f}", f"{record['rounds_won']:.0%}"]


def _imports(records: Sequence[Record]) -> list[str]:
    head = ("what", "median", "min", "limit")
    rows = [
        [f"`{r['name']}`", *(time_text(r[key]) for key in ("median_s", "min_s", "limit_s"))]
        for r in records
    ]
    return [_table(head, rows)]


def _ddp(records: Sequence[Record]) -> list[str]:
    memory, times = records
    setting = f"Layers {memory['widths']}, batch {memory['batch']}, {memory['ranks']} ranks."
    rows = [[name.replace("_", " "), size_text(n)] for name, n in memory["parts"].items()]
    rows.append(["all of these", size_text(memory["expected_bytes"])])
    rows.append(["measured peak", f"{size_text(memory['peak_bytes'])} ({memory['ratio']:.3f} x)"])
    tables = [setting, _table(("memory", "size"), rows)]
    if "torch" in times:
        steps = [
            [peer, *(time_text(times[peer][key]) for key in ("median_s", "min_s"))]
            for peer in ("ferro", "torch")
        ]
        tables.append(_table(("step", "median", "min"), steps))
    return tables


_TABLES = {"collectives": _collectives, "imports": _imports, "ddp": _ddp}


def _table(head: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    lines = [head, ["---:" if index else "---" for index in range(len(head))], *rows]
    return "\n".join("| " + " | ".join(line) + " |" for line in lines)
