"""FSDP trains like one process, parameter by parameter, and its parameters are sharded."""

import copy

import numpy as np
import pytest

import ferro
from ferro_strategies.fsdp import FSDP, ShardingStrategy
from ferro_strategies.nn import (
    Attention,
    BatchNorm,
    Conv2d,
    Embedding,
    LayerNorm,
    Linear,
    Module,
    Parameter,
    ReLU,
    Residual,
    Sequential,
    Split,
    Unembedding,
)
from ferro_strategies.optim import SGD, AdamW

from .models import WITHOUT_REPLICAS, assert_same, backward, batch, build, shard, simulate, train

EVERY = [(item, ranks) for item in WITHOUT_REPLICAS for ranks in (1, 2, 3, 4)]
EVERY += [(ShardingStrategy.HYBRID_SHARD, 2), (ShardingStrategy.HYBRID_SHARD, 4)]


@pytest.mark.parametrize(("sharding", "ranks"), EVERY)
@pytest.mark.parametrize("dtype", [np.float32, np.float64])
def test_training_equals_one_process(sharding, ranks, dtype):
    def run(group):
        model = shard(group, build(dtype), sharding=sharding)
        return train(model, group.rank, ranks, dtype=dtype)

    expected = train(build(dtype), dtype=dtype)
    close = {"rtol": 1e-4, "atol": 1e-5} if dtype == np.float32 else {"rtol": 1e-9, "atol": 1e-12}
    results = simulate(run, ranks)
    for result in results:
        assert_same(result, expected, **close)
        assert_same(result, results[0], rtol=0, atol=0)


@pytest.mark.parametrize("units", [[], None, lambda *_: True], ids=["one", "default", "nested"])
@pytest.mark.parametrize("prefetch", [False, True])
def test_units_and_prefetching_change_nothing(units, prefetch):
    def run(group):
        model = shard(group, units=units, prefetch=prefetch)
        return train(model, group.rank, 3)

    for result in simulate(run, 3):
        assert_same(result, train(build()))


@pytest.mark.parametrize("sharding", WITHOUT_REPLICAS)
def test_more_ranks_than_elements(sharding):
    def tiny():
        return Sequential(Linear(1, 1, dtype=np.float64, rng=0), Linear(1, 1, dtype=np.float64, rng=1))

    def step(model):
        optimizer = SGD(model.parameters(), lr=0.1, momentum=0.9)
        for _ in range(2):
            backward(model, np.ones((1, 1)), np.zeros((1, 1)))
            optimizer.step()
        return model.state_dict()

    for result in simulate(lambda group: step(shard(group, tiny(), sharding=sharding)), 5):
        assert_same(result, step(tiny()))


def test_values_are_those_of_rank_0():
    def run(group):
        model = build(seed=group.rank)
        model.layers.append(BatchNorm(1, dtype=np.float64))
        model.layers[-1].running_mean.data[...] = group.rank + 5
        return shard(group, model).state_dict()

    for result in simulate(run, 3):
        np.testing.assert_array_equal(result["layers.6.running_mean"], [5])
        for name, value in build().state_dict().items():
            np.testing.assert_array_equal(result[name], value)


@pytest.mark.parametrize("sharding", list(ShardingStrategy))
def test_parameters_are_sharded_outside_passes_and_whole_inside(sharding):
    seen = []

    class Look(Module):
        """Records the shapes of its parameters when it computes."""

        def __init__(self):
            self.inner = Linear(3, 3, dtype=np.float64, rng=1)

        def look(self):
            seen.append([item.data.shape for item in self.inner.parameters()])

        def vjp(self, x):
            self.look()
            y, pull = self.inner.vjp(x)

            def pullback(grad):
                self.look()
                return pull(grad)

            return y, pullback

    def run(group):
        model = Sequential(Look(), ReLU())
        held = list(model.parameters())
        optimizer = AdamW(held)
        sharded = shard(group, model, sharding=sharding)
        assert list(sharded.parameters()) == held
        assert [item.name for item in held] == ["layers.0.inner.weight", "layers.0.inner.bias"]
        backward(sharded, np.ones((2, 3)), np.zeros((2, 3)))
        optimizer.step()
        return [(p.data.shape, p.grad.shape, optimizer.state[i]["m"].shape, p.splits) for i, p in enumerate(held)]

    results = simulate(run, 4)
    assert seen == [[(3, 3), (3,)]] * 8
    for weight, bias in results:
        if sharding is ShardingStrategy.NO_SHARD:
            assert weight[:3] == ((3, 3),) * 3
            assert weight[3] == bias[3] == ()
        else:
            assert weight[:3] in [((3,),) * 3, ((0,),) * 3, ((6,),) * 3]
            assert [split.dim for split in weight[3]] == [None]
    # Twelve elements on four ranks, or on the two of a mesh's row.
    if sharding in (ShardingStrategy.FULL_SHARD, ShardingStrategy.SHARD_OPTIMIZER):
        assert [result[0][0] for result in results] == [(3,), (3,), (3,), (0,)]
        assert [result[1][0] for result in results] == [(0,), (0,), (0,), (3,)]


def test_an_optimizer_may_be_made_before():
    def run(group):
        model = build()
        optimizer = AdamW(model.parameters(), lr=0.01)
        return train(shard(group, model), group.rank, 2, optimizer=optimizer)

    for result in simulate(run, 2):
        assert_same(result, train(build()))


@pytest.mark.parametrize("sharding", WITHOUT_REPLICAS)
def test_evaluation_gathers_and_frees(sharding):
    def run(group):
        model = shard(group, sharding=sharding)
        x, _ = batch(0)
        y = model(x)
        np.testing.assert_array_equal(y, build()(x))
        model.vjp(x)  # dropped
        return [item.data.ndim for item in model.parameters()], model.full_state_dict()

    for ndims, state in simulate(run, 2):
        if sharding is not ShardingStrategy.NO_SHARD:
            assert set(ndims) == {1}
        assert_same(state, build().state_dict(), rtol=0, atol=0)


def test_train_and_eval_reach_all_modules():
    def run(group):
        model = shard(group)
        model.eval()
        assert not any(item.training for item in model.modules())
        model.train()
        assert all(item.training for item in model.modules())

    simulate(run, 1)


# -- refusals --------------------------------------------------------------------------------------


@pytest.mark.parametrize("ranks", [(1, 2), (2, 2)], ids=str)
def test_models_that_differ_are_named_on_every_rank(ranks):
    rows, columns = ranks

    def run(group):
        model = Sequential(Linear(2, 2 + (group.rank == 1), rng=0))
        row, column = divmod(group.rank, columns)
        options = {"sharding": ShardingStrategy.HYBRID_SHARD, "replicas": group.split(column)}
        with pytest.raises(ferro.UsageError, match="the models differ: where rank 0 has") as caught:
            FSDP(model, group.split(row), **options)
        assert model.layers[0].weight.data.ndim == 2
        return str(caught.value)

    assert len(simulate(run, rows * columns)) == rows * columns


def test_options_that_differ_are_named():
    def run(group):
        sharding = WITHOUT_REPLICAS[group.rank]
        with pytest.raises(ferro.UsageError, match="rank 1 has the option sharding=shard_grad_op"):
            FSDP(build(), group, sharding=sharding)

    simulate(run, 2)


def test_wrong_arguments():
    def run(group):
        with pytest.raises(ferro.UsageError, match="unknown sharding 'some'"):
            FSDP(build(), group, sharding="some")
        with pytest.raises(ferro.UsageError, match="replicas"):
            FSDP(build(), group, sharding="hybrid_shard")
        with pytest.raises(ferro.UsageError, match="replicas"):
            FSDP(build(), group, replicas=group)
        with pytest.raises(ferro.UsageError, match="no parameters"):
            FSDP(ReLU(), group)
        model = FSDP(build(), group)
        with pytest.raises(ferro.UsageError, match="averages the gradients already"):
            FSDP(model, group)
        with pytest.raises(ferro.UsageError, match="cannot be copied"):
            copy.deepcopy(model)
        with pytest.raises(ferro.UsageError, match="cannot be copied"):
            copy.deepcopy(model.module)

    simulate(run, 1)


def test_a_parameter_cannot_be_thawed_later():
    def run(group):
        model = build()
        model.layers[0].weight.requires_grad = False
        model = shard(group, model)
        model.module.layers[0].module.weight.requires_grad = True
        with pytest.raises(ferro.UsageError, match=r"'layers\.0\.weight' was frozen"):
            model.vjp(batch(0)[0])

    simulate(run, 1)


def test_after_a_failed_backward_pass_nothing_goes_on():
    class Fails(Module):
        def __init__(self):
            self.own = Parameter(np.ones(3))

        def vjp(self, x):
            self.own.use()

            def pullback(grad):
                raise KeyError

            return x, pullback

    def run(group):
        model = shard(group, Sequential(Linear(3, 3, dtype=np.float64, rng=0), Fails()))
        _, pullback = model.vjp(batch(0)[0])
        with pytest.raises(KeyError):
            pullback(np.ones((12, 3)))
        assert {item.data.ndim for item in model.parameters()} == {1}
        for again in (lambda: model.vjp(batch(0)[0]), lambda: model(batch(0)[0])):
            with pytest.raises(ferro.UsageError, match="earlier backward pass failed"):
                again()

    simulate(run, 2)


def test_after_a_failed_forward_pass_everything_goes_on():
    def run(group):
        model = shard(group)
        with pytest.raises(ferro.UsageError, match="expected input of shape"):
            model.vjp(np.ones((2, 9)))
        assert {item.data.ndim for item in model.parameters()} == {1}
        return train(model, group.rank, 2)

    for result in simulate(run, 2):
        assert_same(result, train(build()))


def test_a_pullback_runs_once():
    def run(group):
        y, pullback = shard(group).vjp(batch(0)[0])
        pullback(y)
        with pytest.raises(ferro.UsageError, match="has been run"):
            pullback(y)

    simulate(run, 1)


def test_splits_name_the_shard_group():
    def run(group):
        model = shard(group, sharding=ShardingStrategy.HYBRID_SHARD)
        (split,) = next(model.parameters()).splits
        assert isinstance(split, Split)
        return split.group.world_size

    assert simulate(run, 4) == [2] * 4


def test_a_mesh_that_is_not_square():
    def run(group):
        row, column = divmod(group.rank, 3)
        sharding = ShardingStrategy.HYBRID_SHARD
        replicas = group.split(column)
        model = FSDP(build(), group.split(row), sharding=sharding, replicas=replicas)
        with pytest.raises(ferro.UsageError, match="a row and a column"):
            FSDP(build(), group, sharding=sharding, replicas=replicas)
        return train(model, group.rank, 6)

    for result in simulate(run, 6):
        assert_same(result, train(build()))


def test_offloading_changes_nothing_for_numpy():
    def run(group):
        return train(shard(group, offload=True), group.rank, 2)

    for result in simulate(run, 2):
        assert_same(result, train(build()))


@pytest.mark.parametrize("turned", ["row", "column"])
def test_rows_and_columns_in_different_orders_are_told(turned):
    """Ranks of one column would have different shards, or one row would scatter by itself."""

    def run(group):
        row, column = divmod(group.rank, 2)
        keys = {"row": group.rank, "column": group.rank}
        if (row, column)[turned == "column"] == 1:
            keys[turned] *= -1
        shards = group.split(row, key=keys["row"])
        replicas = group.split(column, key=keys["column"])
        with pytest.raises(ferro.UsageError, match="rank along the mesh's other axis"):
            FSDP(build(), shards, sharding=ShardingStrategy.HYBRID_SHARD, replicas=replicas)

    simulate(run, 4)


def test_a_sharded_model_prints_as_the_serial_one_does():
    def make():
        return Sequential(
            *(Embedding(5, 4), Attention(4, 2), LayerNorm(4), Residual(Linear(4, 4))),
            *(Unembedding(Embedding(5, 4)), Conv2d(1, 2, 3)),
        )

    def run(group):
        return repr(shard(group, make(), units=[]))

    assert repr(make()) in simulate(run, 2)[0]


def test_every_linear_may_be_a_unit_also_inside_attention():
    x = np.random.default_rng(0).standard_normal((2, 3, 4)).astype(np.float32)
    expected = Attention(4, 2, rng=0)(x)

    def run(group):
        model = shard(group, Attention(4, 2, rng=0), units=lambda _, module: isinstance(module, Linear))
        np.testing.assert_array_equal(model(x), expected)

    simulate(run, 2)
