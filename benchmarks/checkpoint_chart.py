"""Draw the times of saves and loads as bars: a panel for each kind, a group for each number of ranks and layout.

python benchmarks/checkpoint_chart.py checkpoint.json checkpoint.png
"""

from __future__ import annotations

import json
import statistics
import sys
from pathlib import Path

from records import Record

_COLOURS = {"ferro": "#1f5fa8", "torch": "#d1603d", "raw": "#9a9a9a", "raw, early": "#c9c9c9", "raw, each": "#5c5c5c"}
_WIDTH = 0.8  # of a group of bars


def draw(result: Record, target: Path) -> None:
    """Draw the part "disk" to a file, whose suffix chooses the format; matplotlib must be installed."""
    import matplotlib as mpl
    from matplotlib.figure import Figure

    mpl.use("agg")
    records = result.get("disk", [])
    if not records:
        return
    kinds = list(records[0]["seconds"])
    figure = Figure(figsize=(4.2 * len(kinds), 3.6), layout="constrained")
    for axes, kind in zip(figure.subplots(1, len(kinds), squeeze=False)[0], kinds, strict=True):
        names = [name for name in _COLOURS if any(name in record["seconds"][kind] for record in records)]
        bar = _WIDTH / len(names)
        for place, name in enumerate(names):
            there = [(at, record) for at, record in enumerate(records) if name in record["seconds"][kind]]
            axes.bar(
                [at + (place + 0.5) * bar - _WIDTH / 2 for at, _ in there],
                [statistics.median(record["seconds"][kind][name]) for _, record in there],
                bar,
                label=name,
                color=_COLOURS[name],
            )
        labels = [f"{record['ranks']}\n{record['layout']}" for record in records]
        axes.set_xticks(range(len(records)), labels, fontsize=8)
        axes.set_title(kind, fontsize=11)
        axes.spines[["top", "right"]].set_visible(False)
        axes.set_ylabel("seconds")
        axes.legend(fontsize=8, frameon=False)
    figure.suptitle(f"{records[0]['nbytes'] / (1 << 30):g} GiB, medians; number of ranks below", fontsize=11)
    figure.savefig(target, dpi=110)


if __name__ == "__main__":
    draw(json.loads(Path(sys.argv[1]).read_text()), Path(sys.argv[2]))
