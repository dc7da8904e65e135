"""Gathers into memory that is kept: persistent ones for large units, which a failed pass may leave behind."""

import numpy as np
import pytest

from ferro_strategies.fsdp import FSDP, ShardingStrategy, flat_parameter
from ferro_strategies.nn import Linear, Module, Sequential
from ferro_strategies.optim import SGD

from ..observed import OpNames
from .models import simulate


class MayFail(Module):
    """A layer that fails when it is told to."""

    def __init__(self):
        self.fails = False

    def vjp(self, x):
        if self.fails:
            raise RuntimeError("a bad batch")
        return x, lambda grad: grad


def train(group):
    """Train beside a batch that fails, and set all parameters afterwards; return them as the next pass leaves them."""
    may_fail = MayFail()
    layers = [Sequential(Linear(2, 2, dtype=np.float64, rng=index)) for index in range(3)]
    model = FSDP(Sequential(layers[0], may_fail, *layers[1:]), group, sharding="shard_optimizer", units=layers)
    optimizer = SGD(model.parameters(), lr=0.1)
    x = np.ones((2, 2))
    for _ in range(2):
        y, pullback = model.vjp(x)
        pullback(y)
        optimizer.step()
        optimizer.zero_grad()
    may_fail.fails = True
    with pytest.raises(RuntimeError, match="a bad batch"):
        model.vjp(x)
    may_fail.fails = False
    for parameter in model.parameters():
        parameter.data[...] = 0.25
    y, pullback = model.vjp(x)
    pullback(y)
    return [parameter.data.tolist() for parameter in model.parameters()]


@pytest.mark.parametrize("persistent", [True, False])
def test_large_units_gather_persistently_and_no_update_is_lost_after_a_failed_pass(monkeypatch, persistent):
    if persistent:
        monkeypatch.setattr(flat_parameter, "PERSISTENT_BYTES", 0)
    names = OpNames()
    for found in simulate(train, 2, observers=[names]):
        assert all((np.array(values) == 0.25).all() for values in found)
    assert names.ops.count("persistent") == (3 if persistent else 0)


def test_only_strategies_that_keep_the_memory_gather_persistently(monkeypatch):
    monkeypatch.setattr(flat_parameter, "PERSISTENT_BYTES", 0)
    names = OpNames()

    def run(group):
        model = FSDP(Linear(2, 2, rng=0), group, sharding=ShardingStrategy.FULL_SHARD)
        for _ in range(2):
            y, pullback = model.vjp(np.ones((2, 2), np.float32))
            pullback(y)

    simulate(run, 2, observers=[names])
    assert "persistent" not in names.ops
