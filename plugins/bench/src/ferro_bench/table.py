"""The table on the terminal, a row as soon as its case is measured."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TextIO

from ferro_bench.contestants import Contestant
from ferro_bench.rank.case import REDUCING
from ferro_bench.sizes import size_text
from ferro_bench.summary import BenchRecord, Result


class ResultTable:
    """One collective's rows: one for each size and each memory of ferro's arrays."""

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
        self._reduces = collective in REDUCING
        head = ["size", "count", "dtype"]
        head += ["op"] if self._reduces else []
        head += ["memory"] if len(ours) > 1 else []
        head += ["time us", "min us", "algbw GB/s", "busbw GB/s", "wrong"]
        for peer in peers:
            head += [f"{peer} us", "ratio"]
        self._widths = [max(len(name), 10) for name in head]
        self._widths[head.index("wrong")] = 5
        for index, name in enumerate(head):
            if name == "ratio":
                self._widths[index] = 6
        self._write(head)

    def add(self, record: BenchRecord) -> None:
        """Write the rows of a case."""
        for contestant in self._ours:
            ours = record["results"][contestant.name]
            row = [size_text(record["nbytes"]), str(record["count"]), record["dtype"]]
            row += [record["op"]] if self._reduces else []
            row += [contestant.memory] if len(self._ours) > 1 else []
            row += [_microseconds(ours["median_s"]), _microseconds(ours["min_s"])]
            row += [f"{ours['algbw_gb_s']:.2f}", f"{ours['busbw_gb_s']:.2f}"]
            row.append(str(ours["wrong"]) if record["checked"] else "-")
            for peer in self._peers:
                row += _peer_cells(record["results"][peer], ours)
            self._write(row)

    def _write(self, cells: Sequence[str]) -> None:
        parts = [cell.rjust(width) for cell, width in zip(cells, self._widths, strict=True)]
        print("  ".join(parts), file=self._stream, flush=True)


def _peer_cells(theirs: Result, ours: Result) -> list[str]:
    wrong = " !" if theirs["wrong"] else ""
    ratio = theirs["median_s"] / ours["median_s"]
    return [_microseconds(theirs["median_s"]) + wrong, f"{ratio:.2f}"]


def _microseconds(seconds: float) -> str:
    """Format microseconds with three digits, but never an exponent."""
    value = seconds * 1e6
    return f"{value:.2f}" if value < 10 else f"{value:.1f}" if value < 100 else f"{value:.0f}"
