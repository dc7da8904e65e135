"""The table on the terminal, a row as soon as its case is measured; its legend, and how far its samples spread."""

from __future__ import annotations

from collections.abc import Sequence
from operator import itemgetter
from typing import TextIO

from ferro_bench.contestants import Contestant
from ferro_bench.rank.case import REDUCING
from ferro_bench.sizes import size_text
from ferro_bench.summary import BenchRecord, Result

_MOST_COLUMNS = 100
_WIDTHS = {"size": 8, "count": 9, "dtype": 8, "op": 4, "time us": 8, "min us": 8, "algbw": 6, "busbw": 6, "wrong": 5}
_LEAST_NEEDED = (
    "dtype",
    "op",
    "count",
    "min us",
    "algbw",
)  # columns that a table goes without where it would be too wide
_WIDE_SPREAD = 3.0


class ResultTable:
    """One collective's rows: one for each size, and each memory and algorithm of ferro's."""

    def __init__(self, stream: TextIO, collective: str, ours: Sequence[Contestant], peers: Sequence[str]) -> None:
        """Write the header.

        Args:
            stream: where to write.
            collective: the collective that is measured.
            ours: ferro's contestants.
            peers: names of the others.
        """
        self._stream = stream
        self._ours = ours
        self._peers = peers
        widths = dict(_WIDTHS)
        if collective not in REDUCING:
            del widths["op"]
        if len({contestant.memory for contestant in ours}) > 1:
            widths["memory"] = 7
        if any(contestant.algorithm for contestant in ours):
            widths["algorithm"] = max(len("algorithm"), *(len(contestant.algorithm) for contestant in ours))
        if any(contestant.persistent for contestant in ours):
            widths["calls"] = len("persistent")
        for peer in peers:
            widths |= {peer: max(len(peer), 8), f"{peer} ratio": 5}
        self._separator = "  "
        for name in (None, "", *_LEAST_NEEDED):  # as it is, then closer together, then without the least needed
            if name is not None:
                self._separator = " "
                widths.pop(name, 0)
            if sum(widths.values()) + len(self._separator) * (len(widths) - 1) <= _MOST_COLUMNS:
                break
        order = ["size", "count", "dtype", "op", "memory", "algorithm", "calls"]
        self._widths = {
            name: widths[name] for name in sorted(widths, key=lambda it: order.index(it) if it in order else 9)
        }
        self._write({name: "ratio" if name.endswith(" ratio") else name for name in self._widths})

    def add(self, record: BenchRecord) -> None:
        """Write the rows of a case."""
        for contestant in self._ours:
            ours = record["results"][contestant.name]
            cells = {"size": size_text(record["nbytes"]), "count": str(record["count"]), "dtype": record["dtype"]}
            cells |= {"op": record["op"], "memory": contestant.memory, "algorithm": contestant.algorithm or "auto"}
            cells["calls"] = "persistent" if contestant.persistent else "ordinary"
            cells |= {"time us": _microseconds(ours["median_s"]), "min us": _microseconds(ours["min_s"])}
            cells |= {"algbw": f"{ours['algbw_gb_s']:.2f}", "busbw": f"{ours['busbw_gb_s']:.2f}"}
            cells["wrong"] = str(ours["wrong"]) if record["checked"] else "-"
            for peer in self._peers:
                theirs = record["results"][peer]
                if contestant.persistent:
                    theirs = min(
                        theirs, record["results"].get(f"{peer}-persistent", theirs), key=itemgetter("median_s")
                    )
                mark = " !" if theirs["wrong"] else ""
                cells[peer] = _microseconds(theirs["median_s"]) + mark
                cells[f"{peer} ratio"] = f"{theirs['median_s'] / ours['median_s']:.2f}"
            self._write(cells)

    def _write(self, cells: dict[str, str]) -> None:
        parts = [cells[name].rjust(width) for name, width in self._widths.items()]
        print(self._separator.join(parts), file=self._stream, flush=True)


def legend(peers: Sequence[str], *, persistent: bool = False) -> list[str]:
    """Explain the columns, in lines of at most 100 characters."""
    lines = [
        "time, min: median and minimum of all calls; a call takes as long as on its slowest rank",
        "algbw: size / time, in GB/s (1e9 bytes a second); busbw: algbw x what the busiest link carries",
        "wrong: elements of all results that are not what they must be",
    ]
    if peers:
        lines.append(
            "the others: median time in us, ! with wrong results; ratio: it / ferro's, above 1 ferro is faster"
        )
    if peers and persistent:
        lines.append(
            "in rows of persistent operations: the better of the others' ordinary calls and their own such ones"
        )
    return lines


def spread(records: Sequence[BenchRecord]) -> list[str]:
    """Say where the samples spread so far that something else used the machine."""
    results: list[Result] = [result for record in records for result in record["results"].values()]
    wide = [result["p90_s"] / result["p10_s"] for result in results if result["p90_s"] > _WIDE_SPREAD * result["p10_s"]]
    if not wide:
        return []
    times = f"slow calls took up to {max(wide):.0f} times as long as quick ones (90th and 10th of 100)"
    return [f"in {len(wide)} of {len(results)} results {times}:", "the machine was busy with something else"]


def _microseconds(seconds: float) -> str:
    """Format microseconds with three digits, but never an exponent."""
    value = seconds * 1e6
    return f"{value:.2f}" if value < 10 else f"{value:.1f}" if value < 100 else f"{value:.0f}"
