"""The picture: a timeline as text, one line per rank, for people."""

from __future__ import annotations

import math
from collections.abc import Iterator

from .ruler import marks
from .schedule import Action, Kind
from .timeline import Timeline

LEAST_COLUMNS = 40

_FILL = {Kind.FORWARD: "-", Kind.BACKWARD: "=", Kind.WEIGHT: "~"}
_WORDS = {Kind.FORWARD: "forward", Kind.BACKWARD: "backward", Kind.WEIGHT: "parameters' gradients"}
_IDLE = "."
_MOST_BLOCKS = 4  # below each other; a longer timeline is drawn smaller instead
_MARK_COLUMNS = 10
_MOST_RANKS_LISTED = 16


def draw_text(timeline: Timeline, *, columns: int = 120) -> str:
    """Draw a timeline as text.

        1f1b: 2 stages on 2 ranks, 3 microbatches
        bubble 25.0%; peak activations by rank: 2 1
        F- forward, B= backward, . idle

        time    0              5              10
        rank 0  F0 F1 ......B0=== F2 B1=== ...B2===
        rank 1  ...F0 B0=== F1 B1=== F2 B2=== ......

    Where ranks have several stages, a letter behind the microbatch says which: a is the rank's
    first. Longer timelines go on in further blocks; very long ones are drawn small, a column being
    a span of time, marked by what the rank does in the middle of it.

    Args:
        timeline: what to draw.
        columns: how wide lines may be; at least LEAST_COLUMNS are taken.

    Returns:
        The lines, joined by newlines.
    """
    room = max(columns, LEAST_COLUMNS) - len(_name(timeline, timeline.schedule.ranks - 1))
    cell = _cell(timeline)
    scale = cell / min(_durations(timeline), default=1.0)
    width = round(timeline.makespan * scale)
    block = room - room % cell
    if width <= block * _MOST_BLOCKS:
        rows = [_row(timeline, rank, scale, width) for rank in range(timeline.schedule.ranks)]
    else:
        scale, width, block = room / timeline.makespan, room, room
        rows = [_small_row(timeline, rank, scale, width) for rank in range(timeline.schedule.ranks)]
    return "\n".join([*_header(timeline), *_blocks(timeline, rows, scale, width, block)])


def summary(timeline: Timeline) -> list[str]:
    """Return two lines: what schedule it is; its bubble and peak activations."""
    schedule = timeline.schedule
    peaks = timeline.peak_activations
    if len(peaks) <= _MOST_RANKS_LISTED:
        held = f"by rank: {' '.join(map(str, peaks))}"
    else:
        held = f"from {min(peaks)} to {max(peaks)}"
    return [
        f"{schedule.name}: {_count(schedule.stages, 'stage')} on {_count(schedule.ranks, 'rank')}, "
        f"{_count(schedule.microbatches, 'microbatch', 'es')}",
        f"bubble {timeline.bubble_fraction:.1%}; peak activations {held}",
    ]


def _header(timeline: Timeline) -> list[str]:
    split = timeline.schedule.splits_backward
    shown = [kind for kind in Kind if kind is not Kind.WEIGHT or split]
    words = [f"{kind}{_FILL[kind]} {_WORDS[kind]}" for kind in shown]
    if _letters(timeline):
        words.append("a, b, ... the rank's first, second, ... stage")
    return [*summary(timeline), ", ".join([*words, f"{_IDLE} idle"]), ""]


def _blocks(
    timeline: Timeline, rows: list[str], scale: float, width: int, block: int
) -> Iterator[str]:
    ruler = _ruler(timeline.makespan, scale, width)
    indent = len(_name(timeline, timeline.schedule.ranks - 1))
    for start in range(0, max(width, 1), block):
        if start:
            yield ""
        part = slice(start, start + block)
        yield ("time".ljust(indent) + ruler[part]).rstrip()
        for rank, row in enumerate(rows):
            yield (_name(timeline, rank).ljust(indent) + row[part]).rstrip()


def _row(timeline: Timeline, rank: int, scale: float, width: int) -> str:
    """Draw a rank's actions with their microbatches."""
    row = ""
    for action, start, end in _actions(timeline, rank):
        label = _label(timeline, action)
        columns = round(end * scale) - round(start * scale)
        row = row.ljust(round(start * scale), _IDLE)
        row += label.ljust(columns - 1, _FILL[action.kind]).ljust(columns)[:columns]
    return row.ljust(width, _IDLE)


def _small_row(timeline: Timeline, rank: int, scale: float, width: int) -> str:
    """Draw what a rank does in the middle of each column."""
    row = [_IDLE] * width
    for action, start, end in _actions(timeline, rank):
        first = math.ceil(start * scale - 0.5)
        for column in range(first, min(width, math.ceil(end * scale - 0.5))):
            row[column] = action.kind.value
    return "".join(row)


def _ruler(until: float, scale: float, width: int) -> str:
    line = ""
    for time in marks(until, width // _MARK_COLUMNS):
        line = line.ljust(round(time * scale)) + f"{time:g}"
    return line


def _actions(timeline: Timeline, rank: int) -> Iterator[tuple[Action, float, float]]:
    return zip(
        timeline.schedule.actions[rank], timeline.starts[rank], timeline.ends[rank], strict=True
    )


def _durations(timeline: Timeline) -> list[float]:
    """Return how long actions take, of those that take any time."""
    pairs = zip(timeline.starts, timeline.ends, strict=True)
    return [end - start for row in pairs for start, end in zip(*row, strict=True) if end > start]


def _cell(timeline: Timeline) -> int:
    """Return the columns of the shortest action: its label and a blank."""
    digits = len(str(timeline.schedule.microbatches - 1))
    return 1 + digits + _letters(timeline) + 1


def _letters(timeline: Timeline) -> bool:
    """Return whether actions must say to which of the rank's stages they belong."""
    return max(map(len, map(timeline.schedule.stages_of, range(timeline.schedule.ranks)))) > 1


def _label(timeline: Timeline, action: Action) -> str:
    if not _letters(timeline):
        return f"{action.kind}{action.microbatch}"
    schedule = timeline.schedule
    place = schedule.stages_of(schedule.rank_of[action.stage]).index(action.stage)
    return f"{action.kind}{action.microbatch}{chr(ord('a') + place % 26)}"


def _name(timeline: Timeline, rank: int) -> str:
    return f"rank {rank}".ljust(len(f"rank {timeline.schedule.ranks - 1}")) + "  "


def _count(number: int, what: str, plural: str = "s") -> str:
    return f"{number} {what}{plural if number != 1 else ''}"
