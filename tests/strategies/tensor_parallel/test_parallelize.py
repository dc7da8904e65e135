"""Layers are replaced by name, and tied weights stay tied."""

from functools import partial

import numpy as np
import pytest

from ferro_strategies import nn
from ferro_strategies import tensor_parallel as tp

from .models import F64, RANKS, simulate


class TiedHead(nn.Module):
    """Scores by the rows of a table, in one process."""

    def __init__(self, weight):
        self.weight = weight

    def vjp(self, x):
        weight = self.weight.use()
        rows = x.reshape(-1, x.shape[-1])

        def pullback(grad_y):
            grad = grad_y.reshape(len(rows), -1)
            weight.add_grad_product(grad.T, rows)
            return (grad @ weight.data).reshape(x.shape)

        return (rows @ weight.data.T).reshape(*x.shape[:-1], -1), pullback


@RANKS
@pytest.mark.parametrize("sequence_parallel", [False, True])
@pytest.mark.parametrize("deferred", [False, True])
def test_embedding_and_unembedding_share_one_table(ranks, sequence_parallel, deferred):
    indices = np.random.default_rng(1).integers(0, 7, (2, 5))
    labels = indices[:, ::-1]

    def step(model, loss_of):
        scores, pullback = model.vjp(indices)
        loss, grad = loss_of(scores, labels)
        if not deferred:
            pullback(grad)
            return loss
        with nn.deferring(model.parameters()) as products:
            pullback(grad)
        for product in products:
            product()
        return loss

    def run(group):
        option = {"sequence_parallel": sequence_parallel}
        table = tp.ParallelEmbedding(7, 4, group, dtype=F64, rng=0, **option)
        model = nn.Sequential(table, tp.ParallelUnembedding(table, **option))
        loss = step(model, partial(tp.vocab_parallel_cross_entropy, group=group))
        assert list(model.state_dict()) == ["layers.0.weight"]
        return loss, tp.full_state_dict(table, {"weight": table.weight.grad})["weight"]

    table = nn.Embedding(7, 4, dtype=F64, rng=0)
    expected = step(nn.Sequential(table, TiedHead(table.weight)), nn.cross_entropy)
    for loss, grad in simulate(run, ranks):
        assert loss == pytest.approx(expected, rel=1e-12)
        np.testing.assert_allclose(grad, table.weight.grad, rtol=1e-12, atol=1e-15)


@RANKS
@pytest.mark.parametrize("sequence_parallel", [False, True])
def test_tied_layers_share_the_sharded_table(ranks, sequence_parallel):
    indices = np.random.default_rng(1).integers(0, 7, (2, 5))

    def serial():
        table = nn.Embedding(7, 4, dtype=F64, rng=0)
        return nn.Sequential(table, nn.Unembedding(table))

    def run(group):
        option = {"sequence_parallel": sequence_parallel}
        plan = {
            "layers.0": partial(tp.ParallelEmbedding.from_serial, **option),
            "layers.1": partial(tp.ParallelUnembedding.from_serial, **option),
        }
        model = tp.parallelize(serial(), group, plan)
        assert model.layers[1].weight is model.layers[0].weight
        scores, pullback = model.vjp(indices)
        loss, grad = tp.vocab_parallel_cross_entropy(scores, indices, group)
        pullback(grad)
        [(name, parameter)] = model.named_parameters()
        return loss, tp.full_state_dict(model, {name: parameter.grad})[name]

    expected = serial()
    scores, pullback = expected.vjp(indices)
    loss, grad = nn.cross_entropy(scores, indices)
    pullback(grad)
    for my_loss, my_grad in simulate(run, ranks):
        assert my_loss == pytest.approx(loss, rel=1e-12)
        np.testing.assert_allclose(my_grad, expected.layers[0].weight.grad, rtol=1e-12, atol=1e-15)


def test_a_layer_within_a_checkpoint_is_replaced_by_its_name():
    def run(group):
        model = nn.Sequential(nn.Checkpoint(nn.Linear(4, 4, rng=0)))
        tp.parallelize(model, group, {"layers.0": tp.ColumnParallelLinear.from_serial})
        return type(model.layers[0]), type(model.layers[0].module)

    assert simulate(run, 2) == [(nn.Checkpoint, tp.ColumnParallelLinear)] * 2
