"""DDP walks the tree of modules when it wraps it, and not in a training step."""

import gc
import sys
from contextlib import nullcontext
from copy import deepcopy

import numpy as np
import pytest

import ferro
from ferro_strategies import DDP
from ferro_strategies.nn import BatchNorm, Buffer, Linear, ReLU, Sequential
from ferro_strategies.optim import SGD


def calls_of_a_step(model, optimizer):
    """Count the Python and C functions that this thread calls in one training step."""
    calls = 0

    def profile(frame, event, arg):
        nonlocal calls
        calls += event in ("call", "c_call")

    before = sys.getprofile()
    gc.disable()  # finalizers of what other tests have left are no part of the step
    sys.setprofile(profile)
    try:
        y, pullback = model.vjp(np.ones((4, 2), np.float32))
        pullback(y)
        optimizer.step()
        optimizer.zero_grad()
    finally:
        sys.setprofile(before)
        gc.enable()
    return calls


@pytest.mark.parametrize(  # every pair of values of two options
    ("broadcast_buffers", "find_unused", "joined"),
    [(True, True, True), (True, False, False), (False, True, False), (False, False, True)],
)
def test_a_step_does_not_walk_the_tree_of_modules(broadcast_buffers, find_unused, joined):
    def overhead(group, depth):
        """Count the calls that DDP adds to those of the module, which has `depth` empty layers."""
        empty = [ReLU() for _ in range(depth)]
        alone = Sequential(Linear(2, 3, rng=0), *empty, BatchNorm(3))
        model = DDP(
            Sequential(Linear(2, 3, rng=0), *empty, BatchNorm(3)),
            group,
            broadcast_buffers=broadcast_buffers,
            find_unused=find_unused,
        )
        counts = []
        for each in (alone, model):
            optimizer = SGD(each.parameters(), lr=0.1)
            calls_of_a_step(each, optimizer)  # the first step allocates memory
            with model.join() if joined and each is model else nullcontext():
                counts.append(min(calls_of_a_step(each, optimizer) for _ in range(3)))
        return counts[1] - counts[0]

    def run(group):
        # A walk makes a call or more for each module; waiting for a thread makes some in some steps.
        assert abs(overhead(group, 310) - overhead(group, 10)) < 150

    ferro.simulate(run, 1, timeout_s=10, run_timeout_s=30)


def one_step(model, x=None):
    y, pullback = model.vjp(np.ones((4, 2), np.float32) if x is None else x)
    pullback(y)
    model.zero_grad()


def attach_to_list(model, layer):
    model.module.layers.append(layer)


def replace_list(model, layer):
    model.module.layers = [*model.module.layers, layer]


def replace_in_list(model, layer):
    model.module.layers[0] = layer


def attach_as_attribute(model, layer):
    model.module.layers[1].head = layer


def attach_a_parameter(model, layer):
    model.module.weight = layer.weight


def replace_module(model, layer):
    model.module.layers[0].weight = layer.weight


@pytest.mark.parametrize(
    "change", [attach_to_list, replace_list, replace_in_list, attach_as_attribute, attach_a_parameter, replace_module]
)
@pytest.mark.parametrize("before_wrapping", [True, False])
@pytest.mark.parametrize("stepped", [True, False])
@pytest.mark.parametrize("find_unused", [True, False])
def test_a_trained_parameter_that_is_attached_later_is_refused(change, before_wrapping, stepped, find_unused):
    def run(group):
        layer = Linear(2, 2, rng=1)
        model = DDP(Sequential(Linear(2, 2, rng=0), ReLU()), group, find_unused=find_unused)
        if not before_wrapping:
            layer = deepcopy(layer)
        if stepped:
            one_step(model)
        change(model, layer)
        for _ in range(2):
            with pytest.raises(ferro.UsageError, match="was frozen or absent when the module was wrapped"):
                one_step(model)

    ferro.simulate(run, 2)


def test_a_frozen_layer_that_is_attached_later_may_not_be_trained():
    def run(group):
        layer = Linear(2, 2, rng=1)
        for parameter in layer.parameters():
            parameter.requires_grad = False
        model = DDP(Sequential(Linear(2, 2, rng=0)), group)
        model.module.layers.append(layer)
        one_step(model)
        layer.weight.requires_grad = True
        with pytest.raises(ferro.UsageError, match=r"'layers\.1\.weight' was frozen or absent"):
            one_step(model)

    ferro.simulate(run, 2)


def test_a_frozen_layer_that_was_removed_may_be_trained_elsewhere():
    def run(group):
        layer = Linear(2, 2, rng=1)
        for parameter in layer.parameters():
            parameter.requires_grad = False
        model = DDP(Sequential(Linear(2, 2, rng=0), layer), group)
        one_step(model)
        model.module.layers.pop()
        layer.weight.requires_grad = True
        one_step(model)

    ferro.simulate(run, 2)


@pytest.mark.parametrize("before_wrapping", [True, False])
def test_a_buffer_that_is_attached_later_is_broadcast(before_wrapping):
    def run(group):
        early = Buffer(np.full(2, float(group.rank)))
        model = DDP(Sequential(Linear(2, 3, rng=0), ReLU()), group)
        one_step(model)
        seen = early if before_wrapping else Buffer(np.full(2, float(group.rank)))
        model.module.layers[1].seen = seen
        one_step(model)
        return seen.data.tolist()

    assert ferro.simulate(run, 2) == [[0.0, 0.0]] * 2


def test_a_frozen_layer_that_is_attached_later_is_copied_at_the_end_of_join():
    def run(group):
        layer = Linear(2, 2, rng=group.rank)
        for parameter in layer.parameters():
            parameter.requires_grad = False
        model = DDP(Sequential(Linear(2, 2, rng=0)), group, check_replicas=False)
        model.module.layers.append(layer)
        with model.join():
            one_step(model)
        return layer.weight.data.tolist()

    first, second = ferro.simulate(run, 2)
    assert first == second


def test_a_deep_copy_has_a_tree_of_its_own():
    def run(group):
        model = DDP(Sequential(Linear(2, 2, rng=0)), group)
        twin = deepcopy(model)
        twin.module.layers.append(Linear(2, 2, rng=1))
        one_step(model)
        with pytest.raises(ferro.UsageError, match="was frozen or absent"):
            twin.vjp(np.ones((4, 2), np.float32))

    ferro.simulate(run, 2)
