"""Pipelines between real processes over gloo."""

from __future__ import annotations

import os
import signal

import numpy as np
import pytest

import ferro
from ferro_strategies.nn import Sequential, cross_entropy
from ferro_strategies.optim import SGD
from ferro_strategies.pipeline import Pipeline
from ferro_testing import run_ranks, run_ranks_outcomes

from .pipeline_models import Trap, batch, failing, gradients, make_stages, share

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


def repeat(group):
    """Train with repeated messages and without, fail in a stage, and then lose a rank."""
    found = []
    for repeats in (False, True):
        pipeline = Pipeline(
            share(make_stages(2 * group.world_size), group), group, schedule="interleaved_1f1b", microbatches=6
        )
        channels = pipeline._runner._channels.values()
        for channel in channels:
            channel.may_repeat = repeats
        # The arrays of 4000 rows are read where they are, those of 7 rows go through the slots of a channel.
        losses = [
            pipeline.step(*batch(rows, seed), cross_entropy)
            for seed, rows in enumerate([7, 7, 7, 7, 5, 9, 4000, 4000, 4000, 4000, 3900, 7])
        ]
        found.append([losses, gradients(pipeline)])
        sizes = {0 if channel.repeated is None else channel.repeated.nbytes > 64 << 10 for channel in channels}
        assert sizes == {repeats}

    stages = share(make_stages(2 * group.world_size), group)
    if group.rank == 1:
        stages[1] = Trap(stages[1], "backward", 26)
    trapped = Pipeline(stages, group, schedule="1f1b", microbatches=6)

    def train():
        for _ in range(5):
            trapped.step(*batch(12), cross_entropy)

    error = failing(train)
    for _ in range(3):
        pipeline.step(*batch(8), cross_entropy)
    if group.rank == 2:
        os.kill(os.getpid(), signal.SIGKILL)
    lost = failing(lambda: pipeline.step(*batch(8), cross_entropy))
    return found, f"{error} {getattr(error, '__notes__', '')}", [isinstance(lost, ferro.PeerLost), lost.peer]


def test_repeated_messages_change_no_result_and_no_error():
    *outcomes, killed = run_ranks_outcomes(repeat, 3, backend="gloo")
    assert not killed.ok
    for outcome in outcomes:
        (ordinary, repeated), message, lost = outcome.result
        assert repeated[0] == ordinary[0]
        for name, grad in ordinary[1].items():
            np.testing.assert_array_equal(repeated[1][name], grad, err_msg=name)
        assert "the backward pass of stage 4, microbatch 2" in message
        assert lost == [True, 2]
