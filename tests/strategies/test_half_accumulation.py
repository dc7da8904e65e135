"""Microbatches add up in single precision, where parameters or the computation are in half precision."""

from contextlib import nullcontext

import ml_dtypes
import numpy as np
import pytest

import ferro
from ferro_strategies import DDP, FSDP, DeviceMesh, MixedPrecision, Pipeline, hooks
from ferro_strategies.nn import Linear, Module

FIRST, MANY = 256, 25  # 256 + 1 is 256 in bfloat16
TOTAL = FIRST + MANY - 1
HALF = ml_dtypes.bfloat16


def half_ddp(group):
    return DDP(Linear(1, 1, dtype=HALF, rng=0), group)


def half_fsdp(group):
    return FSDP(Linear(1, 1, dtype=HALF, rng=0), group)


def mixed(sharding="full_shard", reduce_dtype=np.float32):
    precision = MixedPrecision(param_dtype=HALF, reduce_dtype=reduce_dtype, output_dtype=HALF)
    return lambda group: FSDP(Linear(1, 1, rng=0), group, sharding=sharding, mixed_precision=precision)


def accumulate(model, how):
    for number in range(MANY):
        quiet = how == "sync_gradients" or (how == "no_sync" and number < MANY - 1)
        with model.no_sync() if quiet else nullcontext():
            y, pullback = model.vjp(np.ones((1, 1), HALF))
        pullback(np.full_like(y, 1 if number else FIRST))
    if how == "sync_gradients":
        model.sync_gradients()


@pytest.mark.parametrize(
    "wrap",
    [half_ddp, half_fsdp, mixed(), mixed(reduce_dtype=None), mixed("no_shard"), mixed("shard_optimizer")],
    ids=["ddp", "fsdp", "mixed", "mixed_half_messages", "mixed_no_shard", "mixed_shard_optimizer"],
)
@pytest.mark.parametrize("how", ["no_sync", "sync", "sync_gradients"])
def test_many_microbatches_add_up(wrap, how):
    def run(group):
        model = wrap(group)
        accumulate(model, how)
        return [float(p.grad.astype(np.float64).sum()) for p in model.parameters()]

    weight, bias = np.max(ferro.simulate(run, 2, timeout_s=30), axis=0)
    assert (weight, bias) == (TOTAL, TOTAL)


def test_many_microbatches_of_a_pipeline_add_up():
    def loss(output, target):
        return 0.0, target.astype(output.dtype) * len(output)

    def run(group):
        mesh = DeviceMesh((2, 1), ("dp", "pp"), group)
        pipeline = Pipeline([mixed()(mesh["dp"])], mesh["pp"], microbatches=MANY)
        targets = np.ones((MANY, 1), np.float32)
        targets[0] = FIRST
        pipeline.step(np.ones((MANY, 1), np.float32), targets, loss)
        return [float(p.grad.astype(np.float64).sum()) for p in pipeline.parameters()]

    # Each microbatch has the weight of its share of the rows.
    weight, bias = np.max(ferro.simulate(run, 2, timeout_s=30), axis=0)
    assert weight == bias == pytest.approx(TOTAL / MANY, rel=0.01)


class Repeated(Module):
    """Uses one layer many times in a pass."""

    def __init__(self):
        self.inner = Linear(1, 1, dtype=HALF, rng=0)

    def vjp(self, x):
        pulls = [self.inner.vjp(x)[1] for _ in range(MANY)]

        def pullback(grad_y):
            for number, pull in enumerate(pulls):
                pull(grad_y if number else grad_y * FIRST)

        return x, pullback


@pytest.mark.parametrize("hook", [None, hooks.mean, hooks.float16])
def test_one_pass_that_uses_a_layer_many_times_adds_up_on_every_rank(hook):
    def run(group):
        models = [Repeated(), DDP(Repeated(), group, hook=hook), FSDP(Repeated(), group)]
        sums = []
        for model in models:
            y, pullback = model.vjp(np.ones((1, 1), HALF))
            pullback(np.ones_like(y))
            sums.append([float(p.grad.astype(np.float64).sum()) for p in model.parameters()])
        return sums

    for column in np.max(ferro.simulate(run, 3, timeout_s=30), axis=0):
        assert column.tolist() == [TOTAL, TOTAL]
