"""Replicas that are no longer equal are found within a step, on every rank, and named."""

from itertools import pairwise

import ml_dtypes
import numpy as np
import pytest

import ferro
from ferro_strategies import DDP, FSDP, DeviceMesh, hooks
from ferro_strategies.nn import BatchNorm, Linear, ReLU, Sequential
from ferro_strategies.optim import SGD, AdamW
from ferro_strategies.replica_check import ReplicaCheck, checksum, describe_differences


def build(dtype=np.float32):
    return Sequential(
        Linear(3, 8, dtype=dtype, rng=0), ReLU(), BatchNorm(8, dtype=dtype), Linear(8, 2, dtype=dtype, rng=1)
    )


def ddp(**options):
    return lambda group: DDP(build(), group, **options)


def no_shard(group):
    return FSDP(build(), group, sharding="no_shard")


def hybrid(group):
    mesh = DeviceMesh((2, 2), ("replicas", "shards"), group)
    return FSDP(build(), mesh["shards"], sharding="hybrid_shard", replicas=mesh["replicas"])


WRAPPERS = {
    "ddp": ddp(),
    "ddp_hook": ddp(hook=hooks.bfloat16),
    "ddp_find_unused": ddp(find_unused=True),
    "ddp_hook_find_unused": ddp(hook=hooks.mean, find_unused=True),
    "no_shard": no_shard,
    "hybrid_shard": hybrid,
}


def one_step(model, optimizer, rank, step):
    rng = np.random.default_rng((rank, step))
    y, pullback = model.vjp(rng.standard_normal((4, 3), np.float32))
    pullback(rng.standard_normal(y.shape, np.float32))
    optimizer.step()
    optimizer.zero_grad()


@pytest.mark.parametrize("name", WRAPPERS)
def test_a_drift_is_found_in_the_next_step_and_named(name):
    def run(group):
        model = WRAPPERS[name](group)
        optimizer = AdamW(model.parameters(), lr=0.01)
        for step in range(3):
            one_step(model, optimizer, group.rank, step)
        if group.rank == group.world_size - 1:
            dict(model.named_parameters())["layers.3.weight"].data.reshape(-1)[-1:] += 1e-6
        with pytest.raises(
            ferro.UsageError, match=r"no longer equal: 'layers\.3\.weight' \(rank 1 differs from rank 0\)"
        ):
            one_step(model, optimizer, group.rank, 3)
        # The group is still usable, and so is the model when it has one state again.
        model.load_state_dict(build().state_dict())
        one_step(model, optimizer, group.rank, 4)
        return model.state_dict()

    states = ferro.simulate(run, 4 if name == "hybrid_shard" else 2, timeout_s=10)
    for one, other in pairwise(states):
        np.testing.assert_array_equal(one["layers.0.weight"], other["layers.0.weight"])


@pytest.mark.parametrize("ranks", [3, 5])
def test_every_rank_learns_of_it_also_where_the_mean_is_its_own_value(ranks):
    def run(group):
        model = DDP(build(), group)
        optimizer = SGD(model.parameters(), lr=0.1)
        optimizer.lr = 0.1 * (1 + (group.rank == 1))
        one_step(model, optimizer, group.rank, 0)
        with pytest.raises(ferro.UsageError, match=r"'layers\.0\.weight' \(rank 1 differs from rank 0\)"):
            one_step(model, optimizer, group.rank, 1)

    ferro.simulate(run, ranks, timeout_s=10)


def test_the_check_can_be_turned_off():
    def run(group):
        for model in (
            DDP(build(), group, check_replicas=False),
            FSDP(build(), group, sharding="no_shard", check_replicas=False),
        ):
            optimizer = SGD(model.parameters(), lr=0.1 * (1 + group.rank))
            for step in range(2):
                one_step(model, optimizer, group.rank, step)

    ferro.simulate(run, 2, timeout_s=10)


def test_ranks_that_have_left_a_join_do_not_count():
    def run(group):
        model = DDP(build(), group)
        optimizer = SGD(model.parameters(), lr=0.1)
        with model.join():
            for step in range(group.rank + 1):
                one_step(model, optimizer, group.rank, step)
        one_step(model, optimizer, group.rank, 9)

    ferro.simulate(run, 3, timeout_s=10)


@pytest.mark.parametrize("world_size", [1, 2, 3, 64, 1000])
def test_a_mean_of_checksums_tells_whether_all_are_equal(world_size):
    class Group:
        def __init__(self):
            self.world_size = world_size

    check = ReplicaCheck(Group())
    rng = np.random.default_rng(world_size)
    for differing in (0, 1, 2):
        digests = [int(rng.integers(2**32))] * world_size
        for rank in range(min(differing, world_size - 1)):
            digests[rank] ^= 1 << int(rng.integers(32))
        tails = np.zeros((world_size, check.tail_size), np.float32)
        for digest, tail in zip(digests, tails, strict=True):
            check.write(digest, tail)
        mean = tails.sum(axis=0, dtype=np.float32) / np.float32(world_size)
        assert check.agree(mean, world_size) == (len(set(digests)) == 1)


@pytest.mark.parametrize("dtype", [np.float32, np.float64, np.float16, ml_dtypes.bfloat16, np.complex64])
def test_one_changed_bit_is_found(dtype):
    class Group:
        world_size = 2

    for size in (1, 7, 5001, 100_001):
        array = np.ones(size, dtype)
        turns = 1 + array.nbytes // 2**16
        rng = np.random.default_rng(size)
        for _ in range(3):
            checks = ReplicaCheck(Group()), ReplicaCheck(Group())
            other = array.copy()
            other.view(np.uint8)[rng.integers(array.nbytes)] ^= 1
            assert checksum(array) != checksum(other)
            assert any(checks[0].digest([array]) != checks[1].digest([other]) for _ in range(turns))


def test_ranks_are_named_that_differ_from_most():
    sums = {0: {"a": 1, "b": 1}, 1: {"a": 2, "b": 1}, 2: {"a": 1, "b": 1}, 3: {"a": 3, "b": 1}}
    assert describe_differences(sums) == ["'a' (ranks 1, 3 differ from rank 0)"]
