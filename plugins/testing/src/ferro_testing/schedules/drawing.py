"""Draw an algorithm as text: the messages of each round, in a table."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import groupby

from ferro.collectives import Build
from ferro_testing.schedules.messages import AlgorithmInstance, Message, match_messages

_GAP = "  "


def table(build: Build, world_size: int, root: int = 0, *, columns: int | None = None) -> str:
    """Draw an algorithm as one line per round and one cell per message.

    `0→1 [2]⊕` reads: rank 0 sends chunk 2 to rank 1, which combines it with its own; without ⊕
    it overwrites its own. `[0-3]` are chunks 0 to 3. A message stands in its sender's round.

        r1  0→1 [2]⊕  1→2 [0]⊕  2→0 [1]⊕
        r2  0→1 [1]⊕  1→2 [2]⊕  2→0 [0]⊕

    Args:
        build: the algorithm.
        world_size: number of ranks.
        root: the root, for collectives that have one.
        columns: width of the drawing in characters: a round that needs more goes on below. None for no limit.

    Returns:
        The lines, joined by newlines; empty when nothing is sent.

    Raises:
        PluginError: a send has no receive, or a peer or chunk is out of range.
        UsageError: the world size or the root is out of range.
    """
    instance = AlgorithmInstance("table", build, world_size, root)
    messages = sorted(
        match_messages(instance, instance.schedules()), key=lambda m: (m.sent_in, m.source, m.target, m.number)
    )
    rows = [
        [f"r{index + 1}", *map(_cell, row)] for index, row in groupby(messages, key=lambda message: message.sent_in)
    ]
    if columns is not None:
        cell = max((len(cell) for row in rows for cell in row), default=0) + len(_GAP)
        most = max(1, (columns - len(rows[-1][0] if rows else "")) // cell)
        rows = [part for row in rows for part in _cut(row, most)]
    return _aligned(rows)


def _cut(row: Sequence[str], most: int) -> list[list[str]]:
    """Cut a row into rows of at most so many cells; those that go on have no label."""
    label, *cells = row
    return [["" if start else label, *cells[start : start + most]] for start in range(0, len(cells), most)]


def _cell(message: Message) -> str:
    mark = "⊕" if message.reduce else ""
    return f"{message.source}→{message.target} [{_spans(message.chunks)}]{mark}"


def _spans(chunks: Sequence[int]) -> str:
    """Write 4, 5, 6, 1 as 4-6,1."""
    spans: list[list[int]] = []
    for chunk in chunks:
        if spans and chunk == spans[-1][-1] + 1:
            spans[-1].append(chunk)
        else:
            spans.append([chunk])
    return ",".join(str(s[0]) if len(s) == 1 else f"{s[0]}-{s[-1]}" for s in spans)


def _aligned(rows: Sequence[Sequence[str]]) -> str:
    columns = max(map(len, rows), default=0)
    widths = [max(len(row[i]) for row in rows if i < len(row)) for i in range(columns)]
    return "\n".join(
        _GAP.join(cell.ljust(width) for cell, width in zip(row, widths, strict=False)).rstrip() for row in rows
    )
