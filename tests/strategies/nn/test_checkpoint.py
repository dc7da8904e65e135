"""Checkpoint: the results of the wrapped module, bit for bit, in less memory."""

import gc
import random
import tracemalloc

import numpy as np
import pytest

import ferro
from ferro_strategies.nn import (
    GELU,
    Attention,
    BatchNorm,
    Checkpoint,
    Dropout,
    Embedding,
    LayerNorm,
    Linear,
    Module,
    Residual,
    Sequential,
    deferring,
)


def floats(*shape, seed=0):
    return np.random.default_rng(seed).standard_normal(shape)


def block(rng, dropout=0.3):
    return Sequential(
        Residual(Sequential(LayerNorm(4, dtype=float), Attention(4, 2, dtype=float, rng=rng))),
        Dropout(dropout, rng=rng),
        Linear(4, 4, dtype=float, rng=rng),
        GELU(),
    )


def rows_block():
    rng = np.random.default_rng(1)
    return Sequential(
        Linear(4, 6, dtype=float, rng=rng),
        BatchNorm(6, dtype=float),
        Dropout(0.5, rng=rng),
        Linear(6, 3, dtype=float, rng=rng),
    )


def passes(model, xs):
    """Run forward on all, then backward on all; return outputs, input gradients and state."""
    pulls, results = [], []
    for x in xs:
        y, pull = model.vjp(x)
        results.append(y)
        pulls.append(pull)
    results += [pull(floats(*y.shape, seed=7)) for pull, y in zip(pulls, results, strict=True)]
    results += [parameter.grad for parameter in model.parameters()]
    return results + list(model.state_dict().values())


MODELS = {
    "one": (lambda wrap: wrap(block(np.random.default_rng(3))), (2, 3, 4)),
    "several": (lambda wrap: Sequential(*(wrap(block(rng)) for rng in [np.random.default_rng(3)] * 3)), (2, 3, 4)),
    "nested": (lambda wrap: wrap(Sequential(*(wrap(block(rng)) for rng in [np.random.default_rng(3)] * 2))), (2, 3, 4)),
    "statistics": (lambda wrap: wrap(rows_block()), (5, 4)),
    "evaluation": (lambda wrap: wrap(rows_block()).eval(), (5, 4)),
}


@pytest.mark.parametrize(("build", "shape"), MODELS.values(), ids=MODELS)
@pytest.mark.parametrize("microbatches", [1, 3])
def test_everything_equals_the_plain_module_bit_for_bit(build, shape, microbatches):
    xs = [floats(*shape, seed=seed) for seed in range(microbatches)]
    plain, checkpointed = build(lambda module: module), build(Checkpoint)
    for _ in range(2):  # generators and statistics go on from where they were
        expected, results = passes(plain, xs), passes(checkpointed, xs)
        for a, b in zip(expected, results, strict=True):
            np.testing.assert_array_equal(a, b)


def test_names_are_those_of_the_wrapped_module():
    plain, checkpointed = rows_block(), Checkpoint(rows_block())
    assert list(plain.state_dict()) == list(checkpointed.state_dict())
    checkpointed.load_state_dict(plain.state_dict())


def test_the_training_flag_is_that_of_the_forward_pass():
    model, x = Checkpoint(rows_block()), floats(5, 4)
    reference = rows_block()
    y, pullback = model.vjp(x)
    expected, pull_expected = reference.vjp(x)
    model.eval()
    np.testing.assert_array_equal(pullback(y), pull_expected(expected))
    assert not any(module.training for module in model.modules())


def test_indices_have_no_gradient():
    model = Checkpoint(Embedding(5, 3, rng=0))
    y, pullback = model.vjp(np.array([1, 4, 1]))
    assert pullback(np.ones_like(y)) is None
    np.testing.assert_array_equal(model.module.weight.grad.sum(axis=1), [0, 6, 0, 0, 3])


class Second(Module):
    """Two layers, of which a pass uses the second."""

    def __init__(self):
        self.layers = [Linear(2, 2, dtype=float, rng=0), Linear(2, 2, dtype=float, rng=1)]

    def vjp(self, x):
        return self.layers[1].vjp(x)


def test_a_gradient_is_complete_once_and_only_what_was_used_is_outstanding():
    model, told = Checkpoint(Second()), []
    for name, parameter in model.named_parameters():
        parameter.on_complete(lambda _, name=name: told.append(name))
    first, second = (model.vjp(floats(3, 2, seed=seed))[1] for seed in (1, 2))
    assert [p.outstanding_uses for p in model.parameters()] == [0, 0, 2, 2]
    first(floats(3, 2))
    assert told == []
    second(floats(3, 2))
    assert told == ["layers.1.bias", "layers.1.weight"]
    assert [p.outstanding_uses for p in model.parameters()] == [0, 0, 0, 0]


class Collected(Module):
    """Collect garbage in the middle of the forward pass, as Python may at any time."""

    def __init__(self, module):
        self.module = module

    def vjp(self, x):
        passed = self.module.vjp(x)
        gc.collect()
        return passed


def test_a_use_collected_during_the_forward_pass_hides_none_of_its_own():
    layer, x = Linear(2, 2, dtype=float, rng=0), floats(3, 2)
    circle = [layer.vjp(x)[1]]
    circle.append(circle)
    del circle
    y, pullback = Checkpoint(Collected(layer)).vjp(x)
    assert layer.weight.outstanding_uses == 1
    pullback(y)
    assert layer.weight.outstanding_uses == 0


def test_a_dropped_pullback_leaves_no_use_behind():
    model = Checkpoint(block(np.random.default_rng(0)))
    _, pullback = model.vjp(floats(1, 2, 4))
    assert all(parameter.outstanding_uses for parameter in model.parameters())
    gc.disable()  # it must not take a collection to notice
    try:
        del pullback
        assert not any(parameter.outstanding_uses for parameter in model.parameters())
    finally:
        gc.enable()


def test_products_can_be_deferred():
    model, plain = Checkpoint(Linear(3, 2, dtype=float, rng=0)), Linear(3, 2, dtype=float, rng=0)
    x, grad = floats(4, 3), floats(4, 2)
    _, pullback = model.vjp(x)
    with deferring(model.parameters()) as products:
        pullback(grad)
    assert model.module.weight.grad is None
    for product in products:
        product()
    plain.vjp(x)[1](grad)
    np.testing.assert_array_equal(model.module.weight.grad, plain.weight.grad)


def test_a_pullback_runs_once():
    model = Checkpoint(Linear(2, 2, rng=0))
    y, pullback = model.vjp(np.ones((1, 2), np.float32))
    pullback(y)
    with pytest.raises(ferro.UsageError, match=r"this pullback has been run\. Call vjp again"):
        pullback(y)


class FailsAgain(Module):
    """Draw and change `training` in each forward pass; fail in all but the first."""

    def __init__(self):
        self.rng = np.random.default_rng(0)
        self.passes = 0

    def vjp(self, x):
        self.passes += 1
        self.rng.random()
        if self.passes > 1:
            raise FloatingPointError("twice")
        return x, lambda grad: grad


def test_what_fails_the_second_time_leaves_all_as_it_was():
    model = Checkpoint(FailsAgain())
    y, pullback = model.vjp(floats(2))
    model.eval()
    following = model.module.rng.bit_generator.state
    with pytest.raises(FloatingPointError, match="twice"):
        pullback(y)
    assert not model.module.training
    assert model.module.rng.bit_generator.state == following


def test_only_the_input_is_kept():
    def widening(layers):
        return Sequential(*(wrap(Sequential(Linear(8, 512, rng=0), GELU(), Linear(512, 8, rng=0))) for wrap in layers))

    x = np.ones((64, 8), np.float32)

    def kept_and_peak(model):
        tracemalloc.start()
        try:
            y, pullback = model.vjp(x)
            kept = tracemalloc.get_traced_memory()[0]
            pullback(y)
            return kept, tracemalloc.get_traced_memory()[1]
        finally:
            tracemalloc.stop()

    plain, checkpointed = widening([lambda m: m] * 8), widening([Checkpoint] * 8)
    for model in (plain, checkpointed):
        passes_once = model.vjp(x)[1]
        passes_once(np.ones_like(x))  # makes the gradients' memory
    kept_plain, peak_plain = kept_and_peak(plain)
    kept, peak = kept_and_peak(checkpointed)
    assert kept < kept_plain / 10
    assert peak < kept_plain / 2 < peak_plain


class Noise(Module):
    """Add what a function of the shape draws."""

    def __init__(self, draw):
        self.draw = draw

    def vjp(self, x):
        noise = self.draw(x.shape)
        return x * noise, lambda grad: grad * noise


class HeldNoise(Module):
    def __init__(self):
        self.generators = {"a": (np.random.default_rng(4),)}

    def vjp(self, x):
        noise = self.generators["a"][0].standard_normal(x.shape)
        return x * noise, lambda grad: grad * noise


def test_generators_in_containers_and_global_ones_draw_the_same_again():
    def numbers(wrap):
        np.random.seed(0)
        random.seed(0)
        draws = [np.random.standard_normal, lambda shape: np.full(shape, random.random())]
        model = wrap(Sequential(HeldNoise(), *map(Noise, draws)))
        return [*passes(model, [floats(3, 4), floats(3, 4)]), np.random.random(), random.random()]

    for a, b in zip(numbers(lambda module: module), numbers(Checkpoint), strict=True):
        np.testing.assert_array_equal(a, b)


def test_a_generator_that_no_module_holds_is_noticed():
    generator = np.random.default_rng(0)
    y, pullback = Checkpoint(Sequential(Linear(4, 4, dtype=float), Noise(generator.standard_normal))).vjp(floats(3, 4))
    with pytest.raises(ferro.UsageError, match="make the generator an attribute of the module"):
        pullback(y)
