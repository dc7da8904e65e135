"""Dropout draws alike where activations are whole, and otherwise on each rank."""

import numpy as np
import pytest

from ferro_strategies import nn
from ferro_strategies import tensor_parallel as tp

from .models import simulate

COLUMN, ROW = tp.ColumnParallelLinear.from_serial, tp.RowParallelLinear.from_serial


class DefinedFirst(nn.Module):
    """A perceptron that defines its dropout before the layers between which it is called."""

    def __init__(self, rng):
        self.drop = nn.Dropout(0.5, rng=rng)
        self.up, self.down = nn.Linear(4, 8, rng=0), nn.Linear(8, 4, rng=1)

    def vjp(self, x):
        return nn.Sequential(self.up, self.drop, self.down).vjp(x)


def nested(rng):
    """Two dropouts outside a pair, in nested containers, and two inside; all may share one generator."""
    inside = nn.Residual(nn.Sequential(nn.GELU(), nn.Dropout(0.5, rng=rng)))
    return nn.Sequential(
        nn.Dropout(0.5, rng=rng),
        nn.Residual(
            nn.Checkpoint(
                nn.Sequential(nn.Linear(4, 8, rng=0), inside, nn.Dropout(0.5, rng=rng), nn.Linear(8, 4, rng=1))
            )
        ),
        nn.Sequential(nn.Dropout(0.5, rng=rng)),
    )


PLAN = {"layers.1.module.layers.0": COLUMN, "layers.1.module.layers.3": ROW}


def draws(model):
    """The next numbers of each dropout, in definition order."""
    layers = [layer for layer in model.modules() if isinstance(layer, nn.Dropout)]
    return [layer.rng.random(4).tolist() for layer in layers]


@pytest.mark.parametrize("kind", ["unseeded", "equal seeds", "one generator", "other seeds"])
def test_draws_inside_a_pair_differ_and_outside_are_alike(kind):
    def run(group):
        rng = {"unseeded": None, "equal seeds": 3, "one generator": np.random.default_rng(3)}.get(kind, 3 + group.rank)
        model = tp.parallelize(nested(rng), group, PLAN)
        state = model.generator_state_dict()
        drawn = draws(model)
        model.load_generator_state_dict(state)
        assert draws(model) == drawn
        return drawn

    ranks = simulate(run, 3)
    before, in_residual, in_pair, after = zip(*ranks, strict=True)
    assert before[0] == before[1] == before[2]
    assert after[0] == after[1] == after[2]
    for inside in (in_residual, in_pair):
        assert len({tuple(numbers) for numbers in inside}) == 3
    if kind == "equal seeds":
        assert before[0] == np.random.default_rng(3).random(4).tolist()  # as in the serial model
        assert in_residual[0] != in_pair[0]


@pytest.mark.parametrize("sequence_parallel", [False, True])
def test_dropout_after_the_pair_differs_on_sharded_sequences_alone(sequence_parallel):
    def run(group):
        pair = nn.Linear(4, 8, rng=0), nn.Linear(8, 4, rng=1)
        plan = {
            "layers.0": lambda layer, group: COLUMN(layer, group, sequence_parallel=sequence_parallel),
            "layers.1": lambda layer, group: ROW(layer, group, sequence_parallel=sequence_parallel),
        }
        return draws(tp.parallelize(nn.Sequential(*pair, nn.Dropout(0.5)), group, plan))

    first, second = simulate(run, 2)
    assert (first == second) is not sequence_parallel


def test_a_plan_says_how_layers_draw_that_are_defined_out_of_order():
    def run(group, plan):
        [drawn] = draws(tp.parallelize(DefinedFirst(None), group, {"up": COLUMN, "down": ROW} | plan))
        return drawn

    first, second = simulate(lambda group: run(group, {"drop": tp.draw_per_rank}), 2)
    assert first != second
    first, second = simulate(lambda group: run(group, {}), 2)
    assert first == second

    def opposite(group):
        model = nn.Sequential(nn.Linear(4, 8, rng=0), nn.Dropout(0.5), nn.Linear(8, 4, rng=1))
        return draws(tp.parallelize(model, group, {"*.0": COLUMN, "*.1": tp.draw_alike, "*.2": ROW}))

    first, second = simulate(opposite, 2)
    assert first == second


def test_layers_made_by_their_constructors_are_seeded_by_an_empty_plan():
    def run(group):
        layers = tp.ColumnParallelLinear(4, 8, group, rng=0), tp.RowParallelLinear(8, 4, group, rng=1)
        model = nn.Sequential(layers[0], nn.Dropout(0.5), layers[1], nn.Dropout(0.5))
        return draws(tp.parallelize(model, group, {}))

    (inside_0, after_0), (inside_1, after_1) = simulate(run, 2)
    assert inside_0 != inside_1
    assert after_0 == after_1
