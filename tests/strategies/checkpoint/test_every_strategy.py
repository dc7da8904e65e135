"""The pieces of every strategy make up the plain model's arrays, and those of any go into any other."""

import numpy as np
import pytest

import ferro
from ferro_strategies import Pipeline
from ferro_strategies.tensor_parallel import full_state_dict

from .assembler import Held, Saved, check_equal
from .trainings import STRATEGIES, make_net


def simulate(work, ranks):
    return ferro.simulate(work, ranks, timeout_s=20, run_timeout_s=60)


def checkpoint(strategy):
    """Train for a step, and save; also return what the strategy's own state dicts say."""
    ranks, make = STRATEGIES[strategy]

    def work(group):
        training = make(group, 0).run(1)
        model = training.model
        held = Held(model, training.optimizer)
        if isinstance(model, Pipeline):
            return held, None, None
        local = model.state_dict()
        return held, full_state_dict(model, local), model.full_optimizer_state_dict(training.optimizer)

    found = simulate(work, ranks)
    return Saved([held for held, _, _ in found]), found[0][1], found[0][2]


@pytest.fixture(scope="module")
def checkpoints():
    return {strategy: checkpoint(strategy) for strategy in STRATEGIES}


def test_pieces_make_up_the_plain_models_arrays(checkpoints):
    names = {name: (item.shape, item.dtype) for name, item in make_net().named_parameters()}
    for strategy, (saved, full, optimizer) in checkpoints.items():
        assert {name: (array.shape, array.dtype) for name, array in saved.model.items()} == names, strategy
        if full is not None:
            check_equal(saved.model, full)
            check_equal(saved.optimizers[0], {name: optimizer[name] for name in optimizer if name.endswith(_KINDS)})
        serial = checkpoints["serial"][0]
        assert saved.optimizers[0].keys() == serial.optimizers[0].keys(), strategy
        assert saved.values[0][1] == serial.values[0][1], strategy


_KINDS = (".m", ".v", ".t")


@pytest.mark.parametrize("strategy", STRATEGIES)
def test_what_any_strategy_has_saved_is_loaded_bit_for_bit(checkpoints, strategy):
    """Saved by some of the others, in turn, and loaded by this one on its number of ranks."""
    ranks, make = STRATEGIES[strategy]
    sources = [saved for saved, _, _ in list(checkpoints.values())[list(STRATEGIES).index(strategy) % 4 :: 4]]

    def work(group):
        training = make(group, 50)
        found = []
        for saved in sources:
            saved.load(group.rank, training.model, training.optimizer)
            found.append(Held(training.model, training.optimizer))
        return found

    for saved, held in zip(sources, zip(*simulate(work, ranks), strict=True), strict=True):
        found = Saved(list(held))
        check_equal(found.model, saved.model)
        check_equal(found.optimizers[0], saved.optimizers[0])


@pytest.mark.parametrize("strategy", STRATEGIES)
def test_a_training_goes_on_bit_for_bit(strategy):
    ranks, make = STRATEGIES[strategy]

    def whole(group):
        training = make(group, 0).run(2)
        held = Held(training.model, training.optimizer)
        training.run(2, first=2)
        return held, Held(training.model, training.optimizer)

    found = simulate(whole, ranks)
    saved = Saved([held for held, _ in found])

    def resumed(group):
        training = make(group, 30)
        saved.load(group.rank, training.model, training.optimizer)
        training.run(2, first=2)
        return Held(training.model, training.optimizer)

    expected, resumed = Saved([held for _, held in found]), Saved(simulate(resumed, ranks))
    check_equal(resumed.model, expected.model)
    check_equal(resumed.optimizers[0], expected.optimizers[0])
    assert resumed.values == expected.values
    assert any(not np.array_equal(expected.model[name], saved.model[name]) for name in saved.model)
