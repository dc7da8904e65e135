"""DDP walks the tree of modules when it wraps it, and not in a training step."""

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
    sys.setprofile(profile)
    try:
        y, pullback = model.vjp(np.ones((4, 2), np.float32))
        pullback(y)
        optimizer.step()
        optimizer.zero_grad()
    finally:
        sys.setprofile(before)
    return calls


@pytest.mark.parametrize("broadcast_buffers", [True, False])
@pytest.mark.parametrize("find_unused", [True, False])
@pytest.mark.parametrize("joined", [True, False])
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
                counts.append(calls_of_a_step(each, optimizer))
        return counts[1] - counts[0]

    def run(group):
        # A walk of 1000 modules makes thousands of calls; waiting for a thread varies by a few.
        assert abs(overhead(group, 1000) - overhead(group, 10)) < 500

    ferro.simulate(run, 1, timeout_s=10, run_timeout_s=30)


@pytest.mark.parametrize("copied", [False, True])
def test_a_layer_that_is_added_later_is_noticed_by_the_next_step(copied):
    def run(group):
        model = DDP(Sequential(Linear(2, 3, rng=0), BatchNorm(3)), group)
        model.vjp(np.ones((4, 2), np.float32))
        layer = deepcopy(model.module.layers[0]) if copied else Linear(2, 3, rng=1)
        model.module.layers[0] = layer
        with pytest.raises(ferro.UsageError, match=r"'layers\.0\.weight' was frozen or absent"):
            model.vjp(np.ones((4, 2), np.float32))

    ferro.simulate(run, 2)


def test_a_buffer_that_is_added_later_is_broadcast():
    def run(group):
        model = DDP(Sequential(Linear(2, 3, rng=0), ReLU()), group)
        model.vjp(np.ones((4, 2), np.float32))
        model.module.layers[1].seen = Buffer(np.full(2, float(group.rank)))
        model.vjp(np.ones((4, 2), np.float32))
        return model.module.layers[1].seen.data.tolist()

    assert ferro.simulate(run, 2) == [[0.0, 0.0]] * 2
