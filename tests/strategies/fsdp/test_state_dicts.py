"""State dicts of FSDP, full and sharded, of model and optimizer."""

import numpy as np
import pytest

import ferro
from ferro_strategies.fsdp import FlatShard, ShardingStrategy
from ferro_strategies.nn import BatchNorm, Linear, Sequential
from ferro_strategies.optim import SGD, AdamW

from .models import Scale, assert_same, build, shard, simulate, train

EVERY = list(ShardingStrategy)


def normed(seed=0):
    model = build(seed=seed)
    model.layers.append(BatchNorm(1, dtype=np.float64))
    return model


def blank():
    model = normed(seed=9)
    for item in (*model.parameters(), *model.buffers()):
        item.data[...] = 0
    return model


@pytest.mark.parametrize("sharding", EVERY)
def test_a_whole_state_fits_with_and_without_fsdp(sharding):
    state = {name: value + 0.5 for name, value in build().state_dict().items()}

    def run(group):
        model = shard(group, sharding=sharding)
        model.load_state_dict(state)
        assert_same(model.state_dict(), state, rtol=0, atol=0)
        assert list(model.state_dict()) == list(build().state_dict())
        first = model.full_state_dict(rank0_only=True)
        if group.rank == 0:
            assert_same(first, state, rtol=0, atol=0)
        else:
            assert first == {}
        return model.full_state_dict()

    for result in simulate(run, 4):
        plain = build()
        plain.load_state_dict(result)


@pytest.mark.parametrize("sharding", EVERY)
def test_shards_are_restored(sharding):
    def run(group):
        model = shard(group, normed(), sharding=sharding)
        shards = model.sharded_state_dict()
        whole = model.full_state_dict()
        assert shards.keys() == whole.keys()
        for name, own_shard in shards.items():
            if isinstance(own_shard, FlatShard):
                flat = whole[name].reshape(-1)
                assert own_shard.shape == whole[name].shape
                end = own_shard.start + own_shard.data.size
                np.testing.assert_array_equal(own_shard.data, flat[own_shard.start : end])
            else:
                assert "running" in name or "tracked" in name
        other = shard(group, blank(), sharding=sharding)
        other.load_sharded_state_dict(shards)
        assert_same(other.state_dict(), whole, rtol=0, atol=0)
        return {name: own_shard for name, own_shard in shards.items() if isinstance(own_shard, FlatShard)}

    results = simulate(run, 4)
    if sharding not in (ShardingStrategy.NO_SHARD, ShardingStrategy.HYBRID_SHARD):
        for name, value in build().state_dict().items():
            shards = [result[name].data for result in results]
            np.testing.assert_array_equal(np.concatenate(shards), value.reshape(-1))


def trained(model, optimizer):
    return train(model, optimizer=optimizer, steps=2)


@pytest.mark.parametrize("sharding", EVERY)
@pytest.mark.parametrize("others", [1, 3])
def test_training_goes_on_elsewhere_as_it_would_have_here(sharding, others):
    """From FSDP on four ranks to FSDP on others, and to one process."""

    def first(group):
        model = shard(group, sharding=sharding)
        optimizer = AdamW(model.parameters(), lr=0.05)
        train(model, group.rank, 4, optimizer=optimizer, steps=2)
        state, moments = model.full_state_dict(), model.full_optimizer_state_dict(optimizer)
        only = model.full_optimizer_state_dict(optimizer, rank0_only=True)
        assert only.keys() == (moments.keys() if group.rank == 0 else set())
        return state, moments, train(model, group.rank, 4, optimizer=optimizer, steps=1)

    state, moments, ended = simulate(first, 4)[0]
    plain = build()
    optimizer = AdamW(plain.parameters(), lr=0.05)
    trained(plain, optimizer)
    names = [name for name, _ in plain.named_parameters()]
    expected = optimizer.settings_state() | {
        f"{name}.{kind}": array
        for name, arrays in zip(names, optimizer.state, strict=True)
        for kind, array in arrays.items()
    }
    assert_same(moments, expected)

    def second(group):
        model = shard(group)
        optimizer = AdamW(model.parameters(), lr=9.0)
        model.load_full_state_dict(state)
        model.load_full_optimizer_state_dict(optimizer, moments)
        return train(model, group.rank, others, optimizer=optimizer, steps=1)

    for result in simulate(second, others):
        assert_same(result, ended)


@pytest.mark.parametrize("sharding", EVERY)
def test_shards_of_the_optimizers_state_are_restored(sharding):
    def run(group):
        model = shard(group, sharding=sharding)
        optimizer = AdamW(model.parameters(), lr=0.05)
        train(model, group.rank, 4, optimizer=optimizer)
        moments = model.sharded_optimizer_state_dict(optimizer)
        fresh = AdamW(model.parameters(), lr=1.0)
        model.load_sharded_optimizer_state_dict(fresh, moments)
        assert fresh.lr == 0.05
        assert_same(model.full_optimizer_state_dict(fresh), model.full_optimizer_state_dict(optimizer))
        return moments

    for result in simulate(run, 4):
        assert isinstance(result["layers.0.weight.m"], FlatShard)
        assert int(result["layers.0.weight.t"]) == 3


def test_parameters_without_state_are_marked():
    def run(group):
        model = shard(group)
        optimizer = SGD(model.parameters(), lr=0.1, momentum=0.9)
        empty = model.full_optimizer_state_dict(optimizer)
        assert [name for name in empty if name.startswith("layers")] == [f"{name}.fresh" for name in model.state_dict()]
        train(model, optimizer=optimizer)
        model.load_full_optimizer_state_dict(optimizer, empty)
        return optimizer.state

    for state in simulate(run, 2):
        assert state == [{}] * 10


def test_parameters_and_state_of_one_element():
    """A shard of one element is not taken for state that belongs to the whole parameter."""

    def run(group):
        model = shard(group, Sequential(Scale(2.0)))
        optimizer = AdamW(model.parameters())
        y, pullback = model.vjp(np.ones(1))
        pullback(y)
        optimizer.step()
        state = model.full_optimizer_state_dict(optimizer)
        fresh = AdamW(model.parameters())
        model.load_full_optimizer_state_dict(fresh, state)
        assert_same(model.full_optimizer_state_dict(fresh), state, rtol=0, atol=0)
        return {name: value.shape for name, value in state.items() if not name.startswith("groups")}

    shapes = {"lr": (), "layers.0.factor.m": (1,), "layers.0.factor.v": (1,)}
    assert simulate(run, 3) == [shapes | {"layers.0.factor.t": ()}] * 3


# -- what does not fit -----------------------------------------------------------------------------


def refused(load, words, *unchanged):
    before = [item.copy() for item in unchanged]
    with pytest.raises(ferro.UsageError, match=words) as caught:
        load()
    assert "Nothing was loaded" in str(caught.value)
    for now, then in zip(unchanged, before, strict=True):
        np.testing.assert_array_equal(now, then)


def test_nothing_is_loaded_when_a_whole_state_does_not_fit_on_one_rank():
    def run(group):
        model = shard(group, normed())
        kept = [item.data for item in (*model.parameters(), *model.buffers())]

        def load(change):
            state = {name: np.array(value + 1) for name, value in normed().state_dict().items()}
            if group.rank == 1:
                change(state)
            return lambda: model.load_state_dict(state)

        refused(load(lambda state: state.pop("layers.0.bias")), "missing 'layers.0.bias'", *kept)
        refused(load(lambda state: state.update(x=np.ones(1))), "unexpected 'x'", *kept)
        wrong = {"layers.0.bias": 3.0}
        refused(load(lambda state: state.update(wrong)), "expected a NumPy or CuPy", *kept)
        wrong = {"layers.0.bias": np.ones(8)}
        refused(load(lambda state: state.update(wrong)), r"float64 \(7,\), given", *kept)
        wrong = {"layers.6.running_mean": np.ones(1, np.float32)}
        refused(load(lambda state: state.update(wrong)), "given float32", *kept)

    simulate(run, 3)


def test_nothing_is_loaded_when_shards_do_not_fit():
    def shards(group):
        return shard(group, normed()).sharded_state_dict()

    of_two = simulate(shards, 2)[0]

    def run(group):
        model = shard(group, normed())
        kept = [item.data for item in model.parameters()]
        refused(lambda: model.load_sharded_state_dict(of_two), "as many ranks", *kept)
        whole = model.full_state_dict()
        refused(lambda: model.load_sharded_state_dict(whole), "given a ndarray", *kept)
        wrong = model.sharded_state_dict()
        wrong["layers.6.running_mean"] = wrong["layers.0.bias"]
        refused(lambda: model.load_sharded_state_dict(wrong), "is a buffer", *kept)

    simulate(run, 3)


def test_nothing_is_loaded_when_the_optimizers_state_does_not_fit_on_one_rank():
    def run(group):
        model = shard(group)
        optimizer = AdamW(model.parameters())
        train(model, group.rank, 2, optimizer=optimizer)
        kept = [array for arrays in optimizer.state for array in arrays.values()]
        whole = model.full_optimizer_state_dict(optimizer)
        shards = model.sharded_optimizer_state_dict(optimizer)

        def load(change):
            state = whole if group.rank == 0 else change(dict(whole))
            return lambda: model.load_full_optimizer_state_dict(optimizer, state)

        def without(name):
            return lambda state: {key: value for key, value in state.items() if key != name}

        refused(load(without("lr")), "'lr' is missing", *kept)
        refused(load(without("layers.0.bias.m")), "missing", *kept)
        refused(load(lambda state: state | {"x.m": np.ones(1)}), "unexpected 'x.m'", *kept)
        wrong = {"layers.0.bias.m": np.ones(3)}
        refused(load(lambda state: state | wrong), r"\(7,\), given float64 \(3,\)", *kept)
        wrong = {"layers.0.bias.t": 3}
        refused(load(lambda state: state | wrong), "expected a NumPy or CuPy", *kept)
        assert optimizer.state[0]["m"] is kept[0]

        def load_shards(change):
            return lambda: model.load_sharded_optimizer_state_dict(optimizer, shards | change)

        refused(load_shards({"layers.0.bias.m": np.ones(7)}), "given a ndarray", *kept)
        refused(load_shards({"layers.0.bias.t": shards["layers.0.bias.m"]}), "one piece", *kept)
        other = AdamW(Linear(1, 1).parameters())
        with pytest.raises(ferro.UsageError, match="none of this module"):
            model.full_optimizer_state_dict(other)

    simulate(run, 2)
