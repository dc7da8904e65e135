"""An optimizer's step with gradients of one rank alone is refused, in DDP and in FSDP."""

import numpy as np
import pytest

import ferro
from ferro_strategies import DDP, FSDP
from ferro_strategies.nn import Linear
from ferro_strategies.optim import SGD


def wrapped(wrap, group):
    model = wrap(Linear(2, 1, bias=False, dtype=np.float64, rng=0), group)
    return model, SGD(model.parameters(), lr=0.1)


def run_pass(model, value):
    y, pullback = model.vjp(np.full((1, 2), value))
    pullback(np.ones_like(y))


def test_a_pullback_that_is_kept_does_not_make_the_next_step_a_local_one():
    def run(group):
        model, optimizer = wrapped(DDP, group)
        before = model.state_dict()["weight"]
        kept = model.vjp(np.ones((1, 2)))
        run_pass(model, group.rank + 1.0)
        with pytest.raises(ferro.UsageError, match=r"gradients of this rank alone, for 1 pullback"):
            optimizer.step()
        np.testing.assert_array_equal(model.state_dict()["weight"], before)
        kept[1](np.zeros((1, 1)))
        optimizer.step()
        return model.state_dict()["weight"] - before

    for change in ferro.simulate(run, 2, timeout_s=10):
        np.testing.assert_allclose(change, -0.15)


@pytest.mark.parametrize("wrap", [DDP, FSDP])
def test_the_last_pass_in_no_sync_is_reduced_before_a_step(wrap):
    def run(group):
        model, optimizer = wrapped(wrap, group)
        before = model.state_dict()["weight"]
        run_pass(model, group.rank + 1.0)
        with model.no_sync():
            run_pass(model, 10.0 * (group.rank + 1))
        with pytest.raises(ferro.UsageError, match=r"about to step .*sync_gradients\(\)"):
            optimizer.step()
        model.sync_gradients()
        optimizer.step()
        change = model.state_dict()["weight"] - before
        optimizer.zero_grad()
        # Gradients that were forgotten are in nobody's way, and a step without learning rate changes nothing.
        with model.no_sync():
            run_pass(model, 5.0)
        optimizer.lr = 0.0
        optimizer.step()
        optimizer.lr = 0.1
        optimizer.zero_grad()
        optimizer.step()
        run_pass(model, 1.0)
        optimizer.step()
        return change, model.state_dict()["weight"] - before

    for first, both in ferro.simulate(run, 2, timeout_s=10):
        np.testing.assert_allclose(first, -0.1 * (1.5 + 15))
        np.testing.assert_allclose(both, -0.1 * (1.5 + 15 + 1))


def test_a_model_that_is_wrapped_again_is_not_judged_by_the_wrapper_before():
    def run(group):
        old, _ = wrapped(DDP, group)
        with old.no_sync():
            run_pass(old, 1.0)
        model = DDP(old.module, group)
        model.zero_grad()
        run_pass(model, 1.0)
        SGD(model.parameters(), lr=0.1).step()

    ferro.simulate(run, 2, timeout_s=10)
