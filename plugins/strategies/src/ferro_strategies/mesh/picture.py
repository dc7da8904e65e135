"""The picture of a mesh: a table for people, one for each place on the axes before the last two."""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np

from .layout import Layout


def picture(layout: Layout, here: int) -> str:
    """Draw who stands where, with `here` in brackets.

    pp 0
          tp 0  tp 1
    dp 0    0     1
    dp 1   [2]    3
    """
    names, shape = layout.names, layout.ranks.shape
    if len(shape) == 1:
        names, shape = ("", *names), (1, *shape)
    *outer_names, row_name, column_name = names
    *outer, rows, columns = shape
    row_heads = [f"{row_name} {row}" if row_name else "" for row in range(rows)]
    heads = [f"{column_name} {column}" for column in range(columns)]
    cells = {rank: f"[{rank}]" if rank == here else f"{rank} " for rank in layout.ranks.flat}
    width = 2 + max(map(len, (*heads, *cells.values())))
    margin = max(map(len, row_heads))
    tables = layout.ranks.reshape(shape)

    def lines() -> Iterator[str]:
        for place in np.ndindex(*outer):
            if place:
                pairs = zip(outer_names, place, strict=True)
                yield ", ".join(f"{name} {at}" for name, at in pairs)
            yield " " * margin + "".join(head.rjust(width) for head in heads)
            for head, row in zip(row_heads, tables[place], strict=True):
                line = head.ljust(margin) + "".join(cells[rank].rjust(width) for rank in row)
                yield line.rstrip()

    return "\n".join(lines())
