"""The backward pass of FSDP: tied, frozen and unused parameters, nested units, checkpointing."""

import contextlib
import gc

import numpy as np
import pytest

import ferro
from ferro_strategies.fsdp import ShardingStrategy
from ferro_strategies.nn import Checkpoint, Dropout, Embedding, Linear, Module, ReLU, Residual, Sequential, mse_loss
from ferro_strategies.optim import SGD, clip_grad_norm

from .models import (
    WITHOUT_REPLICAS,
    Scale,
    Switch,
    assert_same,
    backward,
    batch,
    build,
    gathered_grads,
    grads_of,
    one_by_one,
    shard,
    simulate,
    train,
)
from .ways import shared_out

pytestmark = pytest.mark.usefixtures("both_ways")

EVERY = list(ShardingStrategy)


@pytest.mark.parametrize("sharding", EVERY)
def test_tied_weights(sharding):
    def tied():
        first, second = Linear(3, 3, dtype=np.float64, rng=0), Linear(3, 3, dtype=np.float64, rng=1)
        second.weight = first.weight
        twice = Linear(3, 3, dtype=np.float64, rng=2)
        return Sequential(first, ReLU(), twice, second, twice, Linear(3, 1, dtype=np.float64, rng=3))

    def run(group):
        model = shard(group, tied(), sharding=sharding)
        return train(model, group.rank, 4)

    expected = train(tied())
    for result in simulate(run, 4):
        assert_same(result, expected)


@pytest.mark.parametrize("sharding", EVERY)
def test_frozen_parameters_stay(sharding):
    def frozen():
        model = build()
        for name, parameter in model.named_parameters():
            parameter.requires_grad = not ("layers.2" in name or name.endswith("bias"))
        return model

    def run(group):
        model = shard(group, frozen(), sharding=sharding)
        one_by_one(model, group.rank, 4)
        grads = gathered_grads(model)
        model.zero_grad()
        return grads, train(model, group.rank, 4)

    model = frozen()
    one_by_one(model, 0, 1)
    expected = grads_of(model)
    assert expected["layers.2.weight"] is None
    trained = train(frozen())
    for grads, state in simulate(run, 4):
        assert_same(grads, expected)
        assert_same(state, trained)


def test_a_parameter_frozen_later_gets_no_gradient():
    def run(group):
        model = shard(group)
        model.module.layers[0].module.weight.requires_grad = False
        one_by_one(model, group.rank, 2)
        return gathered_grads(model)

    for result in simulate(run, 2):
        assert [name for name, grad in result.items() if grad is None] == ["layers.0.weight"]


def chosen_grads(model, chosen):
    model.module.chosen = chosen
    model.zero_grad()
    y, pullback = model.vjp(np.array([2.0]))
    pullback(np.ones_like(y))
    return [None if grad is None else float(grad[0]) for grad in gathered_grads(model).values()]


@pytest.mark.parametrize("sharding", EVERY)
def test_units_left_out_have_no_gradient_and_cost_nothing(sharding):
    def run(group):
        model = shard(group, Switch(), sharding=sharding)
        return [chosen_grads(model, chosen) for chosen in ([0, 1, 2], [2], [1, 0], [0, 1, 1])]

    expected = [[2, 2, 2], [None, None, 2], [2, 2, None], [2, 4, None]]
    assert simulate(run, 4) == [expected] * 4


def test_parameters_of_a_unit_that_no_rank_used_get_no_gradient():
    def run(group):
        model = shard(group, Switch(), units=[])
        return [chosen_grads(model, [group.rank]), chosen_grads(model, [])]

    assert simulate(run, 2) == [[[1, 1, None], [None, None, None]]] * 2


@pytest.mark.parametrize("sharding", EVERY)
def test_units_used_only_in_no_sync_are_reduced_by_the_next_pass(sharding):
    def run(group):
        model = shard(group, Switch(), sharding=sharding)
        for chosen, context in ([0, 1], model.no_sync()), ([1], contextlib.nullcontext()):
            model.module.chosen = chosen
            with context:
                y, pullback = model.vjp(np.array([2.0]))
                pullback(np.ones_like(y))
        SGD(model.parameters(), lr=0.0).step()
        return [None if grad is None else float(grad[0]) for grad in gathered_grads(model).values()]

    assert simulate(run, 2) == [[2, 4, None]] * 2


@pytest.mark.parametrize("sharding", EVERY)
def test_units_that_differ_between_ranks_are_noticed_and_accumulate_all_the_same(sharding):
    """Branches of one size would be averaged with each other, without a word."""

    def run(group):
        model = shard(group, Switch(), sharding=sharding, prefetch=False)
        model.module.chosen = [group.rank]
        with model.no_sync():
            y, pullback = model.vjp(np.array([2.0]))
            pullback(np.ones_like(y))
        model.sync_gradients()
        found = [None if grad is None else float(grad[0]) for grad in gathered_grads(model).values()]
        with pytest.raises(ferro.UsageError, match=r"different units.*branches.0.*branches.1"):
            chosen_grads(model, [group.rank])
        return found

    assert simulate(run, 2) == [[1, 1, None]] * 2


@pytest.mark.parametrize("rates", [(0.1, 0.2), (0.1, None)])
def test_steps_that_differ_between_ranks_are_noticed(rates):
    """Shards have no replica that would show it: a rate by the rank's own loss, a step left out for its own NaN."""

    def run(group):
        model = shard(group)
        optimizer = SGD(model.parameters(), lr=rates[group.rank] or 0.1)
        one_by_one(model, group.rank, 2)
        if rates[group.rank] is not None:
            optimizer.step()
        with pytest.raises(ferro.UsageError, match=r"steps of optimizers on group 'world': rank 0: lr 0.1; rank 1: "):
            one_by_one(model, group.rank, 2)

    simulate(run, 2)


@pytest.mark.parametrize("sharding", EVERY)
def test_dropped_pullbacks_leave_nothing(sharding):
    def run(group):
        model = shard(group, sharding=sharding)
        dropped = [model.vjp(batch(step)[0]) for step in range(3)]
        one_by_one(model, group.rank, 4)
        del dropped
        return gathered_grads(model)

    model = build()
    one_by_one(model, 0, 1)
    for result in simulate(run, 4):
        assert_same(result, grads_of(model))
    gc.collect()


def nested():
    rng = np.random.default_rng(1)

    def linear():
        return Linear(3, 3, dtype=np.float64, rng=rng)

    inner = Residual(Sequential(linear(), ReLU(), linear()))
    shared = linear()
    return Sequential(
        linear(), Residual(Sequential(linear(), inner, shared)), shared, Linear(3, 1, dtype=np.float64, rng=2)
    )


@shared_out(sharding=EVERY, prefetch=[False, True])
def test_nested_units(sharding, prefetch):
    def made():
        model = nested()
        model.layers[-1].weight.data[...] = 1
        return model

    def run(group):
        model = shard(group, made(), sharding=sharding, units=lambda *_: True, prefetch=prefetch)
        return train(model, group.rank, 4)

    for result in simulate(run, 4):
        assert_same(result, train(made()))


class Head(Module):
    """Embeds indices, and at the end multiplies by the same table, a parameter of the root."""

    def __init__(self):
        self.embedding = Embedding(5, 3, dtype=np.float64, rng=0)
        self.blocks = [Residual(Linear(3, 3, dtype=np.float64, rng=i)) for i in range(2)]

    def vjp(self, x):
        table = self.embedding.weight.use()
        hidden, pull_embedding = self.embedding.vjp(x)
        pulls = []
        for block in self.blocks:
            hidden, pull = block.vjp(hidden)
            pulls.append(pull)

        def pullback(grad):
            table.add_grad(grad.T @ hidden)
            grad_hidden = grad @ table.data
            for pull in reversed(pulls):
                grad_hidden = pull(grad_hidden)
            return pull_embedding(grad_hidden)

        return hidden @ table.data.T, pullback


@pytest.mark.parametrize("sharding", EVERY)
def test_a_model_with_a_tied_table(sharding):
    indices = np.arange(12) % 5

    def step(model, rank=0, ranks=1):
        optimizer = SGD(model.parameters(), lr=0.1)
        for _ in range(2):
            y, pullback = model.vjp(indices[rank::ranks])
            assert pullback(mse_loss(y, np.eye(5)[indices[rank::ranks]])[1]) is None
            optimizer.step()
            optimizer.zero_grad()
        return model.state_dict()

    def run(group):
        return step(shard(group, Head(), sharding=sharding), group.rank, 4)

    for result in simulate(run, 4):
        assert_same(result, step(Head()))


@shared_out(sharding=EVERY, inside=[False, True])
def test_checkpointing_composes_both_ways_round(sharding, inside):
    def blocks():
        rng = np.random.default_rng(5)
        return [Residual(Sequential(Linear(3, 3, dtype=np.float64, rng=rng), Dropout(0.5, rng=i))) for i in range(3)]

    def checkpointed():
        return Sequential(*map(Checkpoint, blocks()), Linear(3, 1, dtype=np.float64, rng=9))

    def run(group):
        model = checkpointed()
        states = model.generator_state_dict()
        is_unit = (lambda name, m: isinstance(m, Checkpoint)) if inside else (lambda name, m: isinstance(m, Residual))
        model = shard(group, model, sharding=sharding, units=is_unit)
        model.load_generator_state_dict(states)  # without it each rank draws other numbers
        x, target = batch(0)
        for _ in range(2):  # every rank has the same batch, and draws the same numbers
            model.zero_grad()
            backward(model, x, target)
        assert all(item.outstanding_uses == 0 for item in model.parameters())
        return gathered_grads(model)

    model = Sequential(*blocks(), Linear(3, 1, dtype=np.float64, rng=9))
    for _ in range(2):
        model.zero_grad()
        backward(model, *batch(0))
    for result in simulate(run, 4):
        assert_same(result, grads_of(model))


@pytest.mark.parametrize("sharding", EVERY)
def test_the_norm_is_that_of_one_process(sharding):
    def run(group):
        model = shard(group, sharding=sharding)
        one_by_one(model, group.rank, 4)
        norms = [model.clip_grad_norm(1e-2), clip_grad_norm(model.parameters(), 1e9)]
        with pytest.raises(ferro.UsageError, match="max_norm"):
            model.clip_grad_norm(0)
        return norms, gathered_grads(model)

    model = build()
    one_by_one(model, 0, 1)
    norm = clip_grad_norm(model.parameters(), 1e-2)
    for (before, after), grads in simulate(run, 4):
        np.testing.assert_allclose([before, after], [norm, 1e-2], rtol=1e-12)
        assert_same(grads, grads_of(model))


def test_gradients_may_be_assigned():
    def run(group):
        model = shard(group, Sequential(Scale(), Scale()))
        for parameter in model.parameters():
            parameter.grad = np.full(parameter.data.shape, 5.0)
        backward(model, np.ones(1), np.zeros(1))
        return gathered_grads(model)

    for result in simulate(run, 2):
        assert [grad.tolist() for grad in result.values()] == [[7.0], [7.0]]


@pytest.mark.parametrize("sharding", WITHOUT_REPLICAS)
def test_a_unit_may_be_used_by_itself(sharding):
    def run(group):
        model = shard(group, sharding=sharding)
        y, pullback = model.module.layers[0].vjp(batch(0)[0])
        pullback(np.ones_like(y))
        return gathered_grads(model)

    model = build()
    y, pullback = model.layers[0].vjp(batch(0)[0])
    pullback(np.ones_like(y))
    for result in simulate(run, 2):
        assert_same(result, grads_of(model))
