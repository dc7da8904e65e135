"""Redistribution by arithmetic alone: which steps, in what order, and how much they move."""

from __future__ import annotations

import heapq
import itertools
import math

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from ferro import UsageError
from ferro_strategies.dtensor import Partial, Replicate, Shard, plan
from ferro_strategies.dtensor.layout import local_slices, part
from ferro_strategies.dtensor.placement import checked_placements
from ferro_strategies.parts import even_sizes

R, S0, S1, S2, P = Replicate(), Shard(0), Shard(1), Shard(2), Partial()

mesh_shapes = st.lists(st.integers(1, 4), min_size=1, max_size=3).map(tuple)


@st.composite
def cases(draw, max_ndim=3):
    mesh_shape = draw(mesh_shapes)
    shape = tuple(draw(st.lists(st.integers(0, 7), max_size=max_ndim)))
    op = draw(st.sampled_from(["sum", "max"]))
    kinds = [R, Partial(op), *(Shard(dim) for dim in range(len(shape)))]
    placements = st.tuples(*(st.sampled_from(kinds) for _ in mesh_shape))
    return mesh_shape, shape, draw(placements), draw(placements)


def names(found):
    return [(str(step.how), step.axis) for step in found.steps]


@given(size=st.integers(0, 40), parts=st.integers(1, 9))
def test_parts_are_those_of_array_split(size, parts):
    expected = [piece.tolist() for piece in np.array_split(np.arange(size), parts)]
    assert [list(range(size))[part(size, parts, index)] for index in range(parts)] == expected
    assert list(even_sizes(size, parts)) == [len(piece) for piece in expected]


@given(cases())
def test_parts_of_a_sharded_array_cover_it_once(case):
    mesh_shape, shape, placements, _ = case
    times = np.zeros(shape, int)
    for coordinate in itertools.product(*map(range, mesh_shape)):
        times[local_slices(shape, mesh_shape, placements, coordinate)] += 1
    copies = [
        n for n, one in zip(mesh_shape, placements, strict=True) if not isinstance(one, Shard)
    ]
    assert (times == math.prod(copies)).all()


def test_the_first_axis_cuts_first():
    rows = [
        local_slices((7,), (2, 3), (S0, S0), coordinate)[0]
        for coordinate in itertools.product(range(2), range(3))
    ]
    assert [list(range(7))[cut] for cut in rows] == [[0, 1], [2], [3], [4], [5], [6]]


@pytest.mark.parametrize(
    ("source", "target", "steps", "elements"),
    [
        ((S0,), (R,), ["all_gather"], 48),
        ((R,), (S0,), ["slice"], 0),
        ((P,), (R,), ["all_reduce"], 96),
        ((P,), (S1,), ["reduce_scatter"], 48),
        ((S0,), (S1,), ["all_to_all"], 12),
        ((R,), (P,), ["contribute"], 0),
        ((S0,), (P,), ["contribute"], 0),
        ((S0,), (Partial("max"),), ["all_gather", "contribute"], 48),
        ((P,), (Partial("max"),), ["all_reduce", "contribute"], 96),
        ((S0,), (S0,), [], 0),
    ],
)
def test_each_pair_on_one_axis_of_four(source, target, steps, elements):
    found = plan(source, target, (8, 8), (4,))
    assert [str(step.how) for step in found.steps] == steps
    assert (found.cost(), found.cost(itemsize=8)) == (elements, 8 * elements)


def test_the_inner_axis_is_gathered_first_where_two_cut_one_dim():
    assert names(plan((S0, S0), (R, R), (8, 2), (2, 2))) == [("all_gather", 1), ("all_gather", 0)]


def test_the_outer_axis_cuts_first():
    assert names(plan((R, R), (S0, S0), (8, 2), (2, 2))) == [("slice", 0), ("slice", 1)]


def test_a_sum_is_reduced_while_pieces_are_small():
    assert names(plan((S0, P), (R, R), (8, 2), (2, 2))) == [("all_reduce", 1), ("all_gather", 0)]


def test_a_detour_over_a_dim_of_neither_is_taken_when_it_moves_less():
    found = plan((S0, R), (R, S0), (16, 16), (4, 4))
    assert names(found) == [("slice", 1), ("all_gather", 0), ("all_to_all", 1)]
    assert found.cost() == 256 * 3 // 16 * 2  # as in plan's docstring; straight on it is 192


def test_axes_of_one_rank_move_nothing():
    found = plan((S0, P), (S1, R), (8, 2), (1, 1))
    assert {how for how, _ in names(found)} == {"relabel"}
    assert found.cost() == 0


@given(cases())
def test_steps_lead_from_source_to_target_and_reduce_only_what_was_partial(case):
    mesh_shape, shape, source, target = case
    found = plan(source, target, shape, mesh_shape)
    states = [source, *(step.after for step in found.steps)]
    assert [step.before for step in found.steps] == states[:-1]
    assert states[-1] == target
    for axis, placements in enumerate(zip(*states, strict=True)):
        allowed = {source[axis], target[axis]}
        assert all(one in allowed for one in placements if isinstance(one, Partial))


@given(cases())
def test_never_worse_than_replicating_all(case):
    mesh_shape, shape, source, target = case
    whole = (R,) * len(mesh_shape)
    through = plan(source, whole, shape, mesh_shape), plan(whole, target, shape, mesh_shape)
    found = plan(source, target, shape, mesh_shape)
    assert found.cost() <= sum(way.cost() for way in through)


def busiest_rank(source, target, shape, mesh_shape, axis):
    """Bytes that the busiest rank of any line along `axis` sends or receives, element by element.

    None where the step cannot be done along the axis: what a rank is to have is not there.
    """
    others = [range(n) if at != axis else [0] for at, n in enumerate(mesh_shape)]
    total = np.arange(math.prod(shape)).reshape(shape)
    reduced = isinstance(source[axis], Partial)
    summed = isinstance(target[axis], Partial)
    busiest = 0
    for place in itertools.product(*others):
        line = [(*place[:axis], i, *place[axis + 1 :]) for i in range(mesh_shape[axis])]
        had = [set(total[local_slices(shape, mesh_shape, source, at)].flat) for at in line]
        has = [set(total[local_slices(shape, mesh_shape, target, at)].flat) for at in line]
        union = set().union(*had)
        if any(not wanted <= union for wanted in has):
            return None
        if summed:  # what a rank has, it contributes in its place
            if any(not mine <= whole for mine, whole in zip(had, has, strict=True)):
                return None
            continue
        for i, (mine, wanted) in enumerate(zip(had, has, strict=True)):
            rest = [has[j] for j in range(len(line)) if j != i]
            if reduced and isinstance(target[axis], Shard):  # of all others' parts, a share
                amount = sum(map(len, rest))
            elif reduced:
                amount = 2 * (len(union) - len(union) // len(line))
            elif isinstance(target[axis], Shard):
                amount = max(len(wanted - mine), sum(len(part & mine) for part in rest))
                amount = 0 if wanted <= mine else amount
            else:  # in a ring, a rank passes on as much as it gets
                amount = len(wanted - mine)
            busiest = max(busiest, amount)
    return busiest


def cheapest_by_brute_force(source, target, shape, mesh_shape):
    """Search all states, steps checked and priced element by element on all ranks."""
    dims = [Shard(dim) for dim in range(len(shape))]
    choices = [{R, *dims, end} for end in target]
    best, queue, count = {source: 0}, [(0, 0, source)], itertools.count(1)
    while queue:
        cost, _, state = heapq.heappop(queue)
        if state == target:
            return cost
        if cost > best[state]:
            continue
        for axis, options in enumerate(choices):
            for option in options - {state[axis]}:
                after = (*state[:axis], option, *state[axis + 1 :])
                price = busiest_rank(state, after, shape, mesh_shape, axis)
                if price is not None and cost + price < best.get(after, math.inf):
                    best[after] = cost + price
                    heapq.heappush(queue, (cost + price, next(count), after))
    raise AssertionError("no way found")


@pytest.mark.parametrize("shape", [(8, 6), (6, 7), (7,), (13,), (0, 6)])
@pytest.mark.parametrize("mesh_shape", [(3,), (2, 2), (2, 3)])
def test_no_way_is_cheaper(shape, mesh_shape):
    kinds = [R, P, *(Shard(dim) for dim in range(len(shape)))]
    states = list(itertools.product(kinds, repeat=len(mesh_shape)))
    rng = np.random.default_rng(len(shape) + sum(mesh_shape))
    for _ in range(12):
        source, target = (states[i] for i in rng.integers(0, len(states), 2))
        found = plan(source, target, shape, mesh_shape)
        expected = cheapest_by_brute_force(source, target, shape, mesh_shape)
        assert found.cost() == expected, (source, target, names(found))


@settings(max_examples=30)
@given(cases())
def test_the_same_is_found_again(case):
    mesh_shape, shape, source, target = case
    again = plan.__wrapped__(source, target, shape, mesh_shape)
    assert plan(source, target, shape, mesh_shape) == again


def test_the_description_names_axes_steps_and_bytes():
    text = plan((S0, R), (S1, R), (8, 8), (4, 2)).describe(["dp", "tp"], itemsize=8)
    assert text.splitlines() == [
        "all_to_all     axis 'dp': Shard(0) -> Shard(1), 96 bytes",
        "in all at most 96 bytes sent or received per rank",
    ]
    assert "nothing to do" in plan((R,), (R,), (2,), (2,)).describe(["dp"], itemsize=8)


@pytest.mark.parametrize(
    ("placements", "message"),
    [
        ((S0,), "1 placements for a mesh of 2 axes"),
        ((S0, S2), "dims go from 0 to 1"),
        ((S0, Shard(-3)), "dims go from 0 to 1"),
        ((P, Partial("max")), "mixes reductions"),
        ((S0, "shard"), "not 'shard'"),
    ],
)
def test_wrong_placements_are_refused(placements, message):
    with pytest.raises(UsageError, match=f"(?i){message}"):
        checked_placements(placements, 2, 2, "distribute")


def test_wrong_values_are_refused():
    with pytest.raises(UsageError, match="For a mean"):
        Partial("mean")
    with pytest.raises(UsageError, match="number of a dim"):
        Shard("rows")


def test_dims_are_counted_from_the_front():
    assert checked_placements([Shard(-1), S0], 2, 3, "distribute") == (S2, S0)
