"""Drawings of timelines: text and SVG."""

import xml.etree.ElementTree as ET

import pytest

from ferro_strategies.pipeline.drawing.svg import draw_svg
from ferro_strategies.pipeline.drawing.text import draw_text, ticks
from ferro_strategies.pipeline.schedules.build import build, names
from ferro_strategies.pipeline.schedules.timeline import simulate

SVG = "{http://www.w3.org/2000/svg}"


def test_the_text():
    drawn = draw_text(simulate(build("1f1b", ranks=2, microbatches=3)))
    assert drawn.splitlines() == [
        "1f1b: 2 stages on 2 ranks, 3 microbatches",
        "bubble 25.0%; peak activations by rank: 2 1",
        "F- forward, B= backward, . idle",
        "",
        "time    0              5              10",
        "rank 0  F0 F1 ......B0=== F2 B1=== ...B2===",
        "rank 1  ...F0 B0=== F1 B1=== F2 B2=== ......",
    ]
    shown = [line.strip() for line in draw_text.__doc__.splitlines()]
    assert [line for line in shown if line in drawn.splitlines() and line] == [
        line for line in drawn.splitlines() if line
    ]


def test_large_schedules_are_drawn_in_one_block():
    timeline = simulate(build("zb_h1", ranks=64, microbatches=512), backward=2.0, weight=1.0)
    assert draw_text(timeline).count("\n") == 64 + 4


def test_the_text_names_stages_and_the_parts_of_a_backward_pass():
    text = draw_text(simulate(build("zb_h1", ranks=2, stages_per_rank=2, microbatches=2)))
    assert "W~ parameters' gradients, a, b, ... the rank's first" in text
    assert "rank 0  F0a F1a F0b F1b ....B0b W0b B1b W1b B0a W0a B1a W1a" in text


@pytest.mark.parametrize("columns", [40, 60, 100, 200])
@pytest.mark.parametrize(("ranks", "microbatches"), [(1, 1), (2, 30), (12, 12), (3, 400)])
def test_text_drawings_fit(columns, ranks, microbatches):
    timeline = simulate(build("1f1b", ranks=ranks, microbatches=microbatches))
    *_, body = draw_text(timeline, columns=columns).split("\n\n", 1)
    lines = body.splitlines()
    assert max(map(len, lines)) <= columns
    assert sum(line.startswith("rank 0") for line in lines) <= 4
    # As much of each row is idle as of the rank's time: drawn to scale.
    row = "".join(line[8:].strip() for line in lines if line.startswith("rank 0 "))
    assert row.count(".") / len(row) == pytest.approx(timeline.idle[0], abs=0.1)


def test_a_timeline_without_duration_is_drawn_too():
    timeline = simulate(build("gpipe", ranks=1, microbatches=1), forward=0.0, backward=0.0)
    assert draw_text(timeline).endswith("time    0\nrank 0")
    ET.fromstring(draw_svg(timeline))


@pytest.mark.parametrize("name", names())
def test_the_svg_describes_itself(name):
    schedule = build(name, ranks=3, stages_per_rank=2, microbatches=5)
    root = ET.fromstring(draw_svg(simulate(schedule)))
    assert root.get("role") == "img"
    assert root.find(f"{SVG}title").text == (
        f"Timeline of pipeline schedule {name}: 6 stages on 3 ranks, 5 microbatches"
    )
    assert "rank 2 is idle" in root.find(f"{SVG}desc").text
    style = root.find(f"{SVG}style").text
    assert "prefers-color-scheme: dark" in style
    boxes = [box for box in root.iter(f"{SVG}rect") if box.find(f"{SVG}title") is not None]
    assert len(boxes) == sum(map(len, schedule.actions))
    assert all(f".{box.get('class')} " in style for box in boxes)
    told = {box.find(f"{SVG}title").text for box in boxes}
    assert "rank 0: the forward pass of stage 0, microbatch 0, from 0 to 1" in told
    width = float(root.get("width"))
    assert all(float(box.get("x")) + float(box.get("width")) < width for box in boxes)
    written = [text for text in root.iter(f"{SVG}text") if text.get("class") == "in"]
    assert len(written) == len(boxes)


def test_a_large_svg_leaves_out_the_titles():
    text = draw_svg(simulate(build("1f1b", ranks=8, microbatches=400)))
    root = ET.fromstring(text)
    assert len(list(root.iter(f"{SVG}title"))) == 1
    assert len(list(root.iter(f"{SVG}rect"))) > 2 * 8 * 400
    assert len(text) < 100 * 2 * 8 * 400


@pytest.mark.parametrize(
    ("until", "most", "expected"),
    [
        (10.0, 5, [0, 2, 4, 6, 8, 10]),
        (33.0, 8, [0, 5, 10, 15, 20, 25, 30]),
        (0.4, 2, [0, 0.2, 0.4]),
        (99.0, 1, [0]),
        (0.0, 3, [0]),
    ],
)
def test_ticks(until, most, expected):
    assert ticks(until, most) == pytest.approx(expected)
