"""Pipelines between real processes over gloo."""

from __future__ import annotations

import numpy as np
import pytest

from ferro_strategies.nn import Sequential, cross_entropy
from ferro_strategies.optim import SGD
from ferro_strategies.pipeline import Pipeline
from ferro_testing import run_ranks

from .pipeline_models import batch, make_stages, share

STEPS = 3


def train(group):
    pipeline = Pipeline(
        share(make_stages(2 * group.world_size), group),
        group,
        schedule="interleaved_1f1b" if group.world_size == 2 else "zb_h1",
        microbatches=4,
    )
    optimizer = SGD(pipeline.parameters(), lr=0.1)
    losses = []
    for seed in range(STEPS):
        losses.append(pipeline.step(*batch(rows=10, seed=seed), cross_entropy))
        optimizer.step()
        optimizer.zero_grad()
    return losses, pipeline.forward(batch(rows=10)[0], microbatches=2)


def fail(group):
    pipeline = Pipeline(share(make_stages(2), group), group, microbatches=4)
    inputs, targets = batch(rows=8)
    inputs[4] = 99  # no such word: stage 0 raises at microbatch 2
    try:
        pipeline.step(inputs, targets, cross_entropy)
    except Exception as error:  # noqa: BLE001 - whatever it is, it is told to the test
        return f"{error} {getattr(error, '__notes__', '')}"
    return "nothing"


@pytest.mark.parametrize("ranks", [2, 3])
def test_ranks_train_like_one_process(ranks):
    model = Sequential(*make_stages(2 * ranks))
    optimizer = SGD(model.parameters(), lr=0.1)
    expected = []
    for seed in range(STEPS):
        x, labels = batch(rows=10, seed=seed)
        y, pullback = model.vjp(x)
        loss, grad = cross_entropy(y, labels)
        pullback(grad)
        optimizer.step()
        optimizer.zero_grad()
        expected.append(loss)
    results = run_ranks(train, ranks, backend="gloo")
    for losses, _ in results:
        np.testing.assert_allclose(losses, expected, rtol=1e-11)
    np.testing.assert_allclose(results[-1][1], model(batch(rows=10)[0]), rtol=1e-9)


def test_both_ranks_learn_what_failed_where():
    for message in run_ranks(fail, 2, backend="gloo"):
        assert "the forward pass of stage 0, microbatch 2" in message
