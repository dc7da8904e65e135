"""The checker of pipeline schedules: it finds every fault, and finds none where there is none."""

from collections import deque
from dataclasses import replace

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from ferro import UsageError
from ferro_strategies.pipeline.schedules.build import build, names
from ferro_strategies.pipeline.schedules.check import check
from ferro_strategies.pipeline.schedules.schedule import Action, Kind, PipelineSchedule

F, B, W = Kind.FORWARD, Kind.BACKWARD, Kind.WEIGHT


def runs(schedule):
    """Run a schedule, message by message, on the model in `check`; say whether all of it ran.

    Written apart from the checker: ranks hold results, channels hold messages, and a rank goes on
    when it holds what its action takes.
    """
    last = schedule.stages - 1
    holds = [set() for _ in schedule.actions]
    channels = {}
    todo = [deque(actions) for actions in schedule.actions]

    def can_take(rank, wanted):
        if wanted in holds[rank]:
            return True
        source = schedule.rank_of[wanted[1]]
        channel = channels.get((source, rank, wanted[0]))
        return source != rank and bool(channel) and channel[0] == wanted and bool(channel.popleft())

    def inputs(kind, stage, m):
        if kind is F:
            return [(F, stage - 1, m)] if stage else []
        if kind is B:
            return [(F, stage, m), *([(B, stage + 1, m)] if stage < last else [])]
        return [(B, stage, m)]

    moved = True
    while moved:
        moved = False
        for rank, actions in enumerate(todo):
            while actions:
                kind, stage, m = actions[0].kind, actions[0].stage, actions[0].microbatch
                if schedule.rank_of[stage] != rank or (kind, stage, m) in holds[rank]:
                    return False
                own = [item for item in inputs(kind, stage, m) if item[1] == stage]
                if any(item not in holds[rank] for item in own):
                    return False  # nobody else can compute it before this rank goes on
                if not all(can_take(rank, item) for item in inputs(kind, stage, m)):
                    break
                actions.popleft()
                holds[rank].add((kind, stage, m))
                moved = True
                beyond = {F: stage + 1, B: stage - 1}.get(kind, -1)
                if 0 <= beyond <= last and schedule.rank_of[beyond] != rank:
                    channel = (rank, schedule.rank_of[beyond], kind)
                    channels.setdefault(channel, deque()).append((kind, stage, m))
    kinds = (F, B, W) if schedule.splits_backward else (F, B)
    everything = {
        (kind, stage, m) for kind in kinds for stage in range(schedule.stages) for m in range(schedule.microbatches)
    }
    return not any(todo) and not any(channels.values()) and set().union(*holds) == everything


schedules = st.builds(
    build,
    st.sampled_from(names()),
    ranks=st.integers(1, 4),
    stages_per_rank=st.integers(1, 2),
    microbatches=st.integers(1, 5),
)


def fits_the_model(schedule):
    try:
        check(schedule)
    except UsageError:
        return False
    return True


@given(schedules)
def test_named_schedules_run(schedule):
    assert runs(schedule)
    assert fits_the_model(schedule)


def put(schedule, changes):
    """The schedule with other actions at some (rank, position)."""
    actions = [list(row) for row in schedule.actions]
    for (rank, position), action in changes.items():
        actions[rank][position] = action
    return replace(schedule, actions=tuple(tuple(a for a in row if a is not None) for row in actions))


@settings(max_examples=300)
@given(schedules, st.data())
def test_two_actions_swapped_are_found_or_do_no_harm(schedule, data):
    places = [(r, i) for r, row in enumerate(schedule.actions) for i in range(len(row))]
    near = data.draw(st.booleans())
    one = data.draw(st.sampled_from(places))
    beside = [place for place in places if place[0] == one[0] and abs(place[1] - one[1]) <= 1]
    other = data.draw(st.sampled_from(beside if near else places))
    actions = schedule.actions
    broken = put(schedule, {one: actions[other[0]][other[1]], other: actions[one[0]][one[1]]})
    assert fits_the_model(broken) == runs(broken)


@given(schedules, st.data())
def test_an_action_dropped_or_made_twice_is_found(schedule, data):
    rank = data.draw(st.integers(0, schedule.ranks - 1))
    position = data.draw(st.integers(0, len(schedule.actions[rank]) - 1))
    dropped = put(schedule, {(rank, position): None})
    assert not fits_the_model(dropped)
    row = schedule.actions[rank]
    actions = list(schedule.actions)
    actions[rank] = (*row, row[position])
    assert not fits_the_model(replace(schedule, actions=tuple(actions)))


@given(schedules, st.data())
def test_a_stage_moved_to_another_rank_is_found_or_does_no_harm(schedule, data):
    stage = data.draw(st.integers(0, schedule.stages - 1))
    target = data.draw(st.integers(0, schedule.ranks - 1))
    rank_of = list(schedule.rank_of)
    source, rank_of[stage] = rank_of[stage], target
    only_said = replace(schedule, rank_of=tuple(rank_of))
    assert fits_the_model(only_said) == (source == target)
    rows = [[a for a in row if a.stage != stage] for row in schedule.actions]
    moved = [a for a in schedule.actions[source] if a.stage == stage]
    place = data.draw(st.integers(0, len(rows[target])))
    rows[target][place:place] = moved
    really = replace(only_said, actions=tuple(map(tuple, rows)))
    assert fits_the_model(really) == runs(really)


@settings(max_examples=200)
@given(st.integers(1, 3), st.integers(1, 2), st.integers(1, 3), st.data())
def test_any_order_of_the_ranks_actions_is_judged_right(ranks, stages_per_rank, microbatches, data):
    schedule = build("1f1b", ranks=ranks, stages_per_rank=stages_per_rank, microbatches=microbatches)
    rows = []
    for row in schedule.actions:
        # Forward before backward, or nearly all would be wrong for that alone.
        drawn = data.draw(st.permutations(row))
        seen, late = [], []
        for action in drawn:
            first = Action(F, action.stage, action.microbatch)
            (seen if action.kind is F or first in seen else late).append(action)
        rows.append((*seen, *late))
    mixed = replace(schedule, actions=tuple(rows))
    assert fits_the_model(mixed) == runs(mixed)


def made(*rows, rank_of=(0, 1), microbatches=1, splits_backward=False):
    """A schedule written as rows such as "F0.0 B0.0": kind, stage, microbatch."""
    return PipelineSchedule(
        name="mine",
        microbatches=microbatches,
        rank_of=rank_of,
        actions=tuple(tuple(Action(Kind(w[0]), *map(int, w[1:].split("."))) for w in row.split()) for row in rows),
        splits_backward=splits_backward,
    )


@pytest.mark.parametrize(
    ("schedule", "said"),
    [
        (made("", rank_of=()), "has 0 stages and 1 microbatches"),
        (made("", "", microbatches=0), "has 2 stages and 0 microbatches"),
        (made("F0.0 B0.0"), "has stage 1 on rank 1, but actions for ranks 0 to 0 only"),
        (made("F0.0 B0.0", "F1.0 B1.0 B1.0"), "action 2 of rank 1, the backward pass of stage 1"),
        (made("F0.0 B0.0", "F1.0 B1.0 B1.0"), "is there a second time"),
        (made("F0.0 F2.0", "F1.0 B1.0"), "is of no stage: there are 2"),
        (made("F0.0 F0.1", "F1.0 B1.0"), "is of no microbatch: there are 1"),
        (made("F0.0 F1.0", "B1.0"), "action 1 of rank 0, the forward pass of stage 1, microbatch 0"),
        (made("F0.0 F1.0", "B1.0"), "belongs on rank 1, where that stage is"),
        (made("B0.0 F0.0", "F1.0 B1.0"), "comes before the forward pass of stage 0, microbatch 0"),
        (made("F0.0 B0.0 W0.0", "F1.0 B1.0"), "does not say that it splits the backward pass"),
        (made("F0.0 W0.0 B0.0", "F1.0 B1.0 W1.0", splits_backward=True), "comes before the backward pass of stage 0"),
        (
            made("F0.0 B0.0 W0.0", "F1.0 B1.0", splits_backward=True),
            "rank 1 lacks 1 of its 3 actions, the first of them the parameters' gradients of",
        ),
        (
            made("F0.0 F0.1 B0.0 B0.1", "F1.1 F1.0 B1.0 B1.1", microbatches=2),
            "message 0 from rank 0 to rank 1 is the result of the forward pass of stage 0, "
            "microbatch 0, but rank 1 needs that of the forward pass of stage 0, microbatch 1",
        ),
        (
            made("F0.0 B0.0 F0.1 B0.1", "F1.0 F1.1 B1.0 B1.1", microbatches=2),
            "rank 0 before the backward pass of stage 0, microbatch 0, for the backward pass of "
            "stage 1, microbatch 0; rank 1 before the forward pass of stage 1, microbatch 1, for",
        ),
    ],
)
def test_the_first_fault_is_named(schedule, said):
    with pytest.raises(UsageError) as caught:
        check(schedule)
    assert said in str(caught.value)
    assert "'mine'" in str(caught.value)


def test_a_fault_tells_its_rank():
    with pytest.raises(UsageError) as caught:
        check(made("F0.0 B0.0", "F1.0"))
    assert caught.value.rank == 1


def test_what_a_verdict_says():
    verdict = check(build("1f1b", ranks=3, microbatches=4))
    assert verdict.peak_activations == (3, 2, 1)
    assert verdict.messages == (4, 8, 4)
    # Any rank may hold any stages: here the middle one of three is alone.
    mine = made("F0.0 F2.0 B2.0 B0.0", "F1.0 B1.0", rank_of=(0, 1, 0))
    assert check(mine).peak_activations == (2, 1)
    assert check(mine).messages == (2, 2)


def test_outputs_and_gradients_that_cross_need_tags():
    # Rank 0 hands over B2's gradient, then the output of F0 for the next microbatch; rank 1 takes
    # that output first.
    mine = made(
        "F0.0 F2.0 B2.0 F0.1 F2.1 B2.1 B0.0 B0.1",
        "F1.0 F3.0 B3.0 F1.1 F3.1 B3.1 B1.0 B1.1",
        rank_of=(0, 1, 0, 1),
        microbatches=2,
    )
    assert runs(mine)
    assert check(mine).needs_tags
