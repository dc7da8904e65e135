"""Deferred products under FSDP: kept back in passes that do not reduce, added at once in others."""

import numpy as np
import pytest

from ferro_strategies.fsdp import MixedPrecision, ShardingStrategy
from ferro_strategies.nn import Linear, deferring, mse_loss

from .models import (
    MICROBATCHES,
    assert_same,
    backward,
    batch,
    build,
    gathered_grads,
    grads_of,
    microbatches,
    shard,
    simulate,
)


def expected():
    model = build()
    for step in range(MICROBATCHES):
        backward(model, *batch(step))
    return grads_of(model)


def deferred_pass(model, x, target):
    y, pullback = model.vjp(x)
    with deferring(model.parameters()) as products:
        pullback(mse_loss(y, target)[1])
        assert all(item.deferred is products for item in model.parameters())
    return products


@pytest.mark.parametrize("sharding", list(ShardingStrategy))
def test_under_no_sync_products_are_deferred(sharding):
    def run(group):
        model = shard(group, sharding=sharding)
        shards = [item.data for item in model.parameters()]
        with model.no_sync():
            queues = [deferred_pass(model, *part) for part in microbatches(group.rank, group.world_size)]
        matrices = sum(isinstance(module, Linear) for module in build().modules())
        assert [len(queue) for queue in queues] == [matrices] * MICROBATCHES
        for product in [product for queue in reversed(queues) for product in queue]:
            product()
        for item, own_shard in zip(model.parameters(), shards, strict=True):
            assert item.data is own_shard
            assert item.grad is None
            assert item.outstanding_uses == 0
        model.sync_gradients()
        return gathered_grads(model)

    for result in simulate(run, 2):
        assert_same(result, expected())


def test_products_are_added_to_gradients_reduced_before():
    def run(group):
        model = shard(group)
        first, *others = microbatches(group.rank, group.world_size)
        backward(model, *first)
        with model.no_sync():
            queues = [deferred_pass(model, *part) for part in others]
        for queue in queues:
            for product in queue:
                product()
        model.sync_gradients()
        return gathered_grads(model)

    for result in simulate(run, 2):
        assert_same(result, expected())


@pytest.mark.parametrize("sharding", list(ShardingStrategy))
def test_a_pass_that_reduces_adds_products_at_once(sharding):
    def run(group):
        model = shard(group, sharding=sharding)
        for part in microbatches(group.rank, group.world_size):
            assert deferred_pass(model, *part) == []
        return gathered_grads(model)

    for result in simulate(run, 2):
        assert_same(result, expected())


def test_products_are_in_the_dtype_of_the_computation():
    def run(group):
        precision = MixedPrecision(param_dtype=np.float32)
        model = shard(group, mixed_precision=precision)
        with model.no_sync():
            queues = [deferred_pass(model, *part) for part in microbatches(group.rank, group.world_size)]
        for queue in queues:
            for product in queue:
                product()
        model.sync_gradients()
        return gathered_grads(model)

    for result in simulate(run, 2):
        assert_same(result, expected(), rtol=1e-4, atol=1e-5)


def test_a_product_of_a_parameter_frozen_meanwhile_is_dropped():
    def run(group):
        model = shard(group)
        with model.no_sync():
            products = deferred_pass(model, *next(microbatches(group.rank, group.world_size)))
        for parameter in model.parameters():
            parameter.requires_grad = False
        for product in products:
            product()
        assert all(parameter.grad is None for parameter in model.parameters())

    simulate(run, 2)
