"""SVG drawing of a timeline, as one file for documents."""

from __future__ import annotations

import colorsys
from collections.abc import Iterator
from html import escape

from ..schedules.schedule import Kind
from ..schedules.timeline import Timeline
from .text import KIND_NAMES, summary, ticks

_LEFT, _RIGHT, _TOP = 70, 150, 78
_ROW, _BAR = 28, 22
_BOX = 22  # width of the shortest action, where there is room
_MOST_WIDTH, _LEAST_WIDTH = 1600, 480
_TICK_WIDTH = 70
_MOST_DETAILED = 5000  # with more actions, only the boxes are drawn
_MOST_SHADES = 8
# Most colour-blind readers can tell these hues apart.
_HUES = {Kind.FORWARD: 0.58, Kind.BACKWARD: 0.08, Kind.WEIGHT: 0.42}
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
    """Draw a timeline as SVG, readable on light and dark backgrounds.

    A colour stands for a kind of action, and a shade for one of the rank's stages. Every box shows
    its microbatch, and has a title in words for the mouse pointer and for screen readers.
    """
    whole = timeline.makespan or 1.0
    bars = min(max(_BOX * whole / timeline.shortest_duration, _LEAST_WIDTH), _MOST_WIDTH)
    scale = bars / whole
    ranks = timeline.schedule.ranks
    width, height = round(_LEFT + bars + _RIGHT), _TOP + ranks * _ROW + 36
    first, second = summary(timeline)
    lines = [
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {width} {height}" width="{width}" '
        f'height="{height}" role="img" aria-labelledby="title words">',
        f'<title id="title">Timeline of pipeline schedule {escape(first)}</title>',
        f'<desc id="words">{escape(_description(timeline, second))}</desc>',
        f"<style>\n{_STYLE}\n{_colours(timeline)}\n</style>",
        f'<rect class="paper" width="{width}" height="{height}"/>',
        f'<text class="head" x="{_LEFT}" y="24">{escape(first)}</text>',
        *_legend(timeline, f"bubble {timeline.bubble_fraction:.1%}"),
        *_grid(timeline, scale, _TOP + ranks * _ROW),
    ]
    for rank in range(ranks):
        lines += _rank(timeline, rank, scale, bars)
    return "\n".join([*lines, "</svg>", ""])


def _description(timeline: Timeline, figures: str) -> str:
    ranks = [
        f"rank {rank} is idle {idle:.1%} and holds at most {peak}"
        for rank, (idle, peak) in enumerate(zip(timeline.idle, timeline.peak_activations, strict=True))
    ]
    return f"{figures}. It takes {timeline.makespan:g}. {'; '.join(ranks)}."


def _colours(timeline: Timeline) -> str:
    """Return a CSS rule for each kind and shade; later stages of a rank are lighter."""
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
    for kind, name in KIND_NAMES.items():
        if kind is Kind.WEIGHT and not timeline.schedule.splits_backward:
            continue
        for shade in range(shades):
            yield f'<rect class="{kind}{shade}" x="{x}" y="36" width="14" height="14"/>'
            x += 15
        yield f'<text x="{x + 4}" y="47">{name}</text>'
        x += 8 * len(name) + 12
    yield f'<rect class="idle" x="{x}" y="36" width="14" height="14"/>'
    stages = "; darkest: the rank's first stage" if shades > 1 else ""
    yield f'<text x="{x + 19}" y="47">idle; {escape(bubble + stages)}</text>'


def _grid(timeline: Timeline, scale: float, bottom: int) -> Iterator[str]:
    count = max(1, int(timeline.makespan * scale / _TICK_WIDTH))
    for time in ticks(timeline.makespan, count):
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
    shade_of = {s: i % _MOST_SHADES for i, s in enumerate(timeline.schedule.stages_of(rank))}
    for action, start, end in timeline.timed_actions(rank):
        x, width = _LEFT + start * scale, (end - start) * scale
        box = (
            f'<rect class="{action.kind}{shade_of[action.stage]}" x="{x:.1f}" y="{y}" '
            f'width="{max(width - 1, 0.1):.1f}" height="{_BAR}"'
        )
        if not detailed:
            yield f"{box}/>"
            continue
        title = f"rank {rank}: {action}, from {start:g} to {end:g}"
        yield f"{box}><title>{escape(title)}</title></rect>"
        if width >= 7 * len(str(action.microbatch)) + 3:
            yield (
                f'<text class="in" x="{x + width / 2:.1f}" y="{middle:g}" aria-hidden="true" '
                f'pointer-events="none">{action.microbatch}</text>'
            )
    yield (f'<text x="{_LEFT + bars + 8:.1f}" y="{middle:g}">idle {idle:.1%}, holds {peak}</text>')


def _shades(timeline: Timeline) -> int:
    schedule = timeline.schedule
    return min(_MOST_SHADES, max(len(schedule.stages_of(r)) for r in range(schedule.ranks)))
