"""Timelines of pipeline schedules: starts, ends, idle time and activations."""

import itertools
from dataclasses import replace

import pytest

from ferro import UsageError
from ferro_strategies.pipeline.schedules.build import build, names
from ferro_strategies.pipeline.schedules.check import check
from ferro_strategies.pipeline.schedules.schedule import Kind
from ferro_strategies.pipeline.schedules.timeline import simulate


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
