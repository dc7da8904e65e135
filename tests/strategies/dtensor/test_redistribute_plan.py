"""Redistribution plans: which steps, in what order, and how many bytes they move."""

from __future__ import annotations

import heapq
import itertools
import math

import numpy as np
import pytest
from hypothesis import given, settings

from ferro_strategies.dtensor import Partial, Replicate, Shard, plan_redistribute
from ferro_strategies.dtensor.local_shapes import local_slices

from .arrays_on_mesh import placement_changes

R, S0, S1, P = Replicate(), Shard(0), Shard(1), Partial()


def names(found):
    return [(str(step.kind), step.axis) for step in found.steps]


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
    found = plan_redistribute(source, target, (8, 8), (4,))
    assert [str(step.kind) for step in found.steps] == steps
    assert (found.cost(), found.cost(itemsize=8)) == (elements, 8 * elements)


def test_the_inner_axis_is_gathered_first_where_two_cut_one_dim():
    assert names(plan_redistribute((S0, S0), (R, R), (8, 2), (2, 2))) == [("all_gather", 1), ("all_gather", 0)]


def test_the_outer_axis_cuts_first():
    assert names(plan_redistribute((R, R), (S0, S0), (8, 2), (2, 2))) == [("slice", 0), ("slice", 1)]


def test_a_sum_is_reduced_while_pieces_are_small():
    assert names(plan_redistribute((S0, P), (R, R), (8, 2), (2, 2))) == [("all_reduce", 1), ("all_gather", 0)]


def test_a_detour_over_a_dim_of_neither_is_taken_when_it_moves_less():
    found = plan_redistribute((S0, R), (R, S0), (16, 16), (4, 4))
    assert names(found) == [("slice", 1), ("all_gather", 0), ("all_to_all", 1)]
    assert found.cost() == 256 * 3 // 16 * 2  # as in plan's docstring; straight on it is 192


def test_axes_of_one_rank_move_nothing():
    found = plan_redistribute((S0, P), (S1, R), (8, 2), (1, 1))
    assert {kind for kind, _ in names(found)} == {"relabel"}
    assert found.cost() == 0


@given(placement_changes())
def test_steps_lead_from_source_to_target_and_reduce_only_what_was_partial(case):
    mesh_shape, shape, source, target = case
    found = plan_redistribute(source, target, shape, mesh_shape)
    states = [source, *(step.after for step in found.steps)]
    assert [step.before for step in found.steps] == states[:-1]
    assert states[-1] == target
    for axis, placements in enumerate(zip(*states, strict=True)):
        allowed = {source[axis], target[axis]}
        assert all(one in allowed for one in placements if isinstance(one, Partial))


@given(placement_changes())
def test_never_worse_than_replicating_all(case):
    mesh_shape, shape, source, target = case
    whole = (R,) * len(mesh_shape)
    through = (plan_redistribute(source, whole, shape, mesh_shape), plan_redistribute(whole, target, shape, mesh_shape))
    found = plan_redistribute(source, target, shape, mesh_shape)
    assert found.cost() <= sum(plan.cost() for plan in through)


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
    raise AssertionError("no sequence of steps found")


@pytest.mark.parametrize("shape", [(8, 6), (6, 7), (7,), (13,), (0, 6)])
@pytest.mark.parametrize("mesh_shape", [(3,), (2, 2), (2, 3)])
def test_no_sequence_of_steps_is_cheaper(shape, mesh_shape):
    kinds = [R, P, *(Shard(dim) for dim in range(len(shape)))]
    states = list(itertools.product(kinds, repeat=len(mesh_shape)))
    rng = np.random.default_rng(len(shape) + sum(mesh_shape))
    for _ in range(12):
        source, target = (states[i] for i in rng.integers(0, len(states), 2))
        found = plan_redistribute(source, target, shape, mesh_shape)
        expected = cheapest_by_brute_force(source, target, shape, mesh_shape)
        assert found.cost() == expected, (source, target, names(found))


@settings(max_examples=30)
@given(placement_changes())
def test_the_same_plan_is_found_again(case):
    mesh_shape, shape, source, target = case
    again = plan_redistribute.__wrapped__(source, target, shape, mesh_shape)
    assert plan_redistribute(source, target, shape, mesh_shape) == again


def test_the_description_names_axes_steps_and_bytes():
    text = plan_redistribute((S0, R), (S1, R), (8, 8), (4, 2)).describe(["dp", "tp"], itemsize=8)
    assert text.splitlines() == [
        "all_to_all     axis 'dp': Shard(0) -> Shard(1), 96 bytes",
        "in all at most 96 bytes sent or received per rank",
    ]
    assert "nothing to do" in plan_redistribute((R,), (R,), (2,), (2,)).describe(["dp"], itemsize=8)
