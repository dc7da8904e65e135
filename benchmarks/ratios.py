"""The ratios of the comparison: another library's time over ferro's, so above 1 ferro is faster."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass

from records import Record

MPIS = ("openmpi", "openmpi-sm", "mpich")


@dataclass(frozen=True, slots=True)
class Column:
    """A column of ratios.

    Attributes:
        name: its head on the page and in the picture.
        ours: ferro's result.
        theirs: the other libraries' results, of which the quickest counts.
    """

    name: str
    ours: str
    theirs: tuple[str, ...]

    def ratio(self, record: Record) -> float | None:
        """Divide the quickest median of the others by ferro's; None if either was not measured."""
        results: Mapping[str, Record] = record["results"]
        times = [results[name]["median_s"] for name in self.theirs if name in results]
        return min(times) / results[self.ours]["median_s"] if times and self.ours in results else None


_BOTH = (*MPIS, *(f"{name}-persistent" for name in MPIS))
MPI_COLUMNS = (
    Column("MPI / private", "ferro-private", MPIS),
    Column("MPI / group", "ferro-group", MPIS),
    Column("MPI / persistent", "ferro-private-persistent", _BOTH),
)
COLUMNS = (*MPI_COLUMNS, Column("torch / private", "ferro-private", ("torch-gloo",)))


def row_name(record: Record) -> str:
    """Return the collective, and whether its calls were apart."""
    return f"{record['collective']}, apart" if record["apart"] else record["collective"]


def ratio_text(ratio: float | None) -> str:
    """Format a ratio with two digits at least; an empty text where there is none."""
    if ratio is None:
        return ""
    return f"{ratio:.2f}" if ratio < 10 else f"{ratio:.0f}"


def behind(runs: Mapping[str, Record], column: Column, limit: float = 1.0) -> tuple[list[Record], int]:
    """Return the records whose ratio is below the limit, and the number of all that have a ratio."""
    ratios = [(record, ratio) for record in all_records(runs.values()) if (ratio := column.ratio(record)) is not None]
    return [record for record, ratio in ratios if ratio < limit], len(ratios)


def all_records(runs: Iterable[Record]) -> Iterator[Record]:
    """Yield the records of all numbers of ranks."""
    for run in runs:
        yield from run["records"]
