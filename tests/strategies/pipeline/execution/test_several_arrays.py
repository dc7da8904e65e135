"""Stages, batches and losses with several arrays: tuples, dicts, masks and indices."""

import numpy as np
import pytest

import ferro
from ferro_strategies import nn
from ferro_strategies.nn import Linear, Module, Sequential, mse_loss
from ferro_strategies.pipeline import Pipeline

from .pipeline_models import alone, assert_equal, gradients, share, simulate

F = np.float64


class Start(Module):
    """From {"ids", "mask"} to {"h", "mask", "skip"}."""

    def __init__(self):
        self.table, self.linear = nn.Embedding(7, 4, dtype=F, rng=0), Linear(4, 4, dtype=F, rng=1)

    def vjp(self, x):
        h, of_table = self.table.vjp(x["ids"])
        y, of_linear = self.linear.vjp(h)

        def pullback(grad):
            of_table(of_linear(grad["h"]) + grad["skip"])

        return {"h": y, "mask": x["mask"], "skip": h}, pullback


class Middle(Module):
    """Changes "h", where the mask allows, and hands on the rest."""

    def __init__(self, rng):
        self.linear = Linear(4, 4, dtype=F, rng=rng)

    def vjp(self, x):
        y, of_linear = self.linear.vjp(x["h"])
        keep = x["mask"][..., None]

        def pullback(grad):
            inner = grad["h"]
            return {"h": of_linear(inner * keep) + inner, "mask": None, "skip": grad["skip"]}

        return x | {"h": x["h"] + keep * y}, pullback


class End(Module):
    """To (scores, mask); "skip" has a gradient, the mask has none."""

    def __init__(self):
        self.linear = Linear(4, 2, dtype=F, rng=9)

    def vjp(self, x):
        y, of_linear = self.linear.vjp(x["h"] + x["skip"])

        def pullback(grad):
            inner = of_linear(grad[0])
            return {"h": inner, "mask": None, "skip": inner}

        return (y, x["mask"]), pullback


def stages(count):
    return [Start(), *(Middle(rng) for rng in range(2, count)), End()]


def data(rows):
    rng = np.random.default_rng(0)
    mask = rng.integers(0, 2, (rows, 3)).astype(bool)
    return {"ids": rng.integers(0, 7, (rows, 3)), "mask": mask}, (rng.standard_normal((rows, 3, 2)), np.arange(rows))


def loss(outputs, targets):
    y, mask = outputs
    assert len(targets[1]) == len(mask)
    value, grad = mse_loss(y, targets[0])
    return value, (grad, None)


@pytest.mark.parametrize("schedule", ["gpipe", "1f1b", "interleaved_1f1b", "zb_h1"])
@pytest.mark.parametrize("ranks", [1, 2, 3])
def test_trees_between_stages_train_like_one_process(schedule, ranks):
    per_rank = 2 if schedule == "interleaved_1f1b" or ranks == 1 else 1
    inputs, targets = data(rows=5)
    expected = alone(stages(ranks * per_rank), inputs, targets, loss)
    wanted = Sequential(*stages(ranks * per_rank))(inputs)

    def run(group):
        pipeline = Pipeline(share(stages(ranks * per_rank), group), group, schedule=schedule, microbatches=3)
        first, last = group.rank == 0, group.rank == ranks - 1
        value = pipeline.step(inputs if first else None, targets if last else None, loss)
        for outputs in (
            pipeline.forward(inputs if first else None, microbatches=2),
            pipeline.forward([inputs] if first else None),
        ):
            assert (outputs is None) != last
            if last:
                np.testing.assert_allclose(outputs[0], wanted[0], rtol=1e-12)
                np.testing.assert_array_equal(outputs[1], wanted[1])
        return value, gradients(pipeline)

    assert_equal(simulate(run, ranks), expected)


class Plain(Module):
    """Returns what a function makes of its input; its gradient is what another makes."""

    def __init__(self, forward, backward=lambda x, grad: grad):
        self._forward, self._backward = forward, backward

    def vjp(self, x):
        return self._forward(x), lambda grad: self._backward(x, grad)


@pytest.mark.parametrize("schedule", ["1f1b", "zb_h1"])
def test_a_stage_may_hand_on_indices_alone(schedule):
    """Then no gradient goes back to it, and its parameters have none."""

    def refuse(x, grad):
        raise AssertionError

    def run(group):
        table = nn.Embedding(7, 2, dtype=F, rng=0)
        stage = [Plain(lambda x: x + 1, refuse), Plain(lambda x: (x, x > 2), refuse), Head(table)][group.rank]
        pipeline = Pipeline([stage], group, schedule=schedule, microbatches=2)
        return pipeline.step(np.arange(4), np.zeros((4, 2)), mse_loss), gradients(pipeline)

    class Head(Module):
        def __init__(self, table):
            self.table = table

        def vjp(self, x):
            assert x[1].dtype == bool
            y, pull = self.table.vjp(x[0])
            return y, lambda grad: (pull(grad), None)

    table = nn.Embedding(7, 2, dtype=F, rng=0)
    y, pull = table.vjp(np.arange(1, 5))
    value, grad = mse_loss(y, np.zeros((4, 2)))
    pull(grad)
    results = simulate(run, 3)
    assert results[0] == (pytest.approx(value), {})
    np.testing.assert_allclose(results[2][1]["2.table.weight"], table.weight.grad)


def drifting(x):
    return x.astype(np.float32) if x[0, 0] > 3 else x


def transposed(x, grad):
    return grad.T.copy()


FAULTS = {
    r"stage 0 \(Plain\) returned for microbatch 0 a object, which is neither an array": (
        Plain(lambda x: object()),
        None,
    ),
    r"stage 0 \(Plain\) returned float32 \(2, 2\) for microbatch 1, and float64 \(2, 2\) for an earlier one": (
        Plain(drifting),
        None,
    ),
    r"stage 1 \(Plain\), microbatch 0: its pullback must return the gradient of its input, of shape \(2, 3\)": (
        Plain(lambda x: np.ones((2, 3))),
        Plain(lambda x: x, transposed),
    ),
    r"stage 1 \(Plain\), microbatch 0: its pullback must return .* a float": (
        None,
        Plain(lambda x: x, lambda x, g: 1.0),
    ),
    r"stage 1 \(Plain\) returned for microbatch 0 a gradient of dtype int64": (
        None,
        Plain(lambda x: x, lambda x, grad: grad.astype(int)),
    ),
    r"stage 1 \(Plain\) has no gradient for its input, and stage 0 needs it": (
        None,
        Plain(lambda x: x, lambda x, g: None),
    ),
}


@pytest.mark.parametrize("message", FAULTS)
def test_what_a_stage_returns_is_checked_and_the_stage_named_on_every_rank(message):
    def run(group):
        stage = FAULTS[message][group.rank] or Plain(lambda x: x)
        pipeline = Pipeline([stage], group, microbatches=2)
        x = np.arange(8.0).reshape(4, 2)
        with pytest.raises(ferro.FerroError, match=message):
            pipeline.step(x, x, lambda y, t: (0.0, np.zeros_like(y)))

    simulate(run, 2)


BATCHES = {
    r"the arrays of the inputs have different numbers of rows, \[4, 3\]": (np.ones((4, 1)), np.ones((3, 1))),
    r"the inputs are a single number, or contain one": (np.ones((4, 1)), np.ones(())),
    "the inputs must be plain arrays, got .*mask": (np.ma.masked_array(np.ones((4, 1)), np.zeros((4, 1))),),
    "expected a NumPy or CuPy array, got builtins.dict": {"a": 1},
    "list of 4 microbatches, where microbatches=2.* as a tuple or dict": [np.ones(1)] * 4,
}


@pytest.mark.parametrize("message", BATCHES)
def test_a_batch_that_cannot_be_cut_is_described(message):
    def run(group):
        with pytest.raises(ferro.UsageError, match=message):
            Pipeline([Plain(lambda x: x)], group, microbatches=2).step(BATCHES[message], np.ones(4), mse_loss)

    simulate(run, 1)


def test_other_leaves_go_to_every_microbatch():
    seen = []

    def run(group):
        pipeline = Pipeline([Plain(lambda x: x[0] * x[1]["scale"])], group, microbatches=2)
        outputs = pipeline.forward((np.ones((3, 1)), {"scale": 2.0, "none": None}), microbatches=2)
        seen.append(outputs.tolist())

    simulate(run, 1)
    assert seen == [[[2.0]] * 3]
