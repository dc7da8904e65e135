"""A DTensor's parts are boxes that make up the global array, on any mesh."""

import itertools

import ml_dtypes
import numpy as np
import pytest

import ferro
from ferro import UsageError
from ferro_strategies import DeviceMesh, DistributedGenerator, DTensor, Partial, Replicate, Shard, distribute

from .assembler import assemble, copied, scatter

MESHES = [((3,), ("a",)), ((2, 2), ("a", "b")), ((1, 2, 2), ("a", "b", "c"))]


@pytest.mark.parametrize(("shape", "names"), MESHES, ids=str)
def test_parts_make_up_the_array_and_are_written_in_place(shape, names):
    wholes = [
        np.arange(35, dtype=np.float32).reshape(7, 5),
        np.arange(6).reshape(3, 1, 2).astype(ml_dtypes.bfloat16),
        np.zeros((0, 4), np.complex128),
        np.array(3, np.int8),
    ]

    def placements_of(array):
        choices = [Replicate(), *map(Shard, range(min(array.ndim, 2)))]
        return itertools.product(choices, repeat=len(shape))

    def work(group):
        mesh = DeviceMesh(shape, names, group)
        found = []
        for whole in wholes:
            for placements in placements_of(whole):
                tensor = distribute(whole, mesh, placements)
                before = copied(tensor.checkpoint_arrays())
                scatter({"": (whole * 0 + 1).astype(whole.dtype)}, tensor.checkpoint_arrays())
                assert (tensor.full_tensor() == 1).all()
                found.append(before)
        return found

    expected = [whole for whole in wholes for _ in placements_of(whole)]
    ranks = ferro.simulate(work, int(np.prod(shape)), timeout_s=20, run_timeout_s=60)
    for pieces, whole in zip(zip(*ranks, strict=True), expected, strict=True):
        found = assemble(pieces)[""]
        assert (found.dtype, found.shape, found.tobytes()) == (whole.dtype, whole.shape, whole.tobytes())
        assert all(piece[""].on_all_ranks for piece in pieces)


def test_a_partial_is_refused():
    def work(group):
        mesh = DeviceMesh((2,), ("a",), group)
        tensor = DTensor.from_local(np.ones(3), mesh, (Partial(),))
        with pytest.raises(UsageError, match=r"is not reduced yet.*Save what redistribute\(\) makes of it"):
            tensor.checkpoint_arrays()

    ferro.simulate(work, 2, timeout_s=20)


def test_a_mesh_of_some_ranks_has_arrays_that_not_all_ranks_know():
    def work(group):
        mesh = DeviceMesh(np.array([2, 0]), ("a",), group)
        if mesh.coordinates is None:
            return {}
        return copied(distribute(np.arange(5), mesh, (Shard(0),)).checkpoint_arrays())

    ranks = ferro.simulate(work, 3, timeout_s=20)
    assert assemble(ranks)[""].tolist() == [0, 1, 2, 3, 4]
    assert not ranks[0][""].on_all_ranks


def test_a_generator_goes_on():
    def work(group):
        mesh = DeviceMesh((2,), ("a",), group)
        generator = DistributedGenerator(3, mesh)
        generator.random(5, (Shard(0),))
        other = DistributedGenerator(4, mesh)
        other.load_state_dict(generator.state_dict())
        return [one.random(5, (Shard(0),)).full_tensor().tolist() for one in (generator, other)]

    for one, other in ferro.simulate(work, 2, timeout_s=20):
        assert one == other
