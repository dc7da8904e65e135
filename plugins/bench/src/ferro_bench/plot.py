"""The times as a picture: a panel for each collective and number of ranks."""

from __future__ import annotations

import importlib
import importlib.util
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from ferro.errors import UsageError
from ferro_bench.sizes import size_text
from ferro_bench.summary import BenchRecord

_PANEL_INCHES = (6.5, 4.0)
_MOST_TICKS = 8


def require_matplotlib() -> None:
    """Refuse a measurement whose plot could not be drawn in the end.

    Raises:
        UsageError: matplotlib is not installed.
    """
    if importlib.util.find_spec("matplotlib") is None:
        raise UsageError("--plot needs matplotlib: run `pip install matplotlib`, or leave it out")


def plot(records: Sequence[BenchRecord], target: Path) -> None:
    """Draw median times by size, on logarithmic axes.

    Args:
        records: at least one.
        target: file to write; its suffix chooses the format.

    Raises:
        UsageError: the file cannot be written in that format.
    """
    importlib.import_module("matplotlib").use("agg")
    collectives = list(dict.fromkeys(record["collective"] for record in records))
    ranks = list(dict.fromkeys(record["ranks"] for record in records))
    width, height = _PANEL_INCHES
    figure = importlib.import_module("matplotlib.figure").Figure(
        figsize=(width * len(ranks), height * len(collectives)), layout="constrained"
    )
    panels = figure.subplots(len(collectives), len(ranks), squeeze=False)
    for row, collective in zip(panels, collectives, strict=True):
        for axes, n in zip(row, ranks, strict=True):
            of_both = (collective, n)
            _draw(axes, [r for r in records if (r["collective"], r["ranks"]) == of_both])
            axes.set_title(f"{collective}, {n} ranks")
    try:
        figure.savefig(target, dpi=120)
    except (OSError, ValueError) as exc:
        raise UsageError(f"the picture {target} cannot be written: {exc}") from exc


def _draw(axes: Any, records: Sequence[BenchRecord]) -> None:
    """Draw one panel; records of other memories or peers may be missing."""
    axes.set_xscale("log", base=2)
    axes.set_yscale("log")
    sizes = sorted({max(record["nbytes"], 1) for record in records})
    for name in dict.fromkeys(name for record in records for name in record["results"]):
        points = sorted(
            (max(record["nbytes"], 1), record["results"][name]["median_s"] * 1e6)
            for record in records
            if name in record["results"]
        )
        axes.plot(*zip(*points, strict=True), marker="o", markersize=4, label=name)
    step = 2 if len(sizes) > _MOST_TICKS else 1
    axes.set_xticks(sizes[::step], [size_text(size) for size in sizes[::step]])
    axes.minorticks_off()
    axes.grid(alpha=0.3)
    axes.set_xlabel("size of the whole buffer")
    axes.set_ylabel("median time, us")
    if records:
        axes.legend()
