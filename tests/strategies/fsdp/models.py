"""Models, data and comparisons for the tests of FSDP."""

from __future__ import annotations

import numpy as np

import ferro
from ferro_strategies.fsdp import FSDP, ShardingStrategy
from ferro_strategies.nn import LayerNorm, Linear, Module, Parameter, ReLU, Residual, Sequential, mse_loss
from ferro_strategies.optim import AdamW

WITHOUT_REPLICAS = [item for item in ShardingStrategy if item is not ShardingStrategy.HYBRID_SHARD]
ROWS = 12
MICROBATCHES = 3


def simulate(function, world_size, **options):
    return ferro.simulate(function, world_size, timeout_s=10, run_timeout_s=30, **options)


def build(dtype=np.float64, seed=0):
    """A model whose layers have sizes that no number of ranks divides evenly."""
    rng = np.random.default_rng(seed)
    return Sequential(
        Linear(3, 7, dtype=dtype, rng=rng),
        ReLU(),
        Linear(7, 5, dtype=dtype, rng=rng),
        LayerNorm(5, dtype=dtype),
        Residual(Linear(5, 5, dtype=dtype, rng=rng)),
        Linear(5, 1, dtype=dtype, rng=rng),
    )


def batch(step, dtype=np.float64):
    rng = np.random.default_rng((7, step))
    return rng.standard_normal((ROWS, 3)).astype(dtype), rng.standard_normal((ROWS, 1)).astype(dtype)


def backward(model, x, target):
    y, pullback = model.vjp(x)
    loss, grad = mse_loss(y, target)
    pullback(grad)
    return loss


def train(model, rank=0, ranks=1, *, steps=3, dtype=np.float64, optimizer=None):
    optimizer = optimizer or AdamW(model.parameters(), lr=0.01)
    for step in range(steps):
        x, target = batch(step, dtype)
        backward(model, x[rank::ranks], target[rank::ranks])
        optimizer.step()
        optimizer.zero_grad()
    return model.state_dict()


def microbatches(rank, ranks):
    """Yield this rank's parts of the batches."""
    for step in range(MICROBATCHES):
        x, target = batch(step)
        yield x[rank::ranks], target[rank::ranks]


def one_by_one(model, rank, ranks):
    for x, target in microbatches(rank, ranks):
        backward(model, x, target)


def shard(group, model=None, *, sharding=ShardingStrategy.FULL_SHARD, **options):
    """Wrap the model in FSDP; for HYBRID_SHARD on a mesh of two columns."""
    model = build() if model is None else model
    if sharding is ShardingStrategy.HYBRID_SHARD:
        row, column = divmod(group.rank, 2)
        options["replicas"] = group.split(column)
        group = group.split(row)
    return FSDP(model, group, sharding=sharding, **options)


def gathered_grads(model):
    """Gather every parameter's gradient from all ranks' shards; None where there is none."""
    found = {}
    for name, parameter in model.named_parameters():
        own_shard = parameter.grad
        if own_shard is None:
            found[name] = None
            continue
        for split in parameter.splits:
            sizes = split.group.all_gather(np.array([own_shard.size])).tolist()
            own_shard = split.group.all_gather(own_shard, sizes=sizes)
        found[name] = own_shard.reshape(-1).copy()
    return found


def grads_of(model):
    return {
        name: None if item.grad is None else item.grad.reshape(-1).copy() for name, item in model.named_parameters()
    }


def assert_same(result, expected, **tolerance):
    tolerance = tolerance or {"rtol": 1e-9, "atol": 1e-12}
    assert result.keys() == expected.keys()
    for name, value in expected.items():
        if value is None:
            assert result[name] is None, name
        else:
            assert result[name] is not None, name
            assert result[name].dtype == value.dtype, name
            np.testing.assert_allclose(result[name], value, **tolerance, err_msg=name)


class Scale(Module):
    """Computes y = factor * x with one trained number."""

    def __init__(self, factor=1.0):
        self.factor = Parameter(np.full(1, factor))

    def vjp(self, x):
        factor = self.factor.use()

        def pullback(grad):
            factor.add_grad(np.array([(grad * x).sum()]))
            return grad * factor.data

        return x * factor.data, pullback


class Switch(Module):
    """Adds the outputs of the branches whose indices are in `chosen`."""

    def __init__(self, count=3):
        self.branches = [Scale(index + 1.0) for index in range(count)]
        self.chosen = list(range(count))

    def vjp(self, x):
        runs = [self.branches[index].vjp(x) for index in self.chosen]

        def pullback(grad):
            return sum((pull(grad) for _, pull in reversed(runs)), np.zeros_like(grad))

        return sum((y for y, _ in runs), np.zeros_like(x)), pullback
