"""Losses that are means over fewer items than there are targets: microbatches and replicas count by these."""

import numpy as np
import pytest

import ferro
from ferro_strategies import DDP, FSDP, DeviceMesh
from ferro_strategies.nn import Linear, Sequential, cross_entropy
from ferro_strategies.pipeline import Pipeline

from .pipeline_models import (
    CLASSES,
    WORDS,
    alone,
    assert_equal,
    gradients,
    make_stages,
    make_tied_stages,
    share,
    simulate,
)

IGNORED = -100


def masked(scores, targets):
    """The mean over the targets that are kept, nan if there are none; and their number."""
    keep = targets != IGNORED
    grad = np.zeros_like(scores)
    if not keep.any():
        return float("nan"), grad * np.nan, 0
    loss, grad[keep] = cross_entropy(scores[keep], targets[keep])
    return loss, grad, keep.sum()


def masked_alone(scores, targets):
    return masked(scores, targets)[:2]


def masked_batch(rows, classes=CLASSES):
    rng = np.random.default_rng(1)
    inputs, targets = rng.integers(0, WORDS, (rows, 6)), rng.integers(0, classes, (rows, 6))
    for row, kept in enumerate(rng.permutation([0, 0, 0, 0, 1, 2, 6, 6, 5, 6, 6, 6])[:rows]):
        targets[row, kept:] = IGNORED
    return inputs, targets


@pytest.mark.parametrize("schedule", ["gpipe", "1f1b", "interleaved_1f1b", "zb_h1"])
def test_microbatches_count_by_the_weight_that_the_loss_returns(schedule):
    inputs, targets = masked_batch(rows=12)
    per_rank = 2 if schedule == "interleaved_1f1b" else 1
    expected = alone(make_stages(2 * per_rank), inputs, targets, masked_alone)
    for microbatches in (1, 2, 5, 12, 14):

        def run(group, microbatches=microbatches):
            stages = share(make_stages(2 * per_rank), group)
            pipeline = Pipeline(stages, group, schedule=schedule, microbatches=microbatches)
            loss = pipeline.step(inputs, targets, masked)
            once = gradients(pipeline)
            pipeline.step(inputs, targets, masked)  # adds to the gradients of the first step
            for name, grad in gradients(pipeline).items():
                np.testing.assert_allclose(grad, 2 * once[name], rtol=1e-11, atol=1e-15)
            return loss, once

        assert_equal(simulate(run, 2), expected, rtol=1e-11)


def test_a_batch_of_which_nothing_is_kept_has_no_gradient():
    inputs, _ = masked_batch(rows=4)

    def run(group):
        pipeline = Pipeline(share(make_stages(2), group), group, microbatches=2)
        loss = pipeline.step(inputs, np.full_like(inputs, IGNORED), masked)
        assert not any(grad.any() for grad in gradients(pipeline).values())
        return loss

    assert simulate(run, 2) == [0.0, 0.0]


def test_weights_may_be_no_counts():
    """Weighted classes: the mean is divided by the sum of the classes' weights, here above the number of targets."""
    inputs, targets = np.random.default_rng(0).integers(0, CLASSES, (2, 8, 3))
    class_weights = np.array([0.5, 3.0, 20.0, 4.0, 1.0])

    def weighted(scores, labels):
        shifted = np.exp(scores - scores.max(axis=-1, keepdims=True))
        softmax = shifted / shifted.sum(axis=-1, keepdims=True)
        each = class_weights[labels]
        one_hot = np.eye(CLASSES)[labels]
        loss = -(each * np.log((softmax * one_hot).sum(axis=-1))).sum() / each.sum()
        return loss, (softmax - one_hot) * each[..., None] / each.sum(), each.sum()

    expected = alone(make_stages(2), inputs, targets, lambda y, t: weighted(y, t)[:2])

    def run(group):
        pipeline = Pipeline(share(make_stages(2), group), group, microbatches=4)
        return pipeline.step(inputs, targets, weighted), gradients(pipeline)

    assert_equal(simulate(run, 2), expected, rtol=1e-11)


WRAPPERS = {
    "ddp": DDP,
    "fsdp": FSDP,
    "no_shard": lambda stage, group: FSDP(stage, group, sharding="no_shard"),
    "first stage only": lambda stage, group: DDP(stage, group) if len(stage.layers) == 3 else stage,
}


@pytest.mark.parametrize("wrap", WRAPPERS)
def test_replicas_count_by_their_weights(wrap):
    """Also a replica of which nothing is kept."""
    inputs, targets = masked_batch(rows=12)
    order = np.argsort((targets == IGNORED).sum(axis=1), kind="stable")[::-1]
    inputs, targets = inputs[order], targets[order]
    parts = [slice(0, 3), slice(3, 12)]
    assert (targets[parts[0]] == IGNORED).all()
    value, expected = alone(make_stages(2), inputs, targets, masked_alone)

    def run(world):
        mesh = DeviceMesh((2, 2), ("dp", "pp"), world)
        stage = WRAPPERS[wrap](make_stages(2)[mesh["pp"].rank], mesh["dp"])
        pipeline = Pipeline([stage], mesh["pp"], microbatches=3)
        part = parts[mesh["dp"].rank]
        losses = [pipeline.step(inputs[part], targets[part], masked) for _ in range(2)]
        assert losses[0] == pytest.approx(value, rel=1e-12)
        assert losses[1] == pytest.approx(losses[0], rel=1e-12)
        squares = sum(float((item.grad**2).sum()) for item in pipeline.parameters() if item.grad is not None)
        return squares if wrap != "first stage only" or mesh["pp"].rank == 0 else None

    results = simulate(run, 4)
    for stage in range(2):
        found = [results[stage], results[2 + stage]]
        norm = 4 * sum(float((grad**2).sum()) for name, grad in expected.items() if name.startswith(f"{stage}."))
        if wrap == "fsdp":
            assert sum(found) == pytest.approx(norm, rel=1e-11)
        elif found[0] is not None:
            assert found == pytest.approx([norm, norm], rel=1e-11)


def test_tied_copies_and_weights():
    inputs, targets = masked_batch(rows=9, classes=WORDS)
    expected = alone([Sequential(*make_tied_stages(3, tied=True))], inputs, targets, masked_alone)

    def run(group):
        ties = [{0: "weight", 2: "layers.0.weight"}]
        pipeline = Pipeline(share(make_tied_stages(3, tied=False), group), group, microbatches=3, ties=ties)
        pipeline.step(inputs, targets, masked)
        loss = pipeline.step(inputs, targets, masked)
        return loss, gradients(pipeline)

    first, _, last = simulate(run, 3)
    assert first[0] == pytest.approx(expected[0], rel=1e-12)
    table = 2 * expected[1]["0.layers.0.weight"]
    np.testing.assert_allclose(first[1]["0.weight"], table, rtol=1e-11, atol=1e-15)
    np.testing.assert_allclose(last[1]["2.layers.0.weight"], table, rtol=1e-11, atol=1e-15)


@pytest.mark.parametrize("dtype", [np.float16, np.float32])
def test_narrow_gradients_neither_overflow_nor_lose_their_weight(dtype):
    """A first microbatch with few kept targets, and others with many, whose gradients are near the largest float16."""
    x = np.ones((16, 1), dtype)
    kept = np.array([1] + [0] * 7 + [1] * 8)

    def loss(y, keep):
        count = int(keep.sum())
        return float(y[keep > 0].mean()), (30_000 * keep[:, None] / count).astype(dtype), count

    def run(group):
        pipeline = Pipeline([Linear(1, 1, dtype=dtype, rng=0)], group, microbatches=2)
        pipeline.step(x, kept, loss)
        return float([*pipeline.parameters()][1].grad[0])

    assert simulate(run, 2)[1] == pytest.approx(30_000, rel=2e-3)


FAULTS = {
    "returned the weight nan": lambda y, t: (0.0, np.zeros_like(y), np.nan),
    "returned the weight -1.0": lambda y, t: (0.0, np.zeros_like(y), -1),
    "returned a weight, .*, for one microbatch and none for another": lambda y, t: (
        (0.0, np.zeros_like(y), 1.0) if t[0, 0] == 0 else (0.0, np.zeros_like(y))
    ),
    r"must return \(loss, grad\).*it returned a tuple of 1\. A weight may follow": lambda y, t: (0.0,),
    r"it returned \(float, ndarray, str\)": lambda y, t: (0.0, np.zeros_like(y), "1 a"),
    "no gradient at negative labels, .*with_weight=True": masked_alone,
}


@pytest.mark.parametrize("message", FAULTS)
def test_a_loss_whose_weight_does_not_fit_is_refused(message):
    targets = np.array([[0], [IGNORED], [1], [2]])

    def run(group):
        pipeline = Pipeline([Linear(2, 3, dtype=np.float64, rng=0)], group, microbatches=2)
        with pytest.raises(ferro.FerroError, match=message):
            pipeline.step(np.ones((4, 1, 2)), targets, FAULTS[message])

    simulate(run, 1)


def test_negative_labels_are_no_fault_by_themselves():
    """They are if they have no gradient, and microbatches have different shares of them."""

    def run(group):
        x, targets = np.ones((4, 2)), np.array([[1], [-1], [1], [1]])
        pipeline = Pipeline([Linear(2, 1, dtype=np.float64, rng=0)], group, microbatches=2)
        pipeline.step(x, targets, lambda y, t: (0.0, y - t))
        even = np.array([0, IGNORED, IGNORED, 1])
        pipeline = Pipeline([Linear(2, 3, dtype=np.float64, rng=0)], group, microbatches=2)
        pipeline.step(x, even, masked_alone)

    simulate(run, 1)


@pytest.mark.parametrize("weighted", [False, True])
def test_metrics_are_averaged_like_the_loss_and_known_on_every_rank(weighted):
    inputs, targets = masked_batch(rows=8)

    def loss(y, labels):
        value, grad, count = masked(y, labels)
        right = {"right": np.float32((y.argmax(axis=-1) == labels).sum() / max(count, 1)), "value": value}
        return (value, grad, count, right) if weighted else (value if count else 0.0, grad, labels.size, right)

    def run(group):
        pipeline = Pipeline(share(make_stages(2), group), group, microbatches=3)
        assert pipeline.metrics == {}
        value, outputs = pipeline.step(inputs, targets, loss if weighted else unweighted, return_outputs=True)
        return value, outputs, pipeline.metrics

    def unweighted(y, labels):
        return float(y.mean()), np.full_like(y, 1 / y.size), {"mean": y.mean()}

    (value, none, metrics), (_, outputs, same) = simulate(run, 2)
    assert none is None
    assert metrics == same
    np.testing.assert_allclose(outputs, Sequential(*make_stages(2))(inputs), rtol=1e-12)
    if weighted:
        assert metrics["value"] == pytest.approx(value)
        assert metrics["right"] == pytest.approx((outputs.argmax(axis=-1) == targets).sum() / (targets >= 0).sum())
    else:
        assert metrics == pytest.approx({"mean": outputs.mean()})
        assert value == pytest.approx(outputs.mean())
