"""Gradient accumulation under FSDP: with and without `no_sync`, and several pullbacks in flight."""

import numpy as np
import pytest

from ferro_strategies.fsdp import ShardingStrategy
from ferro_strategies.nn import Checkpoint, Sequential, mse_loss

from .models import (
    MICROBATCHES,
    Scale,
    assert_same,
    backward,
    build,
    gathered_grads,
    grads_of,
    microbatches,
    one_by_one,
    shard,
    simulate,
)
from .ways import shared_out

pytestmark = pytest.mark.usefixtures("both_ways")

EVERY = list(ShardingStrategy)


def without_sync(model, rank, ranks):
    *first, last = microbatches(rank, ranks)
    with model.no_sync():
        for x, target in first:
            backward(model, x, target)
    backward(model, *last)


def synchronised_after(model, rank, ranks):
    with model.no_sync():
        one_by_one(model, rank, ranks)
    model.sync_gradients()


def in_flight(model, rank, ranks):
    passes = [(model.vjp(x), target) for x, target in microbatches(rank, ranks)]
    for (y, pullback), target in passes:
        pullback(mse_loss(y, target)[1])


def in_flight_without_sync(model, rank, ranks):
    """Accumulate as a pipeline does."""
    with model.no_sync():
        in_flight(model, rank, ranks)
    model.sync_gradients()


WAYS = [one_by_one, without_sync, synchronised_after, in_flight, in_flight_without_sync]


@shared_out(sharding=EVERY, way=WAYS)
def test_accumulated_gradients_equal_one_process(way, sharding):
    def run(group):
        model = shard(group, sharding=sharding)
        for _ in range(2):  # the second time in memory that has been used
            model.zero_grad()
            way(model, group.rank, group.world_size)
        return gathered_grads(model)

    model = build()
    one_by_one(model, 0, 1)
    for result in simulate(run, 4):
        assert_same(result, grads_of(model))


def test_no_sync_saves_reductions():
    class Counts:
        def __init__(self):
            self.calls = []

        def started(self, event):
            pass

        def finished(self, event):
            self.calls.append(event.op)

        def close(self):
            pass

    def reductions(way):
        counts = Counts()
        simulate(lambda group: way(shard(group), group.rank, 2), 2, observers=[counts])
        return counts.calls.count("reduce_scatter") // 2

    units = 5
    assert reductions(one_by_one) == MICROBATCHES * units
    assert reductions(in_flight) == MICROBATCHES * units
    assert reductions(without_sync) == units
    assert reductions(synchronised_after) == units


def test_gradients_under_no_sync_are_forgotten_by_the_models_zero_grad():
    def run(group):
        model = shard(group)
        with model.no_sync():
            one_by_one(model, group.rank, 2)
        assert all(item.grad is None for item in model.parameters())
        model.zero_grad()
        model.sync_gradients()
        assert all(item.grad is None for item in model.parameters())
        one_by_one(model, group.rank, 2)
        return gathered_grads(model)

    model = build()
    one_by_one(model, 0, 1)
    for result in simulate(run, 2):
        assert_same(result, grads_of(model))


def test_a_recomputed_unit_is_reduced_if_its_first_pass_was_to_be():
    def run(group):
        model = Sequential(Checkpoint(Scale(2.0)), Scale(3.0))
        model = shard(group, model, units=lambda _, module: isinstance(module, Scale))
        x = np.array([1.0 + group.rank])
        with model.no_sync():
            y, kept = model.vjp(x)
        kept(np.ones_like(y))
        assert all(item.grad is None for item in model.parameters())
        y, pullback = model.vjp(x)
        with model.no_sync():
            pullback(np.ones_like(y))
        return [float(grad[0]) for grad in gathered_grads(model).values()]

    assert simulate(run, 2) == [[9.0, 6.0]] * 2
