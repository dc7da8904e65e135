"""Redistribution of DTensors: values stay the same, and no more is moved than planned."""

from __future__ import annotations

import itertools

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from ferro_strategies.dtensor import Partial, Replicate, Shard, distribute, plan_redistribute

from .arrays_on_mesh import (
    MESHES,
    CollectiveLog,
    expected_collectives,
    expected_local,
    on_mesh,
    placement_tuples,
    random_dtensor,
)

R, S0, S1, P = Replicate(), Shard(0), Shard(1), Partial()


@st.composite
def moves(draw):
    mesh_shape = draw(st.sampled_from(MESHES))
    shape = tuple(draw(st.lists(st.integers(0, 7), max_size=3)))
    op = draw(st.sampled_from(["sum", "prod", "max", "min"]))
    source = draw(placement_tuples(mesh_shape, len(shape), op=op))
    target = draw(placement_tuples(mesh_shape, len(shape), op=op))
    return mesh_shape, shape, source, target


@settings(max_examples=50, deadline=None)
@given(moves(), st.sampled_from([np.float64, np.float32, np.int32]))
def test_redistribution_equals_slicing_the_whole(case, dtype):
    mesh_shape, shape, source, target = case

    def check(mesh):
        x, whole = random_dtensor(mesh, source, shape, dtype=dtype)
        y = x.redistribute(target)
        assert (y.placements, y.shape, y.dtype) == (target, shape, dtype)
        if not any(isinstance(one, Partial) for one in target):
            np.testing.assert_array_equal(y.local, expected_local(mesh, target, whole))
        np.testing.assert_array_equal(y.full_tensor(), whole)

    on_mesh(mesh_shape, check)


@pytest.mark.parametrize("mesh_shape", [(3,), (2, 2)])
def test_every_pair_of_placements(mesh_shape):
    kinds = [R, S0, S1, P]
    states = list(itertools.product(kinds, repeat=len(mesh_shape)))

    def check(mesh):
        for source, target in itertools.product(states, repeat=2):
            x, whole = random_dtensor(mesh, source, (5, 3))
            y = x.redistribute(target)
            if P not in target:
                np.testing.assert_array_equal(y.local, expected_local(mesh, target, whole))
            np.testing.assert_array_equal(y.full_tensor(), whole)

    on_mesh(mesh_shape, check)


def test_three_axes_sharding_one_dim_unevenly():
    def check(mesh):
        x, whole = random_dtensor(mesh, (S0, S1, S0), (7, 3))
        for target in [(S1, S0, S1), (R, S0, S0), (S0, S0, S0), (P, S0, R)]:
            x = x.redistribute(target)
            np.testing.assert_array_equal(x.full_tensor(), whole)

    on_mesh((2, 2, 2), check)


@pytest.mark.parametrize("target", [(R,), (S0,), (S1,)])
def test_the_result_shares_no_memory_with_the_operand(target):
    def check(mesh):
        for source in [(R,), (S0,), (P,)]:
            x, _ = random_dtensor(mesh, source, (4, 4))
            y = x.redistribute(target)
            assert (y is x) == (source == target)
            assert y is x or not np.may_share_memory(x.local, y.local)

    for ranks in (1, 2):
        on_mesh((ranks,), check)


def test_parts_of_another_dtype_and_memory_order():
    def check(mesh):
        whole = np.asfortranarray(np.arange(30, dtype=np.complex64).reshape(2, 5, 3))
        x = distribute(whole, mesh, [Shard(1)])
        np.testing.assert_array_equal(x.redistribute([Shard(-1)]).full_tensor(), whole)

    on_mesh((3,), check)


@settings(max_examples=25, deadline=None)
@given(moves())
def test_an_observer_sees_the_collectives_and_bytes_of_the_plan(case):
    mesh_shape, shape, source, target = case
    log = CollectiveLog()

    def check(mesh):
        x, _ = random_dtensor(mesh, source, shape)
        with log.recording(mesh):
            x.redistribute(target)
        return expected_collectives(plan_redistribute(source, target, shape, mesh_shape), mesh.coordinates, itemsize=8)

    for rank, expected in enumerate(on_mesh(mesh_shape, check, observers=[log])):
        assert log.calls[rank] == expected


def test_costs_and_explanations_communicate_nothing():
    log = CollectiveLog()

    def check(mesh):
        x, _ = random_dtensor(mesh, (S0, R), (8, 8))
        with log.recording(mesh):
            text = x.explain_redistribute((R, R))
            cost = x.redistribute_cost((R, R))
        return cost, text

    for cost, text in on_mesh((2, 2), check, observers=[log]):
        assert cost == 8 * 8 * 8 // 2
        assert text.splitlines()[0] == "all_gather     axis 'dp': Shard(0) -> Replicate(), 256 bytes"
    assert not log.calls


def test_a_negative_zero_survives_being_the_term_of_a_sum():
    def check(mesh):
        for zero in (np.full(3, -0.0), np.full(3, complex(-0.0, -0.0))):
            for placement in (Replicate(), Shard(0)):
                x = distribute(zero, mesh, [placement]).redistribute([Partial()]).full_tensor()
                assert np.signbit(x.real).all()
                assert np.signbit(x.imag).all() == (x.dtype.kind == "c")

    on_mesh((2,), check)
