"""A model in stages, and what it gives in one process: for the tests of pipelines."""

from __future__ import annotations

import numpy as np
import pytest

import ferro
from ferro_strategies.nn import (
    Embedding,
    LayerNorm,
    Linear,
    Module,
    Parameter,
    ReLU,
    Residual,
    Sequential,
    cross_entropy,
)

WIDTH, CLASSES, WORDS = 6, 5, 7


def simulate(function, world_size):
    return ferro.simulate(function, world_size, timeout_s=10, run_timeout_s=30)


def make_stages(count, dtype=np.float64):
    """A model of so many stages: indices in, logits out; no two stages are alike."""
    stages = []
    for number in range(count):
        layers = [Linear(WIDTH, WIDTH, dtype=dtype, rng=10 + number), ReLU()]
        if number % 2:
            layers = [Residual(Sequential(*layers)), LayerNorm(WIDTH, dtype=dtype)]
        if number == 0:
            layers.insert(0, Embedding(WORDS, WIDTH, dtype=dtype, rng=1))
        if number == count - 1:
            layers.append(Linear(WIDTH, CLASSES, dtype=dtype, rng=2))
        stages.append(Sequential(*layers))
    return stages


class Head(Module):
    """Logits by the transposed table of an embedding."""

    def __init__(self, weight):
        self.weight = weight

    def vjp(self, x):
        use = self.weight.use()
        rows = x.reshape(-1, x.shape[-1])

        def pullback(grad):
            flat = grad.reshape(rows.shape[0], -1)
            use.add_grad_product(flat.T, rows)
            return (flat @ use.data).reshape(x.shape)

        return (rows @ use.data.T).reshape(*x.shape[:-1], -1), pullback


def make_tied_stages(count, tied):
    """A model whose last stage uses the first one's table, or a copy that begins different."""
    table = Embedding(WORDS, WIDTH, dtype=np.float64, rng=0)
    weight = table.weight if tied else Parameter(np.full((WORDS, WIDTH), 9.0))
    middle = [Linear(WIDTH, WIDTH, dtype=np.float64, rng=n) for n in range(1, count - 1)]
    return [table, *middle, Sequential(Head(weight))]


def share(stages, group):
    """This rank's stages, in the usual placement."""
    return stages[group.rank :: group.world_size]


def batch(rows, seed=0):
    rng = np.random.default_rng(seed)
    return rng.integers(0, WORDS, (rows, 3)), rng.integers(0, CLASSES, (rows, 3))


def gradients(module):
    return {name: item.grad.copy() for name, item in module.named_parameters()}


def alone(stages, inputs, targets, loss=cross_entropy):
    """Loss and gradients in one process, named as in a pipeline."""
    y, pullback = Sequential(*stages).vjp(inputs)
    value, grad = loss(y, targets)
    pullback(grad)
    found = {f"{number}.{name}": grad for number, stage in enumerate(stages) for name, grad in gradients(stage).items()}
    return value, found


def assert_equal(results, expected, rtol=1e-12):
    """Every rank's loss, and the gradients of all ranks together, are those of one process."""
    value, grads = expected
    found = {}
    for loss, own in results:
        np.testing.assert_allclose(loss, value, rtol=rtol)
        found |= own
    assert found.keys() == grads.keys()
    for name, grad in grads.items():
        np.testing.assert_allclose(found[name], grad, rtol=rtol, atol=1e-15, err_msg=name)


class Trap(Module):
    """A stage that raises at one microbatch, forward or backward."""

    def __init__(self, stage, half, microbatch):
        self.stage = stage
        self._half = half
        self._microbatch = microbatch
        self._seen = 0

    def vjp(self, x):
        number, self._seen = self._seen, self._seen + 1
        if (self._half, self._microbatch) == ("forward", number):
            raise KeyError("trap")
        y, pull = self.stage.vjp(x)

        def pullback(grad):
            if (self._half, self._microbatch) == ("backward", number):
                raise KeyError("trap")
            return pull(grad)

        return y, pullback


def failing(action):
    """What an action raises on this rank."""
    with pytest.raises(Exception) as caught:
        action()
    return caught.value
