"""The results as pictures: how much faster than torch gloo, by size."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path

import matplotlib as mpl
from matplotlib.figure import Figure
from units import size_text


def plot(records: Sequence[Mapping[str, object]], folder: Path) -> None:
    """Write one PNG per collective that was measured beside torch at two sizes or more."""
    mpl.use("agg")
    for collective in dict.fromkeys(record["collective"] for record in records):
        chosen = [r for r in records if r["collective"] == collective and "ratio" in r]
        if len({r["nbytes"] for r in chosen}) > 1:
            _ratios(collective, chosen).savefig(folder / f"{collective}.png", dpi=150)


def _ratios(collective: str, records: Sequence[Mapping[str, object]]) -> Figure:
    figure = Figure(figsize=(7, 4), layout="constrained")
    axes = figure.subplots()
    for ranks in sorted({record["ranks"] for record in records}):
        chosen = sorted((r["nbytes"], r["ratio"]) for r in records if r["ranks"] == ranks)
        axes.plot(*zip(*chosen, strict=True), marker="o", label=f"{ranks} ranks")
    axes.axhline(1, color="black", linewidth=1, linestyle="--", label="as fast as torch gloo")
    axes.set_xscale("log", base=2)
    axes.set_yscale("log")
    sizes = sorted({record["nbytes"] for record in records})
    step = 2 if len(sizes) > 8 else 1
    axes.set_xticks(sizes[::step], [size_text(size) for size in sizes[::step]])
    low, high = axes.get_ylim()
    ticks = [t for t in (0.1, 0.2, 0.5, 1, 2, 5, 10, 20, 50, 100) if low <= t <= high]
    axes.set_yticks(ticks, [f"{tick:g}" for tick in ticks])
    axes.minorticks_off()
    axes.grid(alpha=0.3)
    axes.set_xlabel("float32 buffer")
    axes.set_ylabel("torch's median time / ferro's")
    axes.set_title(f"{collective} over TCP on loopback: above 1, ferro is faster")
    axes.legend()
    return figure
