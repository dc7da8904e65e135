"""distribute: every rank gets its part of an array that all ranks have, or one rank has."""

from __future__ import annotations

import re
import tracemalloc

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from ferro import UsageError
from ferro_strategies.dtensor import Partial, Replicate, Shard, distribute
from ferro_strategies.mesh import DeviceMesh

from .arrays_on_mesh import CollectiveLog, distributions, error_on_every_rank, expected_local, on_mesh

R, S0, S1, P = Replicate(), Shard(0), Shard(1), Partial()


@settings(max_examples=25, deadline=None)
@given(distributions(), st.sampled_from([np.float64, np.int16]))
def test_distributed_from_all_or_from_one(case, dtype):
    mesh_shape, shape, placements, source = case
    whole = np.random.default_rng(5).integers(-9, 9, shape).astype(dtype)

    def check(mesh):
        given_here = source is None or mesh.parent.rank == source
        x = distribute(whole if given_here else None, mesh, placements, source=source)
        assert (x.shape, x.dtype, x.placements) == (shape, dtype, placements)
        if not any(isinstance(one, Partial) for one in placements):
            np.testing.assert_array_equal(x.local, expected_local(mesh, placements, whole))
        assert not np.may_share_memory(x.local, whole)
        np.testing.assert_array_equal(x.full_tensor(), whole)

    on_mesh(mesh_shape, check)


def test_the_source_is_a_rank_of_the_parent_group_whatever_its_coordinates():
    whole = np.arange(10.0)

    def check(mesh):
        order = DeviceMesh(np.array([[3, 0], [2, 1]]), ("a", "b"), mesh.parent)
        here = mesh.parent.rank == 2
        x = distribute(whole if here else None, order, (S0, S0), source=2)
        return x.local.tolist()

    assert on_mesh((4,), check) == [[3, 4], [8, 9], [5, 6, 7], [0, 1, 2]]


def test_a_partial_stays_at_the_source_and_keeps_its_dtype():
    whole = np.arange(4, dtype=np.int16)

    def check(mesh):
        x = distribute(whole if mesh.parent.rank == 1 else None, mesh, [P], source=1)
        assert x.dtype == np.int16
        assert not np.may_share_memory(x.local, whole)
        np.testing.assert_array_equal(x.full_tensor(), whole)

    on_mesh((2,), check)


def test_from_a_source_only_parts_are_sent():
    log = CollectiveLog()

    def check(mesh):
        with log.recording(mesh):
            distribute(np.zeros((8, 100)) if mesh.parent.rank == 0 else None, mesh, [S0], source=0)

    on_mesh((4,), check, observers=[log])
    for rank in (1, 2, 3):
        assert ("scatter", 2 * 100 * 8) in log.calls[rank]
        assert sum(nbytes for _, nbytes in log.calls[rank]) < 4 * 100 * 8  # of 8 * 100 * 8


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda mesh: distribute(np.zeros(4), mesh, [S0]), "1 placements for a mesh of 2"),
        (lambda mesh: distribute(np.zeros(4), mesh, [S0, S1]), "Dims go from 0 to 0"),
        (lambda mesh: distribute(None, mesh, [S0, R]), "Give it on every rank"),
        (lambda mesh: distribute(np.zeros(4), mesh, [S0, R], source=9), "rank 9"),
        (lambda mesh: distribute(np.zeros(4), mesh, [R, R]).redistribute([R]), "redistribute: 1"),
    ],
)
def test_wrong_calls_are_refused_before_anything_is_sent(call, message):
    assert all(message in text for text in error_on_every_rank((2, 2), call))


@pytest.mark.parametrize(
    ("given", "placement", "message"),
    [
        (np.zeros(4), S1, "Dims go from"),
        (None, S0, "rank 1 is the source and must give the array: it gave None"),
        ([1, 2], S0, r"rank 1 is the source .* got builtins.list"),
        (np.zeros(4, ">f8"), S0, "rank 1 is the source .* foreign byte order"),
        (np.array([object()]), S0, "rank 1 is the source .* no collective carries"),
    ],
)
def test_an_unusable_array_of_the_source_is_refused_on_every_rank(given, placement, message):
    def call(mesh):
        distribute(given if mesh.parent.rank == 1 else None, mesh, [placement], source=1)

    for text in error_on_every_rank((2,), call):
        assert re.search(message, text)


def test_a_source_sends_without_a_copy_of_the_whole():
    def check(mesh):
        whole = np.zeros((8, 1 << 17)) if mesh.parent.rank == 0 else None
        mesh.parent.barrier()
        before, _ = tracemalloc.get_traced_memory()
        distribute(whole, mesh, [S0], source=0)
        mesh.parent.barrier()
        return (tracemalloc.get_traced_memory()[1] - before) / (8 << 20)

    tracemalloc.start()
    try:
        # Both ranks' halves, and what the simulation copies on the way: 2 or 2.5, as the ranks happen to meet; a copy
        # of the whole, which would stay until the end, adds 1.
        assert max(on_mesh((2,), check)) < 2.75
    finally:
        tracemalloc.stop()


def test_ranks_outside_the_mesh_raise():
    def check(mesh):
        part = DeviceMesh(np.array([0, 2]), ("a",), mesh.parent)
        if mesh.parent.rank == 1:
            for placement in (S0, R):
                with pytest.raises(UsageError, match="not in"):
                    distribute(np.zeros(4), part, [placement])
            return None
        return distribute(np.arange(4), part, [S0]).local.tolist()

    assert on_mesh((3,), check) == [[0, 1], None, [2, 3]]
