"""The mean loss over all items of all ranks and microbatches, and its gradient."""

import numpy as np
import pytest

import ferro
from ferro_strategies import DDP, FSDP, DeviceMesh, GlobalLoss, global_mean
from ferro_strategies.nn import Linear, Sequential, cross_entropy

CLASSES = 4
KEPT = [3, 1, 0, 6, 2, 0]  # of each row of six


def model(dtype=np.float64):
    return Sequential(Linear(5, 5, dtype=dtype, rng=0), Linear(5, CLASSES, dtype=dtype, rng=1))


def data():
    rng = np.random.default_rng(0)
    x, labels = rng.standard_normal((6, 6, 5)), rng.integers(0, CLASSES, (6, 6))
    for row, kept in enumerate(KEPT):
        labels[row, kept:] = -100
    return x, labels


def masked(scores, labels):
    keep = labels >= 0
    grad = np.zeros_like(scores)
    if not keep.any():
        return np.nan, grad * np.nan, 0
    loss, grad[keep] = cross_entropy(scores[keep], labels[keep])
    return loss, grad, keep.sum()


def expected():
    net, (x, labels) = model(), data()
    y, pullback = net.vjp(x)
    loss, grad, _ = masked(y, labels)
    pullback(grad)
    return loss, [item.grad for item in net.parameters()]


def whole_gradients(net, group):
    if isinstance(net, FSDP):
        flat = [np.concatenate(group.all_gather_object(item.grad.ravel())) for item in net.parameters()]
        return [grad.reshape(like.data.shape) for grad, like in zip(flat, model().parameters(), strict=True)]
    return [item.grad for item in net.parameters()]


@pytest.mark.parametrize("wrap", [DDP, FSDP])
@pytest.mark.parametrize("ranks", [1, 2, 3])
def test_one_batch_on_each_rank(wrap, ranks):
    x, labels = data()
    loss, grads = expected()

    def run(group):
        net = wrap(model(), group)
        part = slice(group.rank * 6 // ranks, (group.rank + 1) * 6 // ranks)
        y, pullback = net.vjp(x[part])
        value, grad = global_mean(net, *masked(y, labels[part]))
        pullback(grad)
        return value, whole_gradients(net, group)

    for value, found in ferro.simulate(run, ranks, timeout_s=10):
        assert value == pytest.approx(loss, rel=1e-12)
        for one, other in zip(found, grads, strict=True):
            np.testing.assert_allclose(one, other, rtol=1e-11, atol=1e-15)


@pytest.mark.parametrize("wrap", [DDP, FSDP, lambda net, group: Sequential(DDP(net, group))])
@pytest.mark.parametrize("ranks", [1, 2])
def test_several_microbatches(wrap, ranks):
    x, labels = data()
    loss, grads = expected()

    def run(group):
        net = wrap(model(), group)
        inner = net if hasattr(net, "no_sync") else net.layers[0]
        rows = range(group.rank, 6, ranks)
        step = GlobalLoss(net, (labels[group.rank :: ranks] >= 0).sum())
        for row in rows:
            with inner.no_sync():
                y, pullback = net.vjp(x[row])
            pullback(step.gradient(*masked(y, labels[row])))
        inner.sync_gradients()
        assert step.total == sum(KEPT)
        return step.mean(), whole_gradients(net, group)

    for value, found in ferro.simulate(run, ranks, timeout_s=10):
        assert value == pytest.approx(loss, rel=1e-12)
        for one, other in zip(found, grads, strict=True):
            np.testing.assert_allclose(one, other, rtol=1e-11, atol=1e-15)


def test_hybrid_shards_and_no_group():
    x, labels = data()
    loss, grads = expected()

    def hybrid(group):
        mesh = DeviceMesh((2, 2), ("r", "s"), group)
        net = FSDP(model(), mesh["s"], sharding="hybrid_shard", replicas=mesh["r"])
        y, pullback = net.vjp(x[group.rank :: 4])
        value, grad = global_mean(net, *masked(y, labels[group.rank :: 4]))
        pullback(grad)
        return value, sum(float((item.grad**2).sum()) for item in net.parameters())

    results = ferro.simulate(hybrid, 4, timeout_s=10)
    assert [value for value, _ in results] == pytest.approx([loss] * 4)
    squares = sum(float((grad**2).sum()) for grad in grads)
    assert results[0][1] + results[1][1] == pytest.approx(squares, rel=1e-11)

    net = model()
    step = GlobalLoss(net, (labels >= 0).sum())
    for row in range(6):
        y, pullback = net.vjp(x[row])
        pullback(step.gradient(*masked(y, labels[row])))
    assert step.mean() == pytest.approx(loss, rel=1e-12)
    for item, grad in zip(net.parameters(), grads, strict=True):
        np.testing.assert_allclose(item.grad, grad, rtol=1e-11, atol=1e-15)


def test_half_precision_is_rounded_once_and_trees_are_scaled():
    grads = {"a": np.full(3, 3.0, np.float16), "b": None, "c": (np.full(2, 5.0, np.float16),)}

    def run(group):
        _, found = global_mean(group, 1.0, grads, 3 - group.rank)
        return found

    first, second, third = ferro.simulate(run, 3, timeout_s=10)
    for found, share in ((first, 3 / 6), (second, 2 / 6), (third, 1 / 6)):
        assert found["b"] is None
        assert found["a"].dtype == np.float16
        np.testing.assert_array_equal(found["a"], np.full(3, 3.0 * 3 * share).astype(np.float16))
        np.testing.assert_array_equal(found["c"][0], np.full(2, 5.0 * 3 * share).astype(np.float16))


def test_wrong_weights_are_told_on_every_rank():
    def run(group):
        told = []
        for weight in (np.nan, -1.0):
            with pytest.raises(ferro.UsageError, match="from 0 on, on every rank"):
                GlobalLoss(group, weight if group.rank else 1.0)
            with pytest.raises(ferro.UsageError, match="from 0 on, on every rank"):
                global_mean(group, 1.0, np.ones(1), weight if group.rank else 1.0)
        step = GlobalLoss(group, 2.0)
        step.gradient(1.0, np.ones(1), 2.0 - group.rank)
        with pytest.raises(ferro.UsageError, match=r"do not add up .* on this rank they are") as caught:
            step.mean()
        told.append(str(caught.value))
        with pytest.raises(ferro.UsageError, match=r"expected a module or a process group, .* got a int"):
            GlobalLoss(3, 1.0)
        return told

    assert "1 of 2" in ferro.simulate(run, 2, timeout_s=10)[1][0]


def test_nothing_at_all_has_loss_zero():
    def run(group):
        step = GlobalLoss(group, 0)
        grad = step.gradient(np.nan, np.full(2, np.nan), 0)
        value, same = global_mean(group, np.nan, np.full(2, np.nan), 0)
        return step.mean(), value, grad.tolist(), same.tolist()

    assert ferro.simulate(run, 2, timeout_s=10) == [(0.0, 0.0, [0.0, 0.0], [0.0, 0.0])] * 2
