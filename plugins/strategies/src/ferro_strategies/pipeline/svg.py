"""The drawing: a timeline as SVG, for documents; one file, nothing else needed to show it."""

from __future__ import annotations

import colorsys
from collections.abc import Iterator
from html import escape

from .picture import summary
from .ruler import marks
from .schedule import Action, Kind
from .timeline import Timeline
from .walk import in_words

_LEFT, _RIGHT, _TOP = 70, 150, 78
_ROW, _BAR = 28, 22
_BOX = 22  # width of the shortest action, where there is room
_MOST_WIDTH, _LEAST_WIDTH = 1600, 480
_MARK_WIDTH = 70
_MOST_DETAILED = 5000  # actions; of more, only the boxes are drawn
_MOST_SHADES = 8
_HUES = {Kind.FORWARD: 0.58, Kind.BACKWARD: 0.08, Kind.WEIGHT: 0.42}  # apart for most eyes
_LEGEND = {
    Kind.FORWARD: "forward",
    Kind.BACKWARD: "backward",
    Kind.WEIGHT: "parameters' gradients",
}
_STYLE = """\
text { font: 12px system-ui, sans-serif; fill: #1a1a1a }
.head { font-size: 15px; font-weight: 600 }
.end { text-anchor: end }
.mid { text-anchor: middle }
.paper { fill: #ffffff }
.idle { fill: #e8e8e8 }
.grid { stroke: #bbbbbb }
.in { font-size: 11px; text-anchor: middle; fill: #1a1a1a }
@media (prefers-color-scheme: dark) {
  text { fill: #e8e8e8 }
  .in { fill: #1a1a1a }
  .paper { fill: #16181c }
  .idle { fill: #2b2e34 }
  .grid { stroke: #555555 }
}"""


def draw_svg(timeline: Timeline) -> str:
    """Draw a timeline as SVG, readable on light and dark paper.

    Colours tell the kinds of actions apart and shades a rank's stages; every box says its
    microbatch, and in words what it is, to who points at it or has it read aloud.
    """
    whole = timeline.makespan or 1.0
    shortest = min(_spans(timeline), default=1.0)
    bars = min(max(_BOX * whole / shortest, _LEAST_WIDTH), _MOST_WIDTH)
    scale = bars / whole
    ranks = timeline.schedule.ranks
    width, height = round(_LEFT + bars + _RIGHT), _TOP + ranks * _ROW + 36
    first, second = summary(timeline)
    lines = [
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {width} {height}" width="{width}" '
        f'height="{height}" role="img" aria-labelledby="title words">',
        f'<title id="title">Timeline of pipeline schedule {escape(first)}</title>',
        f'<desc id="words">{escape(_in_words(timeline, second))}</desc>',
        f"<style>\n{_STYLE}\n{_colours(timeline)}\n</style>",
        f'<rect class="paper" width="{width}" height="{height}"/>',
        f'<text class="head" x="{_LEFT}" y="24">{escape(first)}</text>',
        *_legend(timeline, f"bubble {timeline.bubble_fraction:.1%}"),
        *_grid(timeline, scale, _TOP + ranks * _ROW),
    ]
    for rank in range(ranks):
        lines += _rank(timeline, rank, scale, bars)
    return "\n".join([*lines, "</svg>", ""])


def _in_words(timeline: Timeline, summed_up: str) -> str:
    ranks = [
        f"rank {rank} is idle {idle:.1%} and holds at most {peak}"
        for rank, (idle, peak) in enumerate(
            zip(timeline.idle, timeline.peak_activations, strict=True)
        )
    ]
    return f"{summed_up}. It takes {timeline.makespan:g}. {'; '.join(ranks)}."


def _colours(timeline: Timeline) -> str:
    """Return a style for each kind and shade: later stages of a rank are lighter."""
    shades = _shades(timeline)
    lines = []
    for kind, hue in _HUES.items():
        for shade in range(shades):
            lightness = 0.62 + 0.22 * shade / max(shades - 1, 1)
            parts = colorsys.hls_to_rgb(hue, lightness, 0.6)
            colour = "".join(f"{round(255 * part):02x}" for part in parts)
            lines.append(f".{kind}{shade} {{ fill: #{colour} }}")
    return "\n".join(lines)


def _legend(timeline: Timeline, bubble: str) -> Iterator[str]:
    x = _LEFT
    shades = _shades(timeline)
    for kind, words in _LEGEND.items():
        if kind is Kind.WEIGHT and not timeline.schedule.splits_backward:
            continue
        for shade in range(shades):
            yield f'<rect class="{kind}{shade}" x="{x}" y="36" width="14" height="14"/>'
            x += 15
        yield f'<text x="{x + 4}" y="47">{words}</text>'
        x += 8 * len(words) + 12
    yield f'<rect class="idle" x="{x}" y="36" width="14" height="14"/>'
    stages = "; darkest: the rank's first stage" if shades > 1 else ""
    yield f'<text x="{x + 19}" y="47">idle; {escape(bubble + stages)}</text>'


def _grid(timeline: Timeline, scale: float, bottom: int) -> Iterator[str]:
    count = max(1, int(timeline.makespan * scale / _MARK_WIDTH))
    for time in marks(timeline.makespan, count):
        x = f"{_LEFT + time * scale:.1f}"
        yield f'<line class="grid" x1="{x}" x2="{x}" y1="{_TOP - 8}" y2="{bottom + 4}"/>'
        yield f'<text class="mid" x="{x}" y="{bottom + 20}">{time:g}</text>'


def _rank(timeline: Timeline, rank: int, scale: float, bars: float) -> Iterator[str]:
    y = _TOP + rank * _ROW
    middle = y + _BAR / 2 + 4
    idle, peak = timeline.idle[rank], timeline.peak_activations[rank]
    yield f'<text class="end" x="{_LEFT - 8}" y="{middle:g}">rank {rank}</text>'
    yield f'<rect class="idle" x="{_LEFT}" y="{y}" width="{bars:.1f}" height="{_BAR}"/>'
    detailed = sum(map(len, timeline.schedule.actions)) <= _MOST_DETAILED
    places = {s: i % _MOST_SHADES for i, s in enumerate(timeline.schedule.stages_of(rank))}
    for action, start, end in zip(
        timeline.schedule.actions[rank], timeline.starts[rank], timeline.ends[rank], strict=True
    ):
        x, width = _LEFT + start * scale, (end - start) * scale
        box = (
            f'<rect class="{action.kind}{places[action.stage]}" x="{x:.1f}" y="{y}" '
            f'width="{max(width - 1, 0.1):.1f}" height="{_BAR}"'
        )
        if not detailed:
            yield f"{box}/>"
            continue
        yield f"{box}><title>{escape(_told(rank, action, start, end))}</title></rect>"
        if width >= 7 * len(str(action.microbatch)) + 3:
            yield (
                f'<text class="in" x="{x + width / 2:.1f}" y="{middle:g}" aria-hidden="true" '
                f'pointer-events="none">{action.microbatch}</text>'
            )
    yield (f'<text x="{_LEFT + bars + 8:.1f}" y="{middle:g}">idle {idle:.1%}, holds {peak}</text>')


def _told(rank: int, action: Action, start: float, end: float) -> str:
    return f"rank {rank}: {in_words(action)}, from {start:g} to {end:g}"


def _shades(timeline: Timeline) -> int:
    schedule = timeline.schedule
    return min(_MOST_SHADES, max(len(schedule.stages_of(r)) for r in range(schedule.ranks)))


def _spans(timeline: Timeline) -> list[float]:
    pairs = zip(timeline.starts, timeline.ends, strict=True)
    return [end - start for row in pairs for start, end in zip(*row, strict=True) if end > start]
