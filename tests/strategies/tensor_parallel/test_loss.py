"""The loss of logits whose columns are divided over the ranks."""

import tracemalloc

import numpy as np
import pytest

from ferro_strategies import nn
from ferro_strategies import tensor_parallel as tp

from .models import F64, RANKS, Traffic, floats, simulate


@RANKS
@pytest.mark.parametrize(("dtype", "size", "rtol"), [(F64, 1.0, 1e-12), (F64, 1e4, 1e-12), (np.float32, 3.0, 1e-5)])
@pytest.mark.parametrize("shape", [(6, 7), (2, 3, 7), (7,)])
def test_the_loss_is_that_of_all_logits(ranks, dtype, size, rtol, shape):
    logits = (size * floats(*shape)).astype(dtype)
    labels = np.random.default_rng(1).integers(0, 7, shape[:-1]).astype(np.uint8)
    expected, expected_grad = nn.cross_entropy(logits, labels)
    kept = logits.copy()

    def run(group):
        own = np.array_split(logits, group.world_size, axis=-1)[group.rank]
        return tp.vocab_parallel_cross_entropy(own, labels, group)

    results = simulate(run, ranks)
    grads = np.concatenate([grad for _, grad in results], axis=-1)
    assert grads.dtype == dtype
    np.testing.assert_allclose(grads, expected_grad, rtol=rtol, atol=rtol * 1e-2)
    assert {loss for loss, _ in results} == {results[0][0]}
    assert results[0][0] == pytest.approx(expected, rel=rtol)
    np.testing.assert_array_equal(logits, kept)


def test_small_integers_may_name_words_of_any_rank():
    # Rank 1's words begin at 500, beyond what these dtypes can hold.
    words = np.array([1, 120, 2], np.int8)
    table = nn.Embedding(1000, 2, dtype=F64, rng=0)
    logits = floats(3, 1000)

    def run(group):
        found = tp.ParallelEmbedding.from_serial(table, group)(words.astype(np.uint8))
        own = np.split(logits, 2, axis=1)[group.rank]
        return found, tp.vocab_parallel_cross_entropy(own, words, group)[0]

    for found, loss in simulate(run, 2):
        np.testing.assert_array_equal(found, table(words))
        assert loss == pytest.approx(nn.cross_entropy(logits, words)[0], rel=1e-12)


def test_the_loss_of_gathered_sequences_makes_one_array_laid_out_as_they_are():
    def run(group):
        # Time first, as a layer with sequence_parallel makes them.
        logits = np.zeros((64, 4, 2000), np.float32).swapaxes(0, 1)
        labels = np.zeros((4, 64), np.int64)
        tracemalloc.start()
        _, grad = tp.vocab_parallel_cross_entropy(logits, labels, group)
        peak = tracemalloc.get_traced_memory()[1]
        tracemalloc.stop()
        assert grad.strides == logits.strides
        return peak / logits.nbytes

    assert simulate(run, 1)[0] < 1.2


def test_the_loss_gathers_no_logits():
    traffic, rows, classes = Traffic(), 8, 1000

    def run(group):
        labels = np.zeros(rows, np.int64)
        tp.vocab_parallel_cross_entropy(np.ones((rows, classes)), labels, group)

    simulate(run, 2, observers=[traffic])
    assert traffic.largest <= 2 * rows * 8


@RANKS
def test_labels_that_do_not_count_smoothing_and_weights_of_classes(ranks):
    logits = 3 * floats(2, 5, 7)
    labels = np.random.default_rng(1).integers(0, 7, (2, 5))
    labels[0, 1:3] = labels[1, 4] = -100
    weights = np.linspace(0.5, 2.0, 7)
    cases = [
        (labels, {"ignore_index": -100}),
        (labels, {"ignore_index": -100, "label_smoothing": 0.2}),
        ((labels % 7).tolist(), {"ignore_index": 3, "label_smoothing": 0.1}),
        (np.full_like(labels, -100), {"ignore_index": -100, "label_smoothing": 0.1}),
        (labels % 7, {"label_smoothing": 1.0}),
        (labels, {"ignore_index": -100, "weight": weights}),
        (labels, {"ignore_index": -100, "weight": weights, "label_smoothing": 0.3}),
    ]

    def run(group):
        own = np.array_split(logits, group.world_size, axis=-1)[group.rank]
        return [
            tp.vocab_parallel_cross_entropy(own, case, group, with_weight=True, **options) for case, options in cases
        ]

    for found, (case, options) in zip(zip(*simulate(run, ranks), strict=True), cases, strict=True):
        loss, grad, weight = nn.cross_entropy(logits, case, with_weight=True, **options)
        np.testing.assert_allclose(np.concatenate([part[1] for part in found], axis=-1), grad, rtol=1e-12, atol=1e-14)
        for part in found:
            assert (part[0], part[2]) == (pytest.approx(loss, rel=1e-12), pytest.approx(weight, rel=1e-12))


def test_infinite_logits_of_rows_that_do_not_count_make_no_nan():
    logits = np.array([[np.inf, 0.0], [0.0, 0.0]])

    def run(group):
        own = np.array_split(logits, group.world_size, axis=-1)[group.rank]
        with np.errstate(invalid="ignore"):
            return tp.vocab_parallel_cross_entropy(own, np.array([-1, 1]), group, ignore_index=-1)

    for loss, grad in simulate(run, 2):
        assert loss == pytest.approx(np.log(2))
        assert np.isfinite(grad).all()
