"""DTensor: arrays that are spread, moved and gathered stay the same, and move what is said."""

from __future__ import annotations

import itertools
import re
import tracemalloc

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from ferro import UnsupportedError, UsageError
from ferro_strategies.dtensor import DTensor, Partial, Replicate, Shard, distribute, plan
from ferro_strategies.mesh import DeviceMesh

from .dtensor_ranks import MESHES, Watch, buffers, held, on_mesh, placement_tuples, spread

R, S0, S1, P = Replicate(), Shard(0), Shard(1), Partial()


@st.composite
def moves(draw):
    mesh_shape = draw(st.sampled_from(MESHES))
    shape = tuple(draw(st.lists(st.integers(0, 7), max_size=3)))
    op = draw(st.sampled_from(["sum", "prod", "max", "min"]))
    source = draw(placement_tuples(mesh_shape, len(shape), op=op))
    target = draw(placement_tuples(mesh_shape, len(shape), op=op))
    return mesh_shape, shape, source, target


@settings(max_examples=120, deadline=None)
@given(moves(), st.sampled_from([np.float64, np.float32, np.int32]))
def test_redistributed_is_what_slicing_the_whole_gives(case, dtype):
    mesh_shape, shape, source, target = case

    def check(mesh):
        x, whole = spread(mesh, source, shape, dtype=dtype)
        y = x.redistribute(target)
        assert (y.placements, y.shape, y.dtype) == (target, shape, dtype)
        if not any(isinstance(one, Partial) for one in target):
            np.testing.assert_array_equal(y.local, held(mesh, target, whole))
        np.testing.assert_array_equal(y.full_tensor(), whole)

    on_mesh(mesh_shape, check)


@pytest.mark.parametrize("mesh_shape", [(3,), (2, 2)])
def test_every_pair_of_placements(mesh_shape):
    kinds = [R, S0, S1, P]
    states = list(itertools.product(kinds, repeat=len(mesh_shape)))

    def check(mesh):
        for source, target in itertools.product(states, repeat=2):
            x, whole = spread(mesh, source, (5, 3))
            y = x.redistribute(target)
            if P not in target:
                np.testing.assert_array_equal(y.local, held(mesh, target, whole))
            np.testing.assert_array_equal(y.full_tensor(), whole)

    on_mesh(mesh_shape, check)


def test_three_axes_sharding_one_dim_unevenly():
    def check(mesh):
        x, whole = spread(mesh, (S0, S1, S0), (7, 3))
        for target in [(S1, S0, S1), (R, S0, S0), (S0, S0, S0), (P, S0, R)]:
            x = x.redistribute(target)
            np.testing.assert_array_equal(x.full_tensor(), whole)

    on_mesh((2, 2, 2), check)


@pytest.mark.parametrize("target", [(R,), (S0,), (S1,)])
def test_what_comes_out_shares_no_memory_with_what_went_in(target):
    def check(mesh):
        for source in [(R,), (S0,), (P,)]:
            x, _ = spread(mesh, source, (4, 4))
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


# -- what is moved -------------------------------------------------------------------------------


@settings(max_examples=60, deadline=None)
@given(moves())
def test_an_observer_sees_the_collectives_and_bytes_of_the_plan(case):
    mesh_shape, shape, source, target = case
    watch = Watch()

    def check(mesh):
        x, _ = spread(mesh, source, shape)
        watch.looking.add(mesh.parent.rank)
        x.redistribute(target)
        watch.looking.discard(mesh.parent.rank)
        return buffers(plan(source, target, shape, mesh_shape), mesh.coordinates, itemsize=8)

    for rank, expected in enumerate(on_mesh(mesh_shape, check, observers=[watch])):
        assert watch.seen[rank] == expected


def test_costs_and_explanations_communicate_nothing():
    watch = Watch()

    def check(mesh):
        x, _ = spread(mesh, (S0, R), (8, 8))
        watch.looking.add(mesh.parent.rank)
        text = x.explain_redistribute((R, R))
        cost = x.redistribute_cost((R, R))
        watch.looking.discard(mesh.parent.rank)
        return cost, text

    for cost, text in on_mesh((2, 2), check, observers=[watch]):
        assert cost == 8 * 8 * 8 // 2
        assert (
            text.splitlines()[0] == "all_gather     axis 'dp': Shard(0) -> Replicate(), 256 bytes"
        )
    assert not watch.seen


# -- making them ---------------------------------------------------------------------------------


@st.composite
def spreads(draw):
    mesh_shape = draw(st.sampled_from(MESHES))
    shape = tuple(draw(st.lists(st.integers(0, 6), max_size=3)))
    op = draw(st.sampled_from(["sum", "prod", "max"]))
    placements = draw(placement_tuples(mesh_shape, len(shape), op=op))
    source = draw(st.none() | st.integers(0, int(np.prod(mesh_shape)) - 1))
    return mesh_shape, shape, placements, source


@settings(max_examples=60, deadline=None)
@given(spreads(), st.sampled_from([np.float64, np.int16]))
def test_distributed_from_all_or_from_one(case, dtype):
    mesh_shape, shape, placements, source = case
    whole = np.random.default_rng(5).integers(-9, 9, shape).astype(dtype)

    def check(mesh):
        given_here = source is None or mesh.parent.rank == source
        x = distribute(whole if given_here else None, mesh, placements, source=source)
        assert (x.shape, x.dtype, x.placements) == (shape, dtype, placements)
        if not any(isinstance(one, Partial) for one in placements):
            np.testing.assert_array_equal(x.local, held(mesh, placements, whole))
        assert not np.may_share_memory(x.local, whole)
        np.testing.assert_array_equal(x.full_tensor(), whole)

    on_mesh(mesh_shape, check)


def test_the_source_is_a_rank_of_the_group_whatever_its_place():
    whole = np.arange(10.0)

    def check(mesh):
        order = DeviceMesh(np.array([[3, 0], [2, 1]]), ("a", "b"), mesh.parent)
        here = mesh.parent.rank == 2
        x = distribute(whole if here else None, order, (S0, S0), source=2)
        return x.local.tolist()

    assert on_mesh((4,), check) == [[3, 4], [8, 9], [5, 6, 7], [0, 1, 2]]


def test_what_stays_at_the_source_is_a_sum_of_one_dtype():
    whole = np.arange(4, dtype=np.int16)

    def check(mesh):
        x = distribute(whole if mesh.parent.rank == 1 else None, mesh, [P], source=1)
        assert x.dtype == np.int16
        assert not np.may_share_memory(x.local, whole)
        np.testing.assert_array_equal(x.full_tensor(), whole)

    on_mesh((2,), check)


def test_from_a_source_only_parts_are_sent():
    watch = Watch()

    def check(mesh):
        watch.looking.add(mesh.parent.rank)
        distribute(np.zeros((8, 100)) if mesh.parent.rank == 0 else None, mesh, [S0], source=0)
        watch.looking.discard(mesh.parent.rank)

    on_mesh((4,), check, observers=[watch])
    for rank in (1, 2, 3):
        assert ("scatter", 2 * 100 * 8) in watch.seen[rank]
        assert sum(nbytes for _, nbytes in watch.seen[rank]) < 3 * 100 * 8


@settings(max_examples=40, deadline=None)
@given(spreads())
def test_from_local_finds_the_shape(case):
    mesh_shape, shape, placements, _ = case

    def check(mesh):
        x, _ = spread(mesh, placements, shape)
        y = DTensor.from_local(x.local, mesh, placements)
        assert y.shape == shape
        assert y.local is x.local

    on_mesh(mesh_shape, check)


def refused(mesh_shape, function, error=UsageError):
    """Return every rank's message; each must refuse, and the group must still be good."""

    def check(mesh):
        with pytest.raises(error) as caught:
            function(mesh)
        mesh.parent.barrier()
        return str(caught.value)

    return on_mesh(mesh_shape, check)


@pytest.mark.parametrize(
    ("part", "placements", "rank"),
    [
        (lambda rank: np.zeros((2 + (rank == 1), 3)), [S0], 0),  # 7 rows: the first must have 3
        (lambda rank: np.zeros((2, 3 + (rank == 2))), [S0], 2),
        (lambda rank: np.zeros((2, 3 + (rank == 1))), [R], 1),
        (lambda rank: np.zeros((2, 3), np.float32 if rank == 2 else np.float64), [S0], 2),
        (lambda rank: np.zeros((2, 3, 1)[: 3 - (rank == 1)]), [S0], 1),
        (lambda rank: np.zeros((2, 3)[: 2 - (rank == 1)]), [S1], 1),  # which rank 1 has not
    ],
)
def test_parts_that_make_up_no_array_are_refused_on_every_rank(part, placements, rank):
    for message in refused(
        (3,), lambda mesh: DTensor.from_local(part(mesh.parent.rank), mesh, placements)
    ):
        assert f"rank {rank}, at ({rank},)" in message


def test_placements_that_differ_between_ranks_are_refused_on_every_rank():
    for message in refused(
        (2,),
        lambda mesh: DTensor.from_local(np.zeros(2), mesh, [S0 if mesh.parent.rank else R]),
    ):
        assert "rank 1" in message
        assert "same placements" in message


def test_a_part_of_a_known_shape_is_checked_where_it_is():
    for message in refused(
        (2,), lambda mesh: DTensor.from_local(np.zeros(2), mesh, [S0], shape=(9,))
    ):
        assert "must be (5,)" in message or "must be (4,)" in message


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
    assert all(message in text for text in refused((2, 2), call))


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
def test_a_source_that_gives_what_cannot_be_spread_is_refused_on_every_rank(
    given, placement, message
):
    def call(mesh):
        distribute(given if mesh.parent.rank == 1 else None, mesh, [placement], source=1)

    for text in refused((2,), call):
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
        # Both ranks' halves, and what the simulation copies on the way.
        assert max(on_mesh((2,), check)) < 2.5
    finally:
        tracemalloc.stop()


def test_ranks_outside_the_mesh_are_told_so():
    def check(mesh):
        part = DeviceMesh(np.array([0, 2]), ("a",), mesh.parent)
        if mesh.parent.rank == 1:
            for placement in (S0, R):
                with pytest.raises(UsageError, match="not in"):
                    distribute(np.zeros(4), part, [placement])
            return None
        return distribute(np.arange(4), part, [S0]).local.tolist()

    assert on_mesh((3,), check) == [[0, 1], None, [2, 3]]


# -- conversions ---------------------------------------------------------------------------------


def test_a_dtensor_becomes_an_array_only_when_asked():
    for message in refused(
        (2,), lambda mesh: np.asarray(spread(mesh, [S0], (4,))[0]), UnsupportedError
    ):
        assert "full_tensor()" in message


def test_one_element_becomes_a_number():
    def check(mesh):
        x, whole = spread(mesh, [P], (1, 1))
        assert (float(x), int(x), complex(x)) == (whole.item(),) * 3
        assert bool(x) == bool(whole.item())
        many, _ = spread(mesh, [S0], (4,))
        total = many.sum()
        assert total.placements == (P,)
        assert float(total) == many.full_tensor().sum()
        with pytest.raises(UsageError, match="4 elements, not one"):
            float(many)

    on_mesh((2,), check)


def test_what_it_says_of_itself():
    def check(mesh):
        x, _ = spread(mesh, [S0, R], (6, 2))
        assert (x.ndim, x.size, len(x), x.mesh) == (2, 12, 6, mesh)
        with pytest.raises(TypeError, match="len"):
            len(x.sum())
        with pytest.raises(TypeError, match="unhashable"):
            hash(x)
        return repr(x)

    assert set(on_mesh((2, 1), check)) == {
        "DTensor(shape=(6, 2), dtype=float64, placements=(Shard(0), Replicate()), "
        "mesh={'dp': 2, 'tp': 1})"
    }
