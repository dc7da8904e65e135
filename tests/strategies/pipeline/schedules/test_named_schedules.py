"""Pipeline schedules by name: the classic orders, what they hold, and when they are idle."""

import itertools

import pytest

from ferro import UsageError
from ferro_strategies.pipeline.schedules import gpipe, interleaved, one_f_one_b, zero_bubble
from ferro_strategies.pipeline.schedules.build import build, expected_bubble, expected_peak_activations, names
from ferro_strategies.pipeline.schedules.check import check
from ferro_strategies.pipeline.schedules.schedule import Action, Kind, PipelineSchedule
from ferro_strategies.pipeline.schedules.timeline import simulate

SIZES = list(itertools.product(range(1, 6), range(1, 4), range(1, 12)))


def order(schedule, rank):
    """A rank's actions as F0 B0 …, with the rank's stage behind where it has several."""
    own = schedule.stages_of(rank)
    return [
        f"{a.kind}{a.microbatch}" + ("abc"[own.index(a.stage)] if len(own) > 1 else "") for a in schedule.actions[rank]
    ]


def drawn(schedule):
    """The timeline in the notation of the modules' docstrings, all actions of length 1."""
    backward = 2.0 if schedule.splits_backward else 1.0
    timeline = simulate(schedule, forward=1.0, backward=backward)
    letters = {Kind.FORWARD: "0123456789", Kind.BACKWARD: "abcdefghij", Kind.WEIGHT: "ABCDEFGHIJ"}
    lines = []
    for rank, actions in enumerate(schedule.actions):
        own = schedule.stages_of(rank)
        cells = {
            int(start): letters[a.kind][a.microbatch] + ("'" if a.stage != own[0] else " ")
            for a, start in zip(actions, timeline.starts[rank], strict=True)
        }
        width = 2 if len(own) > 1 else 1
        row = "".join(cells.get(t, ". ")[:width] for t in range(int(timeline.makespan)))
        lines.append(f"rank {rank}  {row.rstrip(' .')}")
    return lines


@pytest.mark.parametrize(
    ("module", "name", "ranks", "stages_per_rank", "microbatches"),
    [
        (gpipe, "gpipe", 4, 1, 4),
        (one_f_one_b, "1f1b", 4, 1, 6),
        (interleaved, "interleaved_1f1b", 2, 2, 4),
        (zero_bubble, "zb_h1", 4, 1, 6),
    ],
)
def test_the_drawings_in_the_modules_are_true(module, name, ranks, stages_per_rank, microbatches):
    schedule = build(name, ranks=ranks, stages_per_rank=stages_per_rank, microbatches=microbatches)
    lines = [line.strip() for line in module.__doc__.splitlines()]
    assert [line for line in lines if line.startswith("rank ")] == drawn(schedule)


def test_1f1b_is_the_classic_order():
    schedule = build("1f1b", ranks=4, microbatches=8)
    assert " ".join(order(schedule, 0)) == "F0 F1 F2 F3 B0 F4 B1 F5 B2 F6 B3 F7 B4 B5 B6 B7"
    assert " ".join(order(schedule, 2)) == "F0 F1 B0 F2 B1 F3 B2 F4 B3 F5 B4 F6 B5 F7 B6 B7"
    assert " ".join(order(schedule, 3)) == "F0 B0 F1 B1 F2 B2 F3 B3 F4 B4 F5 B5 F6 B6 F7 B7"


@pytest.mark.parametrize(("ranks", "microbatches"), [*itertools.product(range(1, 6), range(1, 9))])
def test_1f1b_warms_up_then_takes_turns(ranks, microbatches):
    # Megatron-LM's loop, written down independently: warm-up, steady state, cool-down.
    schedule = build("1f1b", ranks=ranks, microbatches=microbatches)
    for rank in range(ranks):
        warm = min(ranks - rank - 1, microbatches)
        expected = [f"F{m}" for m in range(warm)]
        for turn in range(microbatches - warm):
            expected += [f"F{warm + turn}", f"B{turn}"]
        expected += [f"B{m}" for m in range(microbatches - warm, microbatches)]
        assert order(schedule, rank) == expected


def test_interleaved_is_megatrons_order():
    # Narayanan et al. 2021, figure 4: four devices with two stages each, eight microbatches.
    schedule = build("interleaved_1f1b", ranks=4, stages_per_rank=2, microbatches=8)
    assert " ".join(order(schedule, 0)) == (
        "F0a F1a F2a F3a F0b F1b F2b F3b F4a F5a F6a B0b F7a B1b F4b B2b F5b B3b F6b B0a F7b "
        "B1a B2a B3a B4b B5b B6b B7b B4a B5a B6a B7a"
    )
    assert " ".join(order(schedule, 3)) == (
        "F0a F1a F2a F3a F0b B0b F1b B1b F2b B2b F3b B3b F4a B0a F5a B1a F6a B2a F7a B3a F4b "
        "B4b F5b B5b F6b B6b F7b B7b B4a B5a B6a B7a"
    )


@pytest.mark.parametrize(("ranks", "stages", "groups"), [(2, 2, 3), (3, 2, 2), (4, 3, 2), (4, 2, 1)])
def test_interleaved_is_megatrons_order_in_whole_groups(ranks, stages, groups):
    # By Megatron-LM's index arithmetic: which stage and microbatch the k-th pass of a rank is of.
    total = ranks * stages * groups

    def label(kind, k):
        group, inside = divmod(k, ranks * stages)
        place = inside // ranks
        if kind == "B":
            place = stages - 1 - place
        return f"{kind}{group * ranks + inside % ranks}{'abc'[place]}"

    schedule = build("interleaved_1f1b", ranks=ranks, stages_per_rank=stages, microbatches=ranks * groups)
    for rank in range(ranks):
        warm = min(2 * (ranks - rank - 1) + (stages - 1) * ranks, total)
        expected = [label("F", k) for k in range(warm)]
        for turn in range(total - warm):
            expected += [label("F", warm + turn), label("B", turn)]
        expected += [label("B", k) for k in range(total - warm, total)]
        assert order(schedule, rank) == expected


def test_one_stage_per_rank_needs_no_interleaving():
    plain = build("1f1b", ranks=3, microbatches=5)
    assert build("interleaved_1f1b", ranks=3, microbatches=5).actions == plain.actions


def test_zb_h1_is_the_papers_order():
    # Qi et al. 2023: four devices, eight microbatches; the last waits with W for three more B.
    schedule = build("zb_h1", ranks=4, microbatches=8)
    assert " ".join(order(schedule, 0)) == ("F0 F1 F2 F3 B0 W0 F4 B1 W1 F5 B2 W2 F6 B3 W3 F7 B4 W4 B5 W5 B6 W6 B7 W7")
    assert " ".join(order(schedule, 3)) == ("F0 B0 F1 B1 F2 B2 F3 B3 W0 F4 B4 W1 F5 B5 W2 F6 B6 W3 F7 B7 W4 W5 W6 W7")


@pytest.mark.parametrize("name", names())
def test_every_size_works_and_holds_as_much_as_its_formula_says(name):
    for ranks, stages, microbatches in SIZES:
        schedule = build(name, ranks=ranks, stages_per_rank=stages, microbatches=microbatches)
        verdict = check(schedule)
        assert verdict.peak_activations == expected_peak_activations(schedule)
        if ranks > 1:
            assert sum(verdict.messages) == 2 * (ranks * stages - 1) * microbatches
        assert not verdict.needs_tags


def test_closed_formulas_of_what_is_held():
    def held(name, ranks, stages, microbatches):
        return expected_peak_activations(build(name, ranks=ranks, stages_per_rank=stages, microbatches=microbatches))

    for p, v, m in SIZES:
        assert held("gpipe", p, v, m) == (m * v,) * p
        assert all(
            peak <= sum(min(m, p * v - stage) for stage in range(rank, p * v, p))
            for rank, peak in enumerate(held("1f1b", p, v, m))
        )
        assert held("1f1b", p, 1, m) == tuple(min(m, p - r) for r in range(p))
        assert held("zb_h1", p, 1, m) == (min(m, p),) * p
        assert max(held("zb_h1", p, v, m)) == max(held("interleaved_1f1b", p, v, m))
        classic = [2 * (p - r - 1) + (v - 1) * p + 1 for r in range(p)]
        if v > 1 and m % p == 0:
            assert held("interleaved_1f1b", p, v, m) == tuple(min(m * v, c) for c in classic)
            later = tuple(min(m * v, c + r) for r, c in enumerate(classic))
            assert held("zb_h1", p, v, m) == later
        if v > 1:
            bounded = zip(held("interleaved_1f1b", p, v, m), classic, strict=True)
            assert all(peak <= most for peak, most in bounded)


@pytest.mark.parametrize("name", names())
def test_the_bubble_is_what_the_formula_says(name):
    covered = 0
    for (ranks, stages, microbatches), lengths in zip(
        SIZES, itertools.cycle([(1, 2, 1), (1, 1, 1), (3, 2, 2), (2, 3, 1)]), strict=False
    ):
        schedule = build(name, ranks=ranks, stages_per_rank=stages, microbatches=microbatches)
        forward, backward, weight = lengths if schedule.splits_backward else (*lengths[:2], 0)
        expected = expected_bubble(schedule, forward=forward, backward=backward, weight=weight)
        if expected is None:
            continue
        covered += 1
        timeline = simulate(schedule, forward=forward, backward=backward + weight, weight=weight)
        assert timeline.bubble_fraction == pytest.approx(expected, abs=1e-12)
    assert covered > 50


def test_the_bubble_is_the_textbooks():
    def bubble(name, stages_per_rank=1):
        schedule = build(name, ranks=4, stages_per_rank=stages_per_rank, microbatches=8)
        weight = 1.0 if schedule.splits_backward else 0.0
        return expected_bubble(schedule, forward=1.0, backward=2.0 - weight, weight=weight)

    assert bubble("gpipe") == bubble("1f1b") == pytest.approx(3 / 11)
    assert bubble("interleaved_1f1b", 2) == pytest.approx(3 / 19)
    assert bubble("zb_h1") == pytest.approx(3 / 27)  # a third of 9 of 33 idle
    assert bubble("1f1b", 2) is None


def test_no_formula_where_none_holds():
    small = build("zb_h1", ranks=4, microbatches=3)
    assert expected_bubble(small, forward=1, backward=1, weight=1) is None
    schedule = build("zb_h1", ranks=4, microbatches=8)
    assert expected_bubble(schedule, forward=1, backward=1, weight=2) is None


@pytest.mark.parametrize(
    ("given", "said"),
    [
        ({"name": "2f2b"}, "there is no pipeline schedule '2f2b'; choose one of gpipe, 1f1b"),
        ({"ranks": 0}, "ranks must be 1 or more, not 0"),
        ({"stages_per_rank": -1}, "stages_per_rank must be 1 or more, not -1"),
        ({"microbatches": 2.0}, "microbatches must be 1 or more, not 2.0"),
        ({"microbatches": True}, "microbatches must be 1 or more, not True"),
        ({"microbatches": 10**9}, "more than can be scheduled"),
    ],
)
def test_what_makes_no_sense_is_refused(given, said):
    with pytest.raises(UsageError) as caught:
        build(**{"name": "1f1b", "ranks": 2, "stages_per_rank": 1, "microbatches": 2} | given)
    assert said in str(caught.value)


def test_no_formula_is_used_for_schedules_that_build_did_not_make():
    mine = PipelineSchedule(
        name="1f1b",
        microbatches=1,
        rank_of=(0, 0),
        actions=(
            (
                Action(Kind.FORWARD, 0, 0),
                Action(Kind.FORWARD, 1, 0),
                Action(Kind.BACKWARD, 1, 0),
                Action(Kind.BACKWARD, 0, 0),
            ),
            (),
        ),
    )
    with pytest.raises(UsageError, match="does not put stage s on rank s % 2"):
        expected_peak_activations(mine)
