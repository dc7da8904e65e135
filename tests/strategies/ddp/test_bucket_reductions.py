"""DDP makes one persistent reduction for each bucket, and runs it beside the backward pass or after it."""

import gc
import time
import weakref
from copy import deepcopy

import numpy as np
import pytest

from ferro_strategies import DDP
from ferro_strategies.ddp import bucket_reductions
from ferro_strategies.nn import Linear, ReLU, Sequential
from ferro_strategies.optim import SGD

from ..observed import OpNames
from .models import Switch, simulate

SMALL = {"bucket_bytes": 64, "first_bucket_bytes": 64}


@pytest.fixture(params=[True, False], ids=["beside", "after"])
def spare(request, monkeypatch):
    monkeypatch.setattr(bucket_reductions, "has_spare_core", lambda group: request.param)
    monkeypatch.setattr(bucket_reductions, "_AT_ONCE_BYTES", 0)
    return request.param


def build():
    return Sequential(Linear(2, 3, rng=0, dtype=np.float64), ReLU(), Linear(3, 2, rng=1, dtype=np.float64))


def train(model, batches, scale=1.0):
    optimizer = SGD(model.parameters(), lr=0.1, momentum=0.9)
    for x in batches:
        y, pullback = model.vjp(x)
        pullback(y * scale)
        optimizer.step()
        optimizer.zero_grad()
    return [parameter.data.copy() for parameter in model.parameters()]


def test_operations_are_made_once_and_run_in_every_step(spare):
    names = OpNames()

    def run(group):
        model = DDP(build(), group, **SMALL)
        begin = len(names.ops)
        train(model, [np.ones((2, 2))] * 3)
        return names.ops[begin:]

    ops = simulate(run, 2, observers=[names])[0]
    buckets = ops.count("persistent")
    assert buckets > 1
    assert ops == ["all_reduce"] + ["persistent"] * buckets + ["all_reduce"] * buckets * 3


@pytest.mark.parametrize("find_unused", [True, False])
def test_training_is_that_of_one_process(spare, find_unused):
    batches = np.random.default_rng(0).standard_normal((3, 6, 2))

    def run(group):
        model = DDP(build(), group, find_unused=find_unused, **SMALL)
        return train(model, batches[:, group.rank :: group.world_size])

    # The loss is half the sum of squares, so that the mean over three ranks is a third of the whole gradient.
    for values in simulate(run, 3):
        for value, expected in zip(values, train(build(), batches, scale=1 / 3), strict=True):
            np.testing.assert_allclose(value, expected, rtol=1e-12)


def test_ranks_without_batches_make_the_operations_too(spare):
    def run(group):
        model = DDP(Sequential(Linear(1, 1, bias=False, dtype=np.float64)), group, check_replicas=False)
        model.module.layers[0].weight.data[...] = 1.0
        optimizer = SGD(model.parameters(), lr=0.5)
        with model.join(optimizer):
            for _ in range(group.rank):  # none on rank 0, two on rank 2
                y, pullback = model.vjp(np.ones((1, 1)))
                pullback(np.ones_like(y))
                optimizer.step()
                optimizer.zero_grad()
        return model.module.layers[0].weight.data.item()

    assert simulate(run, 3) == [0.0] * 3


def test_ranks_that_answer_differently_train_together(monkeypatch):
    monkeypatch.setattr(bucket_reductions, "has_spare_core", lambda group: group.rank == 0)
    monkeypatch.setattr(bucket_reductions, "_AT_ONCE_BYTES", 0)

    def run(group):
        return train(DDP(build(), group, **SMALL), [np.full((2, 2), 1.0 + group.rank)] * 3)

    first, second = simulate(run, 2)
    for one, other in zip(first, second, strict=True):
        np.testing.assert_array_equal(one, other)


def test_a_copy_makes_operations_of_its_own(spare):
    def run(group):
        model = DDP(build(), group, **SMALL)
        train(model, [np.ones((2, 2))])
        twin = deepcopy(model)
        one, other = train(model, [np.ones((2, 2))]), train(twin, [np.ones((2, 2))])
        for here, there in zip(one, other, strict=True):
            np.testing.assert_array_equal(here, there)

    simulate(run, 2)


def test_branches_that_only_some_ranks_use(spare):
    def run(group):
        switch = Switch()
        model = DDP(switch, group, find_unused=True, **SMALL)
        found = []
        for chosen in ([group.rank], [0]):
            switch.chosen = chosen
            y, pullback = model.vjp(np.ones(1))
            pullback(np.ones_like(y))
            found.append([None if p.grad is None else p.grad.item() for p in model.parameters()])
            model.zero_grad()
        return found

    assert simulate(run, 2) == [[[0.5, 0.5, None], [1.0, None, None]]] * 2


def test_a_dropped_model_leaves_no_memory_behind(spare):
    def run(group):
        model = DDP(build(), group, **SMALL)
        train(model, [np.ones((2, 2))])
        memory = [weakref.ref(bucket.memory) for bucket in model._reducer._buckets]
        del model
        deadline = time.monotonic() + 10
        while any(ref() is not None for ref in memory):
            gc.collect()  # it does nothing while another rank's thread collects
            assert time.monotonic() < deadline, "something keeps a bucket alive"

    simulate(run, 2)
