"""Timelines of pipeline schedules, their pictures, and `ferro show pipeline`."""

import itertools
import xml.etree.ElementTree as ET
from dataclasses import replace

import pytest

from ferro import UsageError
from ferro_strategies.pipeline.build import build, names
from ferro_strategies.pipeline.check import check
from ferro_strategies.pipeline.picture import draw_text
from ferro_strategies.pipeline.ruler import marks
from ferro_strategies.pipeline.schedule import Kind
from ferro_strategies.pipeline.show import show
from ferro_strategies.pipeline.svg import draw_svg
from ferro_strategies.pipeline.timeline import simulate

SVG = "{http://www.w3.org/2000/svg}"


@pytest.mark.parametrize(("name", "stages", "m"), [*itertools.product(names(), (1, 2), (1, 3, 6))])
def test_a_timeline_respects_order_and_messages(name, stages, m):
    schedule = build(name, ranks=3, stages_per_rank=stages, microbatches=m)
    forward = [1.0 + 0.25 * stage for stage in range(schedule.stages)]
    timeline = simulate(schedule, forward=forward, backward=2.0, weight=0.5, transfer=0.125)
    split = schedule.splits_backward
    takes = {Kind.BACKWARD: 1.5 if split else 2.0, Kind.WEIGHT: 0.5}
    start, end = {}, {}
    for rank, actions in enumerate(schedule.actions):
        for i, action in enumerate(actions):
            key = (action.kind, action.stage, action.microbatch)
            start[key], end[key] = timeline.starts[rank][i], timeline.ends[rank][i]
            assert end[key] - start[key] == takes.get(action.kind, forward[action.stage])
    for (kind, stage, batch), begun in start.items():
        arrives = []
        if kind is Kind.FORWARD and stage:
            arrives = [end[kind, stage - 1, batch] + 0.125]
        if kind is Kind.BACKWARD and stage < schedule.stages - 1:
            arrives = [end[kind, stage + 1, batch] + 0.125]
        rank = schedule.rank_of[stage]
        before = [e for e in timeline.ends[rank] if e <= begun]
        # As soon as it can: when the message is there, or the rank has done what comes first.
        assert begun == max([0.0, *arrives, *(before[-1:])])


def test_a_split_backward_pass_takes_as_long_as_a_whole_one():
    for name in ("1f1b", "zb_h1"):
        assert simulate(build(name, ranks=1, microbatches=4), backward=3.0).makespan == 16.0


def test_activations_over_time():
    timeline = simulate(build("1f1b", ranks=2, microbatches=2))
    assert timeline.activations(1) == ((0.0, 0), (1.0, 1), (4.0, 0), (4.0, 1), (7.0, 0))
    split = simulate(build("zb_h1", ranks=2, microbatches=2))
    assert split.activations(1) == (
        (0.0, 0), (1.0, 1), (3.0, 2), (6.0, 1), (7.0, 0)
    )  # fmt: skip
    for name in names():
        schedule = build(name, ranks=4, stages_per_rank=2, microbatches=7)
        assert simulate(schedule).peak_activations == check(schedule).peak_activations


def test_idle_shares():
    timeline = simulate(build("gpipe", ranks=2, microbatches=1), forward=[1, 3], backward=[2, 4])
    assert timeline.makespan == 10.0
    assert timeline.idle == pytest.approx((0.7, 0.3))
    assert timeline.bubble_fraction == pytest.approx(0.5)
    nothing = simulate(build("gpipe", ranks=2, microbatches=1), forward=0.0, backward=0.0)
    assert nothing.bubble_fraction == 0.0


def test_large_schedules_are_checked_and_timed():
    schedule = build("zb_h1", ranks=64, microbatches=512)
    timeline = simulate(schedule, backward=2.0, weight=1.0)
    assert timeline.makespan == 3 * 512 + 63
    assert draw_text(timeline).count("\n") == 64 + 4


@pytest.mark.parametrize(
    ("given", "said"),
    [
        ({"forward": -1.0}, "forward must be 0 or more everywhere, not -1.0"),
        ({"backward": float("nan")}, "backward must be 0 or more everywhere"),
        ({"transfer": float("inf")}, "transfer must be 0 or more everywhere"),
        ({"forward": [1.0]}, "forward has 1 durations, for 2 stages"),
        ({"weight": 2.5}, "weight is the part of backward that is put off"),
    ],
)
def test_durations_that_make_no_sense_are_refused(given, said):
    with pytest.raises(UsageError, match=said):
        simulate(build("zb_h1", ranks=2, microbatches=2), **given)


def test_broken_schedules_have_no_timeline():
    schedule = build("1f1b", ranks=2, microbatches=2)
    with pytest.raises(UsageError, match="lacks 1 of its 4"):
        simulate(replace(schedule, actions=(schedule.actions[0], schedule.actions[1][:-1])))


def test_the_picture():
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


def test_the_picture_names_stages_and_the_parts_of_a_backward_pass():
    text = draw_text(simulate(build("zb_h1", ranks=2, stages_per_rank=2, microbatches=2)))
    assert "W~ parameters' gradients, a, b, ... the rank's first" in text
    assert "rank 0  F0a F1a F0b F1b ....B0b W0b B1b W1b B0a W0a B1a W1a" in text


@pytest.mark.parametrize("columns", [40, 60, 100, 200])
@pytest.mark.parametrize(("ranks", "microbatches"), [(1, 1), (2, 30), (12, 12), (3, 400)])
def test_pictures_fit(columns, ranks, microbatches):
    timeline = simulate(build("1f1b", ranks=ranks, microbatches=microbatches))
    *_, body = draw_text(timeline, columns=columns).split("\n\n", 1)
    lines = body.splitlines()
    assert max(map(len, lines)) <= columns
    assert sum(line.startswith("rank 0") for line in lines) <= 4
    # As much of each row is idle as of the rank's time: drawn to scale.
    row = "".join(line[8:].strip() for line in lines if line.startswith("rank 0 "))
    assert row.count(".") / len(row) == pytest.approx(timeline.idle[0], abs=0.1)


def test_nothing_that_takes_time_is_a_picture_too():
    timeline = simulate(build("gpipe", ranks=1, microbatches=1), forward=0.0, backward=0.0)
    assert draw_text(timeline).endswith("time    0\nrank 0")
    ET.fromstring(draw_svg(timeline))


@pytest.mark.parametrize("name", names())
def test_the_drawing_says_what_it_shows(name):
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


def test_large_drawings_leave_out_the_words():
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
def test_marks(until, most, expected):
    assert marks(until, most) == pytest.approx(expected)


def test_the_command_draws_and_tells(capsys, tmp_path):
    path = tmp_path / "timeline.svg"
    arguments = ["1f1b", "--stages", "4", "--microbatches", "8", "--svg", str(path)]
    assert show(arguments) == 0
    out = capsys.readouterr().out
    assert "rank 3  .........F0 B0=== F1 B1===" in out
    assert "bubble   27.3%\nformula  27.3% = (p-1) / (m v + p-1)" in out
    assert "   3  27.3%                  1          1" in out
    assert ET.fromstring(path.read_text(encoding="utf-8")).tag == f"{SVG}svg"


def test_the_command_takes_ranks_and_durations(capsys):
    def told(arguments):
        assert show(arguments.split()) == 0
        return capsys.readouterr().out

    out = told("interleaved_1f1b --stages 4 --ranks 2 --microbatches 4 --forward 2 --transfer 0.5")
    assert "4 stages on 2 ranks, 4 microbatches" in out
    assert "formula  11.1%" in out
    out = told("zb_h1 --stages 3 --microbatches 2")
    assert "formula  no formula is known for these numbers" in out
    out = told("zb_h1 --stages 4 --microbatches 8 --backward 3 --weight 1")
    assert "B0=== W0 " in out


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        ("", "arguments are required"),
        ("1f1b --stages 4", "--microbatches"),
        ("2f2b --stages 4 --microbatches 8", "invalid choice"),
        ("1f1b --stages 4 --ranks 3 --microbatches 8", "must be a multiple of the number of ranks"),
        ("1f1b --stages 0 --microbatches 8", "--stages 0: must be 1 or more"),
        ("1f1b --stages 4 --ranks 0 --microbatches 8", "--ranks 0: must be 1 or more"),
        ("1f1b --stages 4 --microbatches 8 --columns 39", "--columns 39: must be 40 or more"),
        ("1f1b --stages 4 --microbatches 0", "microbatches must be 1 or more"),
        ("1f1b --stages 4 --microbatches 8 --forward -1", "forward must be 0 or more"),
        ("1f1b --stages 2 --microbatches 2 --svg /nonexistent/a.svg", "cannot be written"),
    ],
)
def test_the_command_refuses_nonsense(arguments, said):
    with pytest.raises(UsageError) as caught:
        show(arguments.split())
    assert said in str(caught.value)
