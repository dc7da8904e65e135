"""Text drawing of a timeline, one line per rank."""

from __future__ import annotations

import math
from collections.abc import Iterator

from ..schedules.schedule import Action, Kind
from ..schedules.timeline import Timeline

MIN_COLUMNS = 40

_FILL = {Kind.FORWARD: "-", Kind.BACKWARD: "=", Kind.WEIGHT: "~"}
KIND_NAMES = {Kind.FORWARD: "forward", Kind.BACKWARD: "backward", Kind.WEIGHT: "parameters' gradients"}
_IDLE = "."
_MOST_BLOCKS = 4  # a timeline that needs more is drawn smaller instead
_TICK_COLUMNS = 10
_MOST_RANKS_LISTED = 16


def draw_text(timeline: Timeline, *, columns: int = 120) -> str:
    """Draw a timeline as text.

        1f1b: 2 stages on 2 ranks, 3 microbatches
        bubble 25.0%; peak activations by rank: 2 1
        F- forward, B= backward, . idle

        time    0              5              10
        rank 0  F0 F1 ......B0=== F2 B1=== ...B2===
        rank 1  ...F0 B0=== F1 B1=== F2 B2=== ......

    Where ranks have several stages, a letter behind the microbatch names the stage: a is the
    rank's first. Longer timelines go on in further blocks. Very long ones are drawn small: a column
    is then a span of time, and shows the action in the middle of it.

    Args:
        timeline: the timeline to draw.
        columns: greatest width of a line; at least MIN_COLUMNS are taken.

    Returns:
        The lines, joined by newlines.
    """
    room = max(columns, MIN_COLUMNS) - len(_rank_label(timeline, timeline.schedule.ranks - 1))
    cell = _cell(timeline)
    scale = cell / timeline.shortest_duration
    width = round(timeline.makespan * scale)
    block = room - room % cell
    if width <= block * _MOST_BLOCKS:
        rows = [_row(timeline, rank, scale, width) for rank in range(timeline.schedule.ranks)]
    else:
        scale, width, block = room / timeline.makespan, room, room
        rows = [_small_row(timeline, rank, scale, width) for rank in range(timeline.schedule.ranks)]
    return "\n".join([*_header(timeline), *_blocks(timeline, rows, scale, width, block)])


def summary(timeline: Timeline) -> list[str]:
    """Summarize in two lines: name and sizes of the schedule; its bubble and peak activations."""
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


def ticks(until: float, most: int) -> list[float]:
    """Return multiples of 1, 2 or 5 times a power of ten from 0 to `until`, at most `most` + 1."""
    if until <= 0 or most < 1:
        return [0.0]
    power = 10.0 ** math.floor(math.log10(until / most))
    step = next(step for step in (power, 2 * power, 5 * power, 10 * power) if step * most >= until)
    return [step * index for index in range(math.floor(until / step) + 1)]


def _header(timeline: Timeline) -> list[str]:
    split = timeline.schedule.splits_backward
    shown = [kind for kind in Kind if kind is not Kind.WEIGHT or split]
    legend = [f"{kind}{_FILL[kind]} {KIND_NAMES[kind]}" for kind in shown]
    if _has_stage_letters(timeline):
        legend.append("a, b, ... the rank's first, second, ... stage")
    return [*summary(timeline), ", ".join([*legend, f"{_IDLE} idle"]), ""]


def _blocks(timeline: Timeline, rows: list[str], scale: float, width: int, block: int) -> Iterator[str]:
    axis = _time_axis(timeline.makespan, scale, width)
    indent = len(_rank_label(timeline, timeline.schedule.ranks - 1))
    for start in range(0, max(width, 1), block):
        if start:
            yield ""
        part = slice(start, start + block)
        yield ("time".ljust(indent) + axis[part]).rstrip()
        for rank, row in enumerate(rows):
            yield (_rank_label(timeline, rank).ljust(indent) + row[part]).rstrip()


def _row(timeline: Timeline, rank: int, scale: float, width: int) -> str:
    """Draw a rank's actions, each with its microbatch."""
    row = ""
    for action, start, end in timeline.timed_actions(rank):
        label = _label(timeline, action)
        columns = round(end * scale) - round(start * scale)
        row = row.ljust(round(start * scale), _IDLE)
        row += label.ljust(columns - 1, _FILL[action.kind]).ljust(columns)[:columns]
    return row.ljust(width, _IDLE)


def _small_row(timeline: Timeline, rank: int, scale: float, width: int) -> str:
    """Draw the kind of a rank's action in the middle of each column."""
    row = [_IDLE] * width
    for action, start, end in timeline.timed_actions(rank):
        first = math.ceil(start * scale - 0.5)
        for column in range(first, min(width, math.ceil(end * scale - 0.5))):
            row[column] = action.kind.value
    return "".join(row)


def _time_axis(until: float, scale: float, width: int) -> str:
    axis = ""
    for time in ticks(until, width // _TICK_COLUMNS):
        axis = axis.ljust(round(time * scale)) + f"{time:g}"
    return axis


def _cell(timeline: Timeline) -> int:
    """Return the width in columns of the shortest action: its label and a blank."""
    digits = len(str(timeline.schedule.microbatches - 1))
    return 1 + digits + _has_stage_letters(timeline) + 1


def _has_stage_letters(timeline: Timeline) -> bool:
    return max(map(len, map(timeline.schedule.stages_of, range(timeline.schedule.ranks)))) > 1


def _label(timeline: Timeline, action: Action) -> str:
    if not _has_stage_letters(timeline):
        return f"{action.kind}{action.microbatch}"
    schedule = timeline.schedule
    index = schedule.stages_of(schedule.rank_of[action.stage]).index(action.stage)
    return f"{action.kind}{action.microbatch}{chr(ord('a') + index % 26)}"


def _rank_label(timeline: Timeline, rank: int) -> str:
    return f"rank {rank}".ljust(len(f"rank {timeline.schedule.ranks - 1}")) + "  "


def _count(number: int, noun: str, plural: str = "s") -> str:
    return f"{number} {noun}{plural if number != 1 else ''}"
