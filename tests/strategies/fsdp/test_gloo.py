"""FSDP between real processes over gloo: the same parameters as one process."""

from __future__ import annotations

import numpy as np
import pytest

from ferro_strategies import nn, optim
from ferro_strategies.fsdp import FSDP, ShardingStrategy
from ferro_testing import run_ranks

BATCH, STEPS = 12, 4


def make_model():
    rng = np.random.default_rng(3)
    return nn.Sequential(
        nn.Conv2d(1, 4, 3, padding=1, rng=rng, dtype=np.float64),
        nn.GELU(),
        nn.MaxPool2d(2),
        nn.Flatten(),
        nn.Linear(64, 32, rng=rng, dtype=np.float64),
        nn.LayerNorm(32, dtype=np.float64),
        nn.Residual(nn.Linear(32, 32, rng=rng, dtype=np.float64)),
        nn.Linear(32, 5, rng=rng, dtype=np.float64),
    )


def batches():
    rng = np.random.default_rng(4)
    for _ in range(STEPS):
        yield rng.standard_normal((BATCH, 1, 8, 8)), rng.integers(0, 5, BATCH)


def train(model, optimizer, rank=0, ranks=1):
    for x, labels in batches():
        logits, pullback = model.vjp(x[rank::ranks])
        _, grad = nn.cross_entropy(logits, labels[rank::ranks])
        pullback(grad)
        optimizer.step()
        optimizer.zero_grad()


def train_whole():
    model = make_model()
    optimizer = optim.AdamW(model.parameters(), lr=1e-2)
    train(model, optimizer)
    return model.state_dict()


def train_shards(group):
    results = []
    for sharding in ("full_shard", "shard_optimizer"):
        model = FSDP(make_model(), group, sharding=ShardingStrategy(sharding))
        train(model, optim.AdamW(model.parameters(), lr=1e-2), group.rank, group.world_size)
        results.append(model.full_state_dict())
    return results


def join_shards(group):
    """Rank 1 has no batch at all."""
    row, column = divmod(group.rank, 2)
    model = FSDP(make_model(), group.split(row), sharding=ShardingStrategy.HYBRID_SHARD, replicas=group.split(column))
    optimizer = optim.AdamW(model.parameters(), lr=1e-2)
    with model.join(optimizer):
        if group.rank != 1:
            train(model, optimizer)
    return [model.full_state_dict()]


@pytest.mark.parametrize(("function", "ranks"), [(train_shards, 3), (join_shards, 4)])
def test_parameters_equal_those_of_one_process(function, ranks):
    reference = train_whole()
    for results in run_ranks(function, ranks, backend="gloo"):
        for result in results:
            assert result.keys() == reference.keys()
            for name, value in reference.items():
                np.testing.assert_allclose(result[name], value, rtol=1e-9, atol=1e-12, err_msg=name)
