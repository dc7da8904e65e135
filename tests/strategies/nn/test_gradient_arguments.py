"""Wrong arguments of modules and pullbacks: a loss, another shape, arrays that mean more than their numbers."""

import numpy as np
import pytest

import ferro
from ferro import UsageError
from ferro_strategies import DDP, FSDP, Pipeline, SyncBatchNorm2d, nn
from ferro_strategies import tensor_parallel as tp

X = np.ones((4, 6), np.float32)
IMAGE = np.ones((2, 3, 4, 4), np.float32)
INDICES = np.array([[0, 1], [1, 1]])
SEQUENCE = np.ones((2, 4, 6), np.float32)

MODULES = {
    "Linear": (lambda g: nn.Linear(6, 2), X),
    "ReLU": (lambda g: nn.ReLU(), X),
    "GELU": (lambda g: nn.GELU(), X),
    "Flatten": (lambda g: nn.Flatten(), IMAGE),
    "Dropout": (lambda g: nn.Dropout(), X),
    "Dropout in evaluation": (lambda g: nn.Dropout().eval(), X),
    "BatchNorm": (lambda g: nn.BatchNorm(6), X),
    "LayerNorm": (lambda g: nn.LayerNorm(6), X),
    "Conv2d": (lambda g: nn.Conv2d(3, 2, 3), IMAGE),
    "MaxPool2d": (lambda g: nn.MaxPool2d(2), IMAGE),
    "Embedding": (lambda g: nn.Embedding(2, 3), INDICES),
    "Unembedding": (lambda g: nn.Unembedding(nn.Embedding(5, 6)), X),
    "Attention": (lambda g: nn.Attention(6, 2), SEQUENCE),
    "Checkpoint": (lambda g: nn.Checkpoint(nn.Linear(6, 2)), X),
    "Residual": (lambda g: nn.Residual(nn.Linear(6, 6)), X),
    "Sequential": (lambda g: nn.Sequential(nn.Linear(6, 6), nn.ReLU()), X),
    "DDP": (lambda g: DDP(nn.Linear(6, 2), g), X),
    "FSDP": (lambda g: FSDP(nn.Sequential(nn.Linear(6, 2)), g), X),
    "SyncBatchNorm2d": (lambda g: SyncBatchNorm2d(3, g), IMAGE),
    "ColumnParallelLinear": (lambda g: tp.ColumnParallelLinear(6, 2, g), X),
    "ColumnParallelLinear, gathered": (lambda g: tp.ColumnParallelLinear(6, 2, g, gather_output=True), X),
    "RowParallelLinear": (lambda g: tp.RowParallelLinear(6, 2, g), X),
    "ParallelEmbedding": (lambda g: tp.ParallelEmbedding(2, 3, g), INDICES),
    "ParallelAttention": (lambda g: tp.ParallelAttention(6, 2, g), SEQUENCE),
    "CopyIn": (lambda g: tp.CopyIn(g), X),
    "ReduceOut": (lambda g: tp.ReduceOut(g), X),
    "GatherIn": (lambda g: tp.GatherIn(g), SEQUENCE),
}


@pytest.mark.parametrize(("make", "x"), MODULES.values(), ids=MODULES)
def test_a_pullback_refuses_all_but_the_gradient_of_its_output(make, x):
    def work(group):
        module = make(group)
        y, pullback = module.vjp(x)
        words = rf"pullback takes the gradient of the output, an array of shape \({y.shape[0]}, .*; "
        words += r"nn.cross_entropy returns \(loss, grad\). It got "
        for wrong, found in [
            (0.5, "a float"),
            (np.float32(0.5), "a float32"),
            ((0.5, np.ones_like(y)), "a tuple"),
            (None, "a NoneType"),
            (np.ones((7, *y.shape), np.float32), "an array of shape"),
            (np.ma.array(np.ones_like(y), mask=True), "a MaskedArray"),
        ]:
            with pytest.raises(UsageError, match=words + found):
                pullback(wrong)
        assert all(parameter.grad is None for parameter in module.parameters())
        pullback(np.ones_like(y))  # the pullback was not used up

    ferro.simulate(work, 1)


def test_a_pipeline_says_what_its_loss_must_return():
    def work(group):
        with pytest.raises(
            UsageError, match=r"must return \(loss, grad\), as nn.cross_entropy does; it returned a float"
        ):
            Pipeline([nn.Linear(6, 2)], group, microbatches=1).step(X, X[:, :2], lambda y, target: 0.5)
        with pytest.raises(UsageError, match="the loss function: pullback takes the gradient"):
            Pipeline([nn.Linear(6, 2)], group, microbatches=1).step(X, X[:, :2], lambda y, target: (0.5, 0.5))

    ferro.simulate(work, 1)


@pytest.mark.parametrize("wrong", [np.ma.array(X, mask=X > 2), X.view(np.matrix)], ids=["masked", "matrix"])
def test_arrays_that_mean_more_than_their_numbers_are_no_inputs(wrong):
    for module in (
        nn.Linear(6, 2),
        nn.ReLU(),
        nn.GELU(),
        nn.LayerNorm(6),
        nn.BatchNorm(6),
        nn.Dropout().eval(),
        nn.Flatten(),
    ):
        with pytest.raises(UsageError, match="expected a plain array, got a"):
            module.vjp(wrong)
    for x, target in ((wrong, X), (X, wrong)):
        with pytest.raises(UsageError, match="expected a plain array, got a"):
            nn.mse_loss(x, target)
    with pytest.raises(UsageError, match="expected a plain array, got a"):
        nn.cross_entropy(X, np.ma.array([0, 1, 0, 1], mask=[0, 0, 1, 0]))
    with pytest.raises(UsageError, match="expected a plain array, got a"):
        nn.Parameter(wrong)


def test_an_infinite_gradient_passes_only_where_there_is_a_way():
    infinite = np.array([np.inf, np.inf, np.nan, 1.0])
    np.testing.assert_array_equal(nn.ReLU().vjp(np.array([-1.0, 1.0, 0.0, np.nan]))[1](infinite), [0, np.inf, 0, 1])
    pooled = nn.MaxPool2d(2).vjp(np.arange(4.0).reshape(1, 1, 2, 2))[1](np.full((1, 1, 1, 1), np.inf))
    np.testing.assert_array_equal(pooled.ravel(), [0, 0, 0, np.inf])
    dropout = nn.Dropout(0.5, rng=0)
    y, pullback = dropout.vjp(np.full(100, np.inf))
    assert set(y.tolist()) == set(pullback(np.full(100, np.inf)).tolist()) == {0.0, np.inf}
