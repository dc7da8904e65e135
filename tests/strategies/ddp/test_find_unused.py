"""Parameters that a forward pass leaves out: an error that names them, or `find_unused`."""

import numpy as np
import pytest

import ferro
from ferro_strategies import DDP, hooks

from .models import TINY, Switch, backward, grads, simulate


@pytest.mark.parametrize("hook", [None, hooks.mean], ids=["exact", "hook"])
@pytest.mark.parametrize("left_out", [(0,), (0, 2), (0, 1, 2)], ids=str)
def test_unused_parameters_are_named_on_every_rank(hook, left_out):
    def run(group):
        model = DDP(Switch(3), group, hook=hook, **TINY)
        if group.rank in left_out:
            model.module.chosen = [0, 2] if group.rank else [0]
        y, pullback = model.vjp(np.ones(1))
        with pytest.raises(ferro.UsageError) as caught:
            pullback(y)
        # Group and model stay usable.
        model.zero_grad()
        model.module.chosen = [0, 1, 2]
        backward(model, group.rank)
        return str(caught.value), grads(model)

    results = simulate(run, 3)
    assert len({message for message, _ in results}) == 1
    message = results[0][0]
    for rank in range(3):
        missing = "branches.1.factor, branches.2.factor" if rank == 0 else "branches.1.factor"
        assert (f"rank {rank}: {missing}" in message) == (rank in left_out)
    assert "find_unused=True" in message
    assert all(values == [1.0, 1.0, 1.0] for _, values in results)


@pytest.mark.parametrize("hook", [None, hooks.mean], ids=["exact", "hook"])
def test_find_unused_averages_over_ranks_with_zeros(hook):
    def run(group):
        model = DDP(Switch(4), group, find_unused=True, hook=hook, **TINY)
        model.module.chosen = [[0, 1], [1, 2], []][group.rank]
        backward(model, 3.0 * (1 + group.rank))
        once = grads(model)
        model.zero_grad()
        model.module.chosen = [3]
        backward(model, 1.0)
        return once, grads(model)

    expected = [1.0, 3.0, 2.0, None], [None, None, None, 1.0]
    assert simulate(run, 3) == [expected] * 3


def test_find_unused_sends_early_what_does_not_wait_for_unused_parameters():
    def run(group):
        sent, at_first_gradient = [], []

        def spy(bucket, group):
            sent.append(bucket.index)
            return hooks.mean(bucket, group)

        model = DDP(Switch(3), group, find_unused=True, hook=spy, **TINY)
        model.module.chosen = [0, 1]  # branch 2 has the first bucket
        model.module.branches[1].factor.on_complete(lambda _: at_first_gradient.extend(sent))
        y, pullback = model.vjp(np.ones(1))
        assert sent == []
        pullback(y)
        return at_first_gradient, sent

    assert simulate(run, 2) == [([0, 1], [0, 1, 2])] * 2


def test_find_unused_keeps_what_was_accumulated():
    def run(group):
        model = DDP(Switch(2), group, find_unused=True, **TINY)
        with model.no_sync():
            backward(model, 1.0 + group.rank)
        model.module.chosen = [1]
        backward(model, 10.0)
        return grads(model)

    assert simulate(run, 2) == [[1.5, 11.5]] * 2


def test_a_parameter_used_only_while_accumulating_is_not_unused():
    def run(group):
        model = DDP(Switch(2), group, **TINY)
        with model.no_sync():
            backward(model, 1.0 + group.rank)
        model.module.chosen = [1]
        backward(model, 10.0)
        return grads(model)

    assert simulate(run, 2) == [[1.5, 11.5]] * 2
