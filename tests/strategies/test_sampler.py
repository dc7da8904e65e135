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
        (lambda: ShardedSampler(5.0, (0, 1)), "length must be a whole number, not 5.0"),
        (lambda: ShardedSampler(5, (0, 1), seed=-1), "seed must be at least 0"),
        (lambda: ShardedSampler(5, (0, 1)).set_epoch(-1), "epoch must be at least 0, not -1"),
        (lambda: ShardedSampler(5, (0, 1), weights=[1, 2]), r"weights has shape \(2,\) for 5 items"),
        (lambda: ShardedSampler(2, (0, 1), weights=[1, -1]), "at least 0, and not all 0"),
        (lambda: ShardedSampler(2, (0, 1), weights=[1, 1], shuffle=False), "shuffle is False"),
        (lambda: ShardedSampler(3, (0, 1), weights=[1, 0, 0], replacement=False), "3 draws without replacement of 1"),
        (lambda: ShardedSampler(3, (0, 1), draws=2), "belong to weights="),
        (lambda: ShardedSampler(3, (0, 1), groups=[0.5, 1, 2]), "groups must be 3 whole numbers, not float64"),
        (lambda: ShardedSampler(2, (0, 1), groups=[0, 1], weights=[1, 1]), "choose weights or groups"),
    ],
)
def test_wrong_arguments_are_refused(make, message):
    with pytest.raises(ferro.UsageError, match=message):
        make()


@pytest.mark.parametrize("options", [{}, {"drop_last": True}, {"pad": True}, {"shuffle": False}], ids=str)
def test_the_rest_of_an_epoch_follows_a_loaded_state(options):
    for batches, rank in [(0, 1), (1, 0), (2, 2), (3, 1), (3, 2), (4, 0), (4, 2)]:
        sampler = ShardedSampler(23, (rank, 3), **options)
        sampler.set_epoch(2)
        batch_of = sampler.batches(2)
        for _ in range(batches):
            next(batch_of, None)
        resumed = ShardedSampler(23, (rank, 3), seed=5, **options)
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


@given(st.data())
def test_an_epoch_goes_on_evenly_on_any_number_of_ranks(data):
    """Every item is handed out once; with drop_last and pad every rank gets as many, also behind a loaded state."""
    length, first, then, batch = (data.draw(st.integers(*ends)) for ends in ((0, 40), (1, 5), (1, 5), (1, 4)))
    mode = data.draw(st.sampled_from([{}, {"drop_last": True}, {"pad": True}]))
    groups = data.draw(st.none() | st.just(np.arange(length) % 3))
    options = mode | {"groups": groups, "run_items": data.draw(st.integers(1, 12))}
    before = [ShardedSampler(length, (rank, first), **options) for rank in range(first)]
    counts = before[0].batch_counts(batch)
    steps = data.draw(st.integers(0, min(counts)))
    taken = []
    for sampler in before:
        of_rank = sampler.batches(batch)
        taken += [index for _ in range(steps) for index in next(of_rank).tolist()]
    states = [sampler.state_dict() for sampler in before]
    assert all(state == states[0] for state in states)
    after = [ShardedSampler(length, (rank, then), **options) for rank in range(then)]
    for sampler in after:
        sampler.load_state_dict(states[-1])
    rest = [list(sampler.batches(batch)) for sampler in after]
    everything = taken + [index for batches in rest for indices in batches for index in indices.tolist()]
    if groups is not None:
        assert all(len({int(groups[index]) for index in indices}) == 1 for batches in rest for indices in batches)
    if mode:
        assert len({tuple(map(len, batches)) for batches in rest}) == 1
    if not mode and groups is None:
        assert sorted(everything) == list(range(length))
    elif "drop_last" not in mode:
        assert set(everything) == set(range(length))
    else:
        assert len(set(everything)) == len(everything) or groups is not None


def test_a_rank_that_has_no_items_of_a_short_group_counts_as_the_others_do():
    samplers = [ShardedSampler(6, (rank, 4), groups=[0, 0, 1, 1, 1, 1], shuffle=False) for rank in range(4)]
    assert [next(sampler.batches(1)).tolist() for sampler in samplers] == [[0], [1], [4], [5]]
    first, *others = [sampler.state_dict() for sampler in samplers]
    assert first["taken"] == 2
    assert others == [first] * 3


@pytest.mark.parametrize("options", [{}, {"drop_last": True}, {"pad": True}], ids=str)
@pytest.mark.parametrize("groups", [None, np.arange(23) % 4], ids=["alone", "groups"])
def test_numbers_of_batches_are_known_before(options, groups):
    for batch in (1, 3):
        samplers = [ShardedSampler(23, (rank, 3), groups=groups, run_items=5, **options) for rank in range(3)]
        counts = [len(list(sampler.batches(batch))) for sampler in samplers]
        assert all(sampler.batch_counts(batch) == counts for sampler in samplers)
        assert samplers[0].share_sizes() == [len(sampler) for sampler in samplers]


def test_weights_draw_items():
    weights = np.array([0.0, 1.0, 3.0])
    samplers = [ShardedSampler(3, (rank, 2), weights=weights, draws=4000) for rank in range(2)]
    drawn = np.concatenate([sampler.indices() for sampler in samplers])
    assert np.bincount(drawn).tolist() == pytest.approx([0, 1000, 3000], abs=120)
    assert [len(sampler) for sampler in samplers] == [2000, 2000]
    samplers[0].set_epoch(1)
    assert samplers[0].indices().tolist() != samplers[1].indices().tolist()
    once = ShardedSampler(3, (0, 1), weights=weights, draws=2, replacement=False)
    assert sorted(once) == [1, 2]


def test_groups_keep_items_of_one_kind_together_in_another_order_each_epoch():
    groups = np.repeat([7, 1, 5], [6, 8, 2])
    sampler = ShardedSampler(16, (0, 1), groups=groups, run_items=4)
    orders = []
    for epoch in range(3):
        sampler.set_epoch(epoch)
        batches = list(sampler.batches(4))
        assert sorted(map(len, batches)) == [2, 2, 4, 4, 4]
        assert sorted(index for batch in batches for index in batch.tolist()) == list(range(16))
        orders.append([int(groups[batch[0]]) for batch in batches])
    assert len({tuple(order) for order in orders}) > 1


def test_sizes_may_be_numpys_and_the_state_is_plain():
    import json

    sampler = ShardedSampler(np.int64(9), (np.int32(0), np.int64(2)), seed=np.uint8(3))
    sampler.set_epoch(np.int64(1))
    assert [len(batch) for batch in sampler.batches(np.int16(2))] == [2, 2, 1]
    assert json.loads(json.dumps(sampler.state_dict())) == {"length": 9, "seed": 3, "epoch": 1, "taken": 9}
