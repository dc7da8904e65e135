"""Memory: no array of a parameter's size beside value, gradient and optimizer state.

NumPy reports its allocations to tracemalloc, so these are exact counts of bytes, not timings.
"""

import tracemalloc

import numpy as np
import pytest

from ferro_strategies.nn import Conv2d, Embedding, Linear, Module, Sequential
from ferro_strategies.optim import SGD, AdamW


def peak_bytes(call):
    """Measure the rise of memory above the start while `call` ran."""
    tracemalloc.start()
    try:
        before, _ = tracemalloc.get_traced_memory()
        call()
        return tracemalloc.get_traced_memory()[1] - before
    finally:
        tracemalloc.stop()


def images(*shape):
    return np.ones(shape, np.float32)


@pytest.mark.parametrize(
    ("module", "x"),
    [
        (Linear(512, 512, rng=0), images(4, 512)),
        (Conv2d(128, 128, 4, rng=0), images(1, 128, 4, 4)),
        (Embedding(4096, 64, rng=0), np.arange(16) % 7),
    ],
    ids=["linear", "convolution", "embedding"],
)
def test_a_gradient_is_made_in_its_preset_memory(module, x):
    for parameter in module.parameters():
        parameter.set_grad_memory(np.empty_like(parameter.data))
    y = module(x)

    def both_halves():
        module.vjp(x)[1](y)

    assert peak_bytes(both_halves) < module.weight.data.nbytes / 4


@pytest.mark.parametrize("build", [lambda p: SGD(p, 0.1, 0.9, 0.1, nesterov=True), AdamW])
def test_a_step_takes_one_small_scratch(build):
    layer = Linear(1024, 512, rng=0)
    optimizer = build(layer.parameters())
    for parameter in layer.parameters():
        parameter.add_grad(parameter.data)
    optimizer.step()  # makes the state
    assert peak_bytes(optimizer.step) < layer.weight.data.nbytes / 8


class Widen(Module):
    """A layer whose pullback keeps an activation of one MiB."""

    def vjp(self, x):
        kept = np.ones(1 << 20, np.uint8)
        return x, lambda grad: grad * kept[0]


def test_evaluation_keeps_no_activations():
    model = Sequential(*(Widen() for _ in range(8)))
    assert peak_bytes(lambda: model(np.ones(1))) < 2 << 20
    assert peak_bytes(lambda: model.vjp(np.ones(1))) > 8 << 20


def test_the_backward_pass_frees_activations_as_it_goes():
    freed = []

    class Probe(Module):
        def vjp(self, x):
            def pullback(grad):
                freed.append(tracemalloc.get_traced_memory()[0])
                return grad

            return x, pullback

    model = Sequential(Probe(), Widen(), Probe(), Widen(), Probe())
    tracemalloc.start()
    try:
        _, pullback = model.vjp(np.ones(1))
        pullback(np.ones(1))
    finally:
        tracemalloc.stop()
    last, middle, first = freed
    assert last - middle > 1 << 19
    assert middle - first > 1 << 19
