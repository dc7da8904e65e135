"""Products put off under FSDP: where nothing is reduced they may be; elsewhere they are added."""

import numpy as np
import pytest

from ferro_strategies.fsdp import MixedPrecision, ShardingStrategy
from ferro_strategies.nn import Linear, deferring, mse_loss

from .models import (
    assert_same,
    backward,
    batch,
    build,
    own_grads,
    shard,
    simulate,
    whole_grads,
)

STEPS = 3


def parts(group):
    for step in range(STEPS):
        x, target = batch(step)
        yield x[group.rank :: group.world_size], target[group.rank :: group.world_size]


def expected():
    model = build()
    for step in range(STEPS):
        backward(model, *batch(step))
    return own_grads(model)


def put_off(model, x, target):
    y, pullback = model.vjp(x)
    with deferring(model.parameters()) as products:
        pullback(mse_loss(y, target)[1])
        assert all(item.deferred is products for item in model.parameters())
    return products


@pytest.mark.parametrize("sharding", list(ShardingStrategy))
def test_under_no_sync_products_are_put_off(sharding):
    def run(group):
        model = shard(group, sharding=sharding)
        pieces = [item.data for item in model.parameters()]
        with model.no_sync():
            queues = [put_off(model, *part) for part in parts(group)]
        matrices = sum(isinstance(module, Linear) for module in build().modules())
        assert [len(queue) for queue in queues] == [matrices] * STEPS
        for product in [product for queue in reversed(queues) for product in queue]:
            product()
        for item, piece in zip(model.parameters(), pieces, strict=True):
            assert item.data is piece
            assert item.grad is None
            assert item.outstanding_uses == 0
        model.sync_gradients()
        return whole_grads(model)

    for result in simulate(run, 2):
        assert_same(result, expected())


def test_products_come_on_top_of_what_was_reduced_before():
    def run(group):
        model = shard(group)
        first, *others = parts(group)
        backward(model, *first)
        with model.no_sync():
            queues = [put_off(model, *part) for part in others]
        for queue in queues:
            for product in queue:
                product()
        model.sync_gradients()
        return whole_grads(model)

    for result in simulate(run, 2):
        assert_same(result, expected())


@pytest.mark.parametrize("sharding", list(ShardingStrategy))
def test_a_pass_that_reduces_adds_products_at_once(sharding):
    def run(group):
        model = shard(group, sharding=sharding)
        for part in parts(group):
            assert put_off(model, *part) == []
        return whole_grads(model)

    for result in simulate(run, 2):
        assert_same(result, expected())


def test_products_in_the_type_of_the_computation():
    def run(group):
        precision = MixedPrecision(param_dtype=np.float32)
        model = shard(group, mixed_precision=precision)
        with model.no_sync():
            queues = [put_off(model, *part) for part in parts(group)]
        for queue in queues:
            for product in queue:
                product()
        model.sync_gradients()
        return whole_grads(model)

    for result in simulate(run, 2):
        assert_same(result, expected(), rtol=1e-4, atol=1e-5)


def test_a_product_of_a_parameter_frozen_meanwhile_is_dropped():
    def run(group):
        model = shard(group)
        with model.no_sync():
            products = put_off(model, *next(parts(group)))
        for parameter in model.parameters():
            parameter.requires_grad = False
        for product in products:
            product()
        assert all(parameter.grad is None for parameter in model.parameters())

    simulate(run, 2)
