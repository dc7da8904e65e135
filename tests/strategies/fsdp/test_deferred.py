"""A model built inside `deferred()`, under FSDP and DDP: the numbers of a whole build, in the memory of a piece."""

import tracemalloc

import numpy as np
import pytest

import ferro
from ferro_strategies import DDP, FSDP, DeviceMesh, deferred
from ferro_strategies.fsdp import ShardingStrategy
from ferro_strategies.nn import Attention, Embedding, Linear, Sequential
from ferro_strategies.optim import SGD

WIDTH, LAYERS = 128, 16


def build():
    shared = np.random.default_rng(3)
    blocks = [Embedding(11, 6, rng=shared), Attention(6, 2, rng=shared), Linear(6, 5, rng=shared), Linear(5, 3, rng=1)]
    return Sequential(*blocks)


@pytest.mark.parametrize("sharding", [*ShardingStrategy, "ddp"])
def test_a_deferred_model_has_the_values_of_a_whole_build(sharding):
    def run(group):
        with deferred():
            net = build()
        optimizer = SGD(net.parameters(), lr=0.1)
        if sharding == "ddp":
            model = DDP(net, group)
        elif sharding is ShardingStrategy.HYBRID_SHARD:
            mesh = DeviceMesh((2, 2), ("replicas", "shards"), group)
            model = FSDP(net, mesh["shards"], sharding=sharding, replicas=mesh["replicas"])
        else:
            model = FSDP(net, group, sharding=sharding)
        state = model.state_dict()
        y, pullback = model.vjp(np.arange(8).reshape(2, 4))
        pullback(np.ones_like(y))
        optimizer.step()
        return state

    whole = build().state_dict()
    for state in ferro.simulate(run, 4, timeout_s=10):
        assert list(state) == list(whole)
        for name, value in whole.items():
            np.testing.assert_array_equal(state[name], value, err_msg=name)


def test_no_rank_draws_more_than_a_unit_at_a_time():
    ranks = 4
    with deferred():
        nets = [
            Sequential(*(Linear(WIDTH, WIDTH, bias=False, rng=seed) for seed in range(LAYERS))) for _ in range(ranks)
        ]

    def run(group):
        FSDP(nets[group.rank], group)

    unit = WIDTH * WIDTH * 4
    tracemalloc.start()
    try:
        ferro.simulate(run, ranks, timeout_s=10)
        _, peak = tracemalloc.get_traced_memory()
    finally:
        tracemalloc.stop()
    # All ranks together keep the pieces of one model; a whole model on each would be four.
    assert peak < LAYERS * unit + 4 * unit + 500_000
