"""Draw the ratios as a picture: a panel for each number of ranks and each memory, a cell for each collective and size.

python benchmarks/heatmap.py collectives.json heatmap.png
"""

from __future__ import annotations

import json
import math
import sys
from collections.abc import Mapping
from pathlib import Path

import numpy as np
from ratios import COLUMNS, Column, all_records, ratio_text, row_name
from records import Record

from ferro_bench import size_text

# Colours run from four times as slow as the other library, red, over white, equally fast, to four times as fast, blue.
_STRONGEST = 4.0
_DARK_SHARE = 0.7  # of the strongest colour: from here on the numbers are white
_CELL_INCHES = (0.5, 0.33)
_NAMES_INCHES = 1.4
_MARGIN_INCHES = (0.4, 1.0)


def draw(runs: Mapping[str, Record], target: Path) -> None:
    """Draw the ratios of all cases to a file.

    matplotlib must be installed.

    Args:
        runs: the results by number of ranks, as in collectives.json.
        target: file to write; its suffix chooses the format.
    """
    import matplotlib as mpl
    from matplotlib.figure import Figure

    mpl.use("agg")
    records = list(all_records(runs.values()))
    columns = [column for column in COLUMNS if any(column.ratio(record) is not None for record in records)]
    if not columns:
        return
    ops = list(dict.fromkeys(row_name(record) for record in records))
    sizes = sorted({record["size"] for record in records if record["size"]}) or [0]
    width = _NAMES_INCHES + len(columns) * (_CELL_INCHES[0] * len(sizes) + _MARGIN_INCHES[0])
    height = len(runs) * (_CELL_INCHES[1] * len(ops) + _MARGIN_INCHES[1]) + 1.0
    figure = Figure(figsize=(max(width, 7.0), height), layout="constrained")
    panels = figure.subplots(len(runs), len(columns), squeeze=False)
    for row, (ranks, run) in zip(panels, runs.items(), strict=True):
        for axes, column in zip(row, columns, strict=True):
            image = _panel(axes, run, column, ops, sizes)
            axes.set_title(f"{column.name}, {ranks} ranks", fontsize=11)
            if column is not columns[0]:
                axes.set_yticks([])
    ticks = [-2, -1, 0, 1, 2]
    bar = figure.colorbar(image, ax=panels, location="bottom", shrink=0.4, aspect=50, ticks=ticks)
    bar.ax.set_xticklabels([f"{2.0**tick:g}" for tick in ticks])
    bar.set_label("the other library's time / ferro's: red, ferro is slower; blue, ferro is faster")
    figure.savefig(target, dpi=110)


def _panel(axes, run: Record, column: Column, ops: list[str], sizes: list[int]) -> object:
    """Draw one panel, and return what the colour bar describes."""
    from matplotlib.colors import Normalize

    found = np.full((len(ops), len(sizes)), np.nan)
    for record in run["records"]:
        ratio = column.ratio(record)
        place = sizes.index(record["size"]) if record["size"] else 0  # a barrier has no size
        found[ops.index(row_name(record)), place] = np.nan if ratio is None else ratio
    limit = math.log2(_STRONGEST)
    colours = np.log2(found)
    image = axes.imshow(colours, cmap="RdBu", norm=Normalize(-limit, limit), aspect="auto")
    for (row, place), ratio in np.ndenumerate(found):
        if not np.isnan(ratio):
            dark = abs(colours[row, place]) > _DARK_SHARE * limit
            text = ratio_text(float(ratio))
            axes.text(place, row, text, ha="center", va="center", fontsize=7.5, color="white" if dark else "black")
    axes.set_xticks(range(len(sizes)), [size_text(size) for size in sizes], fontsize=7.5, rotation=40)
    axes.set_yticks(range(len(ops)), ops, fontsize=8.5)
    axes.tick_params(length=0)
    return image


if __name__ == "__main__":
    draw(json.loads(Path(sys.argv[1]).read_text())["by_ranks"], Path(sys.argv[2]))
