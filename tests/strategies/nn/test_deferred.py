"""Deferred building: parameters without arrays, whose later values are those of a model built as a whole."""

import copy
import pickle
import threading

import numpy as np
import pytest

from ferro import UsageError
from ferro_strategies import deferred, nn


def build(rng):
    """Layers of which some share a generator, as a program with one seed would build them."""
    return nn.Sequential(
        nn.Embedding(7, 6, rng=rng),
        nn.Attention(6, 2, rng=rng),
        nn.Linear(6, 300, rng=3, dtype=np.float64),
        nn.Linear(300, 300, rng=rng),
        nn.Conv2d(2, 3, 3, rng=rng),
        nn.LayerNorm(6),
        nn.BatchNorm(3),
    )


def test_deferred_values_are_those_of_a_whole_model():
    with deferred():
        generator = np.random.default_rng(5)
        model = build(generator)
    whole_generator = np.random.default_rng(5)
    whole = build(whole_generator)
    assert generator.bit_generator.state == whole_generator.bit_generator.state
    parameters = dict(model.named_parameters())
    assert parameters["layers.3.weight"].is_deferred
    for name, parameter in whole.named_parameters():
        assert (parameters[name].shape, parameters[name].dtype) == (parameter.data.shape, parameter.data.dtype)
    twin = copy.deepcopy(model)
    assert model.materialize() is model
    for made in (model, twin.materialize(), pickle.loads(pickle.dumps(twin))):
        for name, array in whole.state_dict().items():
            np.testing.assert_array_equal(made.state_dict()[name], array)
        assert not any(parameter.is_deferred for parameter in made.parameters())


def test_other_threads_and_later_modules_are_not_deferred():
    made = []
    with deferred():
        thread = threading.Thread(target=lambda: made.append(nn.Linear(2, 2)))
        thread.start()
        thread.join()
    assert not made[0].weight.is_deferred
    assert not nn.Linear(2, 2).weight.is_deferred


def test_a_value_that_is_needed_too_early_is_refused_with_the_remedy():
    with deferred():
        layer = nn.Linear(2, 3)
    with pytest.raises(UsageError, match=r"'weight' of shape \(2, 3\) was built inside deferred\(\), and has no value"):
        layer(np.ones((1, 2), np.float32))
    assert "shape=(2, 3), dtype=float32, deferred" in repr(layer.weight)


def test_a_state_can_be_loaded_into_a_deferred_module():
    state = nn.Linear(2, 3, rng=1).state_dict()
    with deferred():
        layer = nn.Linear(2, 3)
    with pytest.raises(UsageError, match="Nothing was loaded"):
        layer.load_state_dict({**state, "weight": np.ones((3, 2), np.float32)})
    assert layer.weight.is_deferred
    layer.load_state_dict(state)
    np.testing.assert_array_equal(layer.weight.data, state["weight"])
    assert layer.weight.data is not state["weight"]


def test_a_layer_of_a_user_defers_its_values_through_drawn():
    def fill(generator, array):
        array[...] = generator.integers(0, 9, array.shape)

    with deferred():
        value = nn.Parameter(nn.drawn(fill, (4, 5), np.float32, 3))
    assert value.is_deferred
    value.materialize()
    np.testing.assert_array_equal(value.data, nn.drawn(fill, (4, 5), np.float32, 3))
