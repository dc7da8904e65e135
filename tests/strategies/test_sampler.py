"""ShardedSampler: disjoint, complete, the same shuffle everywhere."""

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

import ferro
from ferro import UsageError
from ferro_strategies import ShardedSampler

lengths, world_sizes = st.integers(0, 40), st.integers(1, 7)


def shares(length, world_size, **options):
    return [list(ShardedSampler(length, (rank, world_size), **options)) for rank in range(world_size)]


@given(lengths, world_sizes, st.booleans())
def test_shares_are_disjoint_and_complete(length, world_size, shuffle):
    parts = shares(length, world_size, shuffle=shuffle)
    assert sorted(index for part in parts for index in part) == list(range(length))
    sizes = [len(part) for part in parts]
    assert max(sizes) - min(sizes) <= 1
    assert sizes == sorted(sizes, reverse=True)


@given(lengths, world_sizes)
def test_pad_gives_every_rank_as_many_and_drops_none(length, world_size):
    parts = shares(length, world_size, pad=True)
    assert {len(part) for part in parts} == {-(-length // world_size)}
    assert {index for part in parts for index in part} == set(range(length))


@given(lengths, world_sizes)
def test_drop_last_gives_every_rank_as_many_and_repeats_none(length, world_size):
    parts = shares(length, world_size, drop_last=True)
    assert {len(part) for part in parts} == {length // world_size}
    dealt = [index for part in parts for index in part]
    assert len(set(dealt)) == len(dealt)


@pytest.mark.parametrize("options", [{}, {"pad": True}, {"drop_last": True}], ids=str)
def test_the_length_is_that_of_the_share(options):
    for rank in range(3):
        sampler = ShardedSampler(10, (rank, 3), **options)
        assert len(sampler) == len(list(sampler)) == len(sampler.indices())


def test_batches_of_all_ranks_are_those_of_one_process():
    one = list(ShardedSampler(22, (0, 1), seed=3).batches(8))
    parts = [list(ShardedSampler(22, (rank, 2), seed=3).batches(4)) for rank in range(2)]
    for step, whole in enumerate(one):
        together = np.concatenate([part[step] for part in parts])
        assert sorted(together.tolist()) == sorted(whole.tolist())
    assert [len(batch) for batch in parts[0]] == [4, 4, 3]


def test_epochs_and_seeds_shuffle_differently_and_repeatably():
    def order(seed, epoch):
        sampler = ShardedSampler(50, (1, 2), seed=seed)
        sampler.set_epoch(epoch)
        return list(sampler)

    orders = [order(0, 0), order(0, 1), order(1, 0)]
    assert len({tuple(indices) for indices in orders}) == 3
    assert order(0, 1) == orders[1]
    assert list(ShardedSampler(6, (1, 2), shuffle=False)) == [1, 3, 5]


def test_a_group_gives_rank_and_size():
    parts = ferro.simulate(lambda group: list(ShardedSampler(9, group)), 3, timeout_s=10)
    assert parts == shares(9, 3)


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: ShardedSampler(5, (2, 2)), "rank 2 of 2"),
        (lambda: ShardedSampler(5, (-1, 2)), "rank -1 of 2"),
        (lambda: ShardedSampler(-1, (0, 1)), "length must be at least 0"),
        (lambda: ShardedSampler(5, (0, 1), pad=True, drop_last=True), "not both"),
        (lambda: ShardedSampler(5, (0, 1)).batches(0), "batch_size must be at least 1"),
    ],
)
def test_wrong_arguments_are_refused(make, message):
    with pytest.raises(ferro.UsageError, match=message):
        make()


@pytest.mark.parametrize("options", [{}, {"drop_last": True}, {"pad": True}, {"shuffle": False}], ids=str)
def test_the_rest_of_an_epoch_follows_a_loaded_state(options):
    for batches in range(5):
        sampler = ShardedSampler(23, (1, 3), **options)
        sampler.set_epoch(2)
        batch_of = sampler.batches(2)
        for _ in range(batches):
            next(batch_of, None)
        resumed = ShardedSampler(23, (1, 3), seed=5, **options)
        resumed.load_state_dict(sampler.state_dict())
        assert resumed.state_dict() == sampler.state_dict()
        resumed.set_epoch(2)
        assert list(resumed) == sampler.indices()[2 * batches :].tolist()
        assert list(resumed) == sampler.indices().tolist()  # only one iteration goes on in the middle
        resumed.set_epoch(3)
        assert resumed.state_dict()["taken"] == 0


def test_other_ranks_take_over_the_rest_of_an_epoch():
    before = [ShardedSampler(24, (rank, 3)) for rank in range(3)]
    taken = [next(sampler.batches(2)).tolist() for sampler in before]
    after = [ShardedSampler(24, (rank, 2)) for rank in range(2)]
    for sampler in after:
        sampler.load_state_dict(before[0].state_dict())
    rest = [list(sampler) for sampler in after]
    assert sorted(item for part in taken + rest for item in part) == list(range(24))


def test_a_state_of_another_data_set_is_refused():
    sampler = ShardedSampler(24, (0, 1))
    with pytest.raises(UsageError, match="the state is of 25 items; this sampler has 24"):
        sampler.load_state_dict(ShardedSampler(25, (0, 1)).state_dict())
    with pytest.raises(UsageError, match="the state lacks seed, taken"):
        sampler.load_state_dict({"length": 24, "epoch": 0})
