"""Tensor and sequence parallel: a transformer equal to the serial one, gradient by gradient.

Vocabulary, hidden size, heads and sequences do not divide by 3 and 4 ranks: shards are uneven.
The real-process tests run the same functions over gloo.
"""

from __future__ import annotations

from functools import partial

import numpy as np
import pytest

import ferro
from ferro_strategies import nn, optim
from ferro_strategies import tensor_parallel as tp
from ferro_testing import run_ranks

VOCABULARY, DIM, HEADS, HIDDEN = 11, 12, 4, 22
RANKS = pytest.mark.parametrize("ranks", [1, 2, 3, 4])
SEQUENCE_PARALLEL = pytest.mark.parametrize("sequence_parallel", [False, True])


def serial_model(*, checkpoint=False):
    rng = np.random.default_rng(3)
    wide = {"dtype": np.float64, "rng": rng}
    wrap = nn.Checkpoint if checkpoint else lambda module: module
    model = nn.Sequential(
        nn.Embedding(VOCABULARY, DIM, **wide),
        nn.Residual(wrap(nn.Sequential(nn.LayerNorm(DIM, dtype=np.float64), nn.Attention(DIM, HEADS, **wide)))),
        nn.Residual(
            wrap(
                nn.Sequential(
                    nn.LayerNorm(DIM, dtype=np.float64),
                    nn.Linear(DIM, HIDDEN, **wide),
                    nn.GELU(),
                    nn.Linear(HIDDEN, DIM, **wide),
                )
            )
        ),
        nn.LayerNorm(DIM, dtype=np.float64),
        nn.Linear(DIM, VOCABULARY, **wide),
    )
    for parameter in model.parameters():
        parameter.data += 0.1 * rng.standard_normal(parameter.data.shape)
    return model


def parallel_model(group, *, sequence_parallel=False, checkpoint=False):
    option = {"sequence_parallel": sequence_parallel}
    column = partial(tp.ColumnParallelLinear.from_serial, **option)
    plan = {
        "layers.0": partial(tp.ParallelEmbedding.from_serial, **option),
        "layers.1.module.layers.1": partial(tp.ParallelAttention.from_serial, **option),
        "layers.2.module.layers.1": column,
        "layers.2.module.layers.3": partial(tp.RowParallelLinear.from_serial, **option),
        "layers.4": column,
    }
    if sequence_parallel:
        norm = tp.SequenceParallelLayerNorm.from_serial
        plan |= {"layers.[12].module.layers.0": norm, "layers.3": norm}
    return tp.parallelize(serial_model(checkpoint=checkpoint), group, plan)


def batch(length=5, seed=0, count=2):
    rng = np.random.default_rng(seed)
    shape = (count, length)
    return rng.integers(0, VOCABULARY, shape), rng.integers(0, VOCABULARY, shape)


def gradients(model):
    return {name: parameter.grad for name, parameter in model.named_parameters()}


def assert_close(mine, theirs):
    assert list(mine) == list(theirs)
    # Relative to the largest, for the gradient of a key's bias is zero but for rounding: it
    # shifts all scores of a row alike.
    atol = 1e-12 * max(float(np.abs(value).max(initial=0)) for value in theirs.values())
    for name, value in theirs.items():
        np.testing.assert_allclose(mine[name], value, rtol=1e-12, atol=atol, err_msg=name)


def pass_of(group, length, sequence_parallel, checkpoint, count):
    """Run one pass; return all logits, loss, full gradients, and those of unsharded parameters."""
    model = parallel_model(group, sequence_parallel=sequence_parallel, checkpoint=checkpoint)
    indices, labels = batch(length, count=count)
    logits, pullback = model.vjp(indices)
    whole, _ = tp.GatherOut(group, dim=-1).vjp(logits)
    loss, grad = tp.vocab_parallel_cross_entropy(logits, labels, group)
    assert pullback(grad) is None
    own = gradients(model)
    shared = [own[name] for name, item in model.named_parameters() if not item.splits]
    return whole, loss, tp.full_state_dict(model, own), shared


def serial_pass(length=5, count=2):
    model = serial_model()
    indices, labels = batch(length, count=count)
    logits, pullback = model.vjp(indices)
    loss, grad = nn.cross_entropy(logits, labels)
    pullback(grad)
    return logits, loss, gradients(model)


def check_pass(results, length=5, count=2):
    logits, loss, grads = serial_pass(length, count)
    for mine, my_loss, my_grads, shared in results:
        np.testing.assert_allclose(mine, logits, rtol=1e-12, atol=1e-12)
        assert my_loss == pytest.approx(loss, rel=1e-12)
        assert my_loss == results[0][1]
        assert_close(my_grads, grads)
        for ours, theirs in zip(shared, results[0][3], strict=True):
            np.testing.assert_array_equal(ours, theirs)


@RANKS
@SEQUENCE_PARALLEL
@pytest.mark.parametrize("checkpoint", [False, True])
def test_output_loss_and_every_gradient_equal_the_serial_ones(ranks, sequence_parallel, checkpoint):
    def run(group):
        return pass_of(group, 5, sequence_parallel, checkpoint, 2)

    check_pass(ferro.simulate(run, ranks, timeout_s=20))


@SEQUENCE_PARALLEL
@pytest.mark.parametrize(("length", "count"), [(1, 2), (3, 1)])
def test_ranks_may_have_no_position(sequence_parallel, length, count):
    def run(group):
        return pass_of(group, length, sequence_parallel, False, count)

    check_pass(ferro.simulate(run, 4, timeout_s=20), length, count)


@SEQUENCE_PARALLEL
def test_an_empty_batch_has_no_gradient(sequence_parallel):
    def run(group):
        return pass_of(group, 5, sequence_parallel, False, 0)

    for logits, loss, grads, _ in ferro.simulate(run, 2, timeout_s=20):
        assert (logits.shape, loss) == ((0, 5, VOCABULARY), 0.0)
        assert not any(grad.any() for grad in grads.values())


def train(model, loss_of, steps=4):
    """Train; return the losses and the gradients' norms."""
    optimizer, numbers = optim.AdamW(model.parameters(), lr=1e-2), []
    for step in range(steps):
        indices, labels = batch(seed=step)
        logits, pullback = model.vjp(indices)
        loss, grad = loss_of(logits, labels)
        pullback(grad)
        numbers += [loss, optim.clip_grad_norm(model.parameters(), 0.5)]
        optimizer.step()
        optimizer.zero_grad()
    return numbers


def train_parallel(group, sequence_parallel):
    model = parallel_model(group, sequence_parallel=sequence_parallel)
    loss_of = partial(tp.vocab_parallel_cross_entropy, group=group)
    numbers = train(model, loss_of)
    return numbers, tp.full_state_dict(model)


def check_training(results):
    model = serial_model()
    expected = train(model, nn.cross_entropy)
    assert min(expected[1::2]) > 0.5, "nothing is clipped"
    for numbers, state in results:
        np.testing.assert_allclose(numbers, expected, rtol=1e-10)
        for name, value in model.state_dict().items():
            np.testing.assert_allclose(state[name], value, rtol=1e-8, atol=1e-10, err_msg=name)


@RANKS
@SEQUENCE_PARALLEL
def test_training_equals_the_serial_one(ranks, sequence_parallel):
    def run(group):
        return train_parallel(group, sequence_parallel)

    check_training(ferro.simulate(run, ranks, timeout_s=20))


def test_microbatches_accumulate_and_products_can_be_deferred():
    def run(group):
        model = parallel_model(group, sequence_parallel=True)
        pulls = []
        for seed in range(3):
            logits, pullback = model.vjp(batch(seed=seed)[0])
            _, grad = tp.vocab_parallel_cross_entropy(logits, batch(seed=seed)[1], group)
            pulls.append(partial(pullback, grad))
        with nn.deferring(model.parameters()) as products:
            for pull in pulls:
                pull()
        # Six matrices and three microbatches; embedding, norms and biases are added at once.
        assert len(products) == 7 * 3
        assert [p.outstanding_uses for p in model.parameters()].count(3) == 7
        for product in products:
            product()
        return tp.full_state_dict(model, gradients(model))

    model = serial_model()
    for seed in range(3):
        logits, pullback = model.vjp(batch(seed=seed)[0])
        pullback(nn.cross_entropy(logits, batch(seed=seed)[1])[1])
    for grads in ferro.simulate(run, 2, timeout_s=20):
        assert_close(grads, gradients(model))


@SEQUENCE_PARALLEL
def test_states_convert_either_way(sequence_parallel):
    changed = serial_model()
    for parameter in changed.parameters():
        parameter.data += 1

    def run(group):
        model = parallel_model(group, sequence_parallel=sequence_parallel)
        first = tp.full_state_dict(model)
        tp.load_full_state_dict(model, changed.state_dict())
        return first, tp.full_state_dict(model), [p.data.shape for p in model.parameters()]

    results = ferro.simulate(run, 3, timeout_s=20)
    for first, second, _ in results:
        for state, model in ((first, serial_model()), (second, changed)):
            assert list(state) == list(model.state_dict())
            model.load_state_dict(state)
            for name, value in model.state_dict().items():
                np.testing.assert_array_equal(state[name], value, err_msg=name)
    held = [sum(int(np.prod(shape)) for shape in shapes) for _, _, shapes in results]
    assert max(held) < sum(p.data.size for p in changed.parameters()) / 2


@pytest.mark.parametrize("ranks", [2, 3])
def test_passes_over_gloo_equal_the_serial_one(ranks):
    check_pass(run_ranks(pass_of, ranks, backend="gloo", args=(5, True, True, 2)))


def test_training_over_gloo_equals_the_serial_one():
    check_training(run_ranks(train_parallel, 2, backend="gloo", args=(False,)))
