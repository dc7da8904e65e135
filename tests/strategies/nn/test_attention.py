"""Attention: compared with its formula and with central differences; its memory."""

import tracemalloc

import numpy as np
import pytest

import ferro
from ferro_strategies.nn import Attention, CrossAttention, check_gradients
from ferro_strategies.nn.attention import attend
from ferro_strategies.nn.rotary import rotate


def floats(*shape, dtype=np.float64, seed=0):
    return np.random.default_rng(seed).standard_normal(shape).astype(dtype)


def made(dim, heads, **options):
    """Make attention in float64 whose biases are not zero."""
    layer = Attention(dim, heads, dtype=np.float64, rng=1, **options)
    rng = np.random.default_rng(2)
    for parameter in layer.parameters():
        parameter.data += 0.1 * rng.standard_normal(parameter.data.shape)
    return layer


def by_loops(layer, x, *, causal):
    """Compute attention one position and one head at a time."""
    q, k, v = (part(x) for part in (layer.query, layer.key, layer.value))
    batch, length, dim = x.shape
    size = dim // layer.num_heads
    mixed = np.zeros_like(x)
    for b, t, head in np.ndindex(batch, length, layer.num_heads):
        columns = slice(head * size, (head + 1) * size)
        seen = t + 1 if causal else length
        scores = k[b, :seen, columns] @ q[b, t, columns] / np.sqrt(size)
        weights = np.exp(scores) / np.exp(scores).sum()
        mixed[b, t, columns] = weights @ v[b, :seen, columns]
    return layer.output(mixed)


@pytest.mark.parametrize("causal", [True, False])
@pytest.mark.parametrize(("heads", "shape"), [(1, (2, 3, 4)), (3, (2, 5, 6)), (2, (1, 1, 4))])
def test_values_are_those_of_the_formula(causal, heads, shape):
    layer, x = made(shape[2], heads, causal=causal), floats(*shape)
    np.testing.assert_allclose(layer(x), by_loops(layer, x, causal=causal), rtol=1e-12)


@pytest.mark.parametrize("causal", [True, False])
@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize(("heads", "shape"), [(2, (2, 3, 4)), (1, (1, 1, 2)), (2, (0, 3, 4))])
def test_gradients_equal_central_differences(causal, bias, heads, shape):
    check_gradients(made(shape[2], heads, causal=causal, bias=bias), floats(*shape))


def test_a_causal_position_does_not_depend_on_later_ones():
    layer, x = made(4, 2), floats(2, 5, 4)
    changed = x.copy()
    changed[:, 3:] += 1
    np.testing.assert_array_equal(layer(changed)[:, :3], layer(x)[:, :3])
    assert not np.allclose(made(4, 2, causal=False)(changed)[:, :3], layer(x)[:, :3])


def test_large_scores_overflow_nowhere():
    query, key, value, grad = (floats(1, 3, 4, seed=seed) for seed in range(4))
    mixed, pull = attend(1e4 * query, 1e4 * key, value, 2, causal=False)
    assert np.isfinite(mixed).all()
    assert all(np.isfinite(result).all() for result in pull(grad))


def test_float32_stays_float32_and_inputs_are_not_modified():
    layer, x = Attention(4, 2, rng=0), floats(2, 3, 4, dtype=np.float32)
    grad_y = floats(2, 3, 4, dtype=np.float32, seed=1)
    kept = x.copy(), grad_y.copy()
    y, pullback = layer.vjp(x)
    assert y.dtype == pullback(grad_y).dtype == np.float32
    assert all(p.grad.dtype == np.float32 for p in layer.parameters())
    np.testing.assert_array_equal(x, kept[0])
    np.testing.assert_array_equal(grad_y, kept[1])


def test_heads_keep_the_layout_of_the_query():
    time_first = [floats(4, 2, 6, seed=seed).swapaxes(0, 1) for seed in range(4)]
    batch_first = [np.ascontiguousarray(array) for array in time_first]
    mixed, pull = attend(*time_first[:3], 3, causal=True)
    expected, pull_expected = attend(*batch_first[:3], 3, causal=True)
    assert mixed.strides == time_first[0].strides
    np.testing.assert_allclose(mixed, expected, rtol=1e-13)
    for a, b in zip(pull(time_first[3]), pull_expected(batch_first[3]), strict=True):
        np.testing.assert_allclose(a, b, rtol=1e-12, atol=1e-14)


def test_one_array_of_weights_forward_and_one_more_backward():
    heads, length = 4, 256
    layer, x = Attention(32, heads, rng=0), floats(1, length, 32, dtype=np.float32)
    weights = heads * length * length * 4
    tracemalloc.start()
    try:
        y, pullback = layer.vjp(x)
        forward = tracemalloc.get_traced_memory()[1]
        tracemalloc.reset_peak()
        pullback(y)
        backward = tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()
    # The mask and its making take a quarter each here, for there are four heads; the rest is small.
    assert forward < 1.9 * weights
    assert backward < 2.6 * weights


def test_one_seed_gives_the_same_values_in_every_dtype():
    wide, narrow = Attention(4, 2, dtype=np.float64, rng=5), Attention(4, 2, rng=5)
    for one, other in zip(wide.parameters(), narrow.parameters(), strict=True):
        np.testing.assert_array_equal(one.data.astype(np.float32), other.data)


@pytest.mark.parametrize("shape", [(4,), (3, 4), (2, 0, 4), (2, 3, 5), (1, 2, 3, 4)])
def test_other_shapes_are_refused(shape):
    with pytest.raises(ferro.UsageError, match=r"expected input of shape \(B, T >= 1, 4\)"):
        Attention(4, 2)(np.zeros(shape, np.float32))


@pytest.mark.parametrize("sizes", [(5, 2), (4, 0), (0, 1)])
def test_impossible_sizes_are_refused(sizes):
    with pytest.raises(ferro.UsageError, match=r"Attention: (dim|num_heads) must be"):
        Attention(*sizes)


MASKS = {
    "padding": np.array([[True, False, True], [True, True, False]]),
    "pairs": np.array([[[True, True, False], [False, True, True], [True, False, True]]] * 2),
}


@pytest.mark.parametrize("mask", MASKS.values(), ids=MASKS)
@pytest.mark.parametrize("causal", [True, False])
def test_gradients_with_a_mask(mask, causal):
    check_gradients(made(4, 2, causal=causal), (floats(2, 3, 4), mask))


@pytest.mark.parametrize("options", [{"num_kv_heads": 2}, {"num_kv_heads": 1, "rotary_base": 10.0}])
def test_gradients_of_grouped_heads_and_rotary_positions(options):
    check_gradients(made(8, 4, **options), floats(2, 3, 8))


@pytest.mark.parametrize("mask", [None, MASKS["padding"]])
def test_gradients_of_cross_attention(mask):
    layer = CrossAttention(4, 2, memory_dim=3, num_kv_heads=1, dtype=np.float64, rng=0)
    inputs = floats(2, 2, 4), floats(2, 3, 3, seed=1)
    check_gradients(layer, inputs if mask is None else (*inputs, mask))


def test_grouped_heads_are_those_of_repeated_keys():
    grouped, whole = made(8, 4, num_kv_heads=2), made(8, 4)
    for ours, theirs in ((whole.key, grouped.key), (whole.value, grouped.value)):
        # Heads 0 and 1 of the query share head 0 of key and value, 2 and 3 share head 1.
        ours.weight.data[...] = theirs.weight.data.reshape(8, 2, 1, 2).repeat(2, axis=2).reshape(8, 8)
        ours.bias.data[...] = theirs.bias.data.reshape(2, 1, 2).repeat(2, axis=1).reshape(8)
    whole.query, whole.output = grouped.query, grouped.output
    x = floats(2, 3, 8)
    np.testing.assert_allclose(grouped(x), whole(x), rtol=1e-12)


def test_rotary_scores_depend_on_distances_alone():
    q, k = floats(1, 1, 4), floats(1, 1, 4, seed=1)
    for distance in (0, 3):
        at = [
            (rotate(q, 1, base=10.0, first=first + distance) * rotate(k, 1, base=10.0, first=first)).sum()
            for first in (0, 5)
        ]
        assert at[0] == pytest.approx(at[1])
    np.testing.assert_allclose(rotate(rotate(q, 2, base=10.0, first=3), 2, base=10.0, first=3, backwards=True), q)


def test_padding_has_no_effect_and_no_gradient_whatever_stands_there():
    layer, x = made(4, 2, causal=False), floats(2, 3, 4)
    mask = np.array([[True, True, False], [False, False, False]])
    changed = x.copy()
    changed[~mask] = 7
    y, pullback = layer.vjp((x, mask))
    again = layer((changed, mask))
    np.testing.assert_array_equal(again[mask], y[mask])
    np.testing.assert_allclose(y[1], np.broadcast_to(layer.output.bias.data, (3, 4)))  # nothing to attend to
    grad_x, none = pullback(np.broadcast_to(mask[..., None], x.shape).astype(float))
    assert none is None
    assert not grad_x[~mask].any()
    key = floats(1, 2, 4)
    key[0, 1] = np.nan
    mixed, pull = attend(floats(1, 2, 4), key, key, 2, causal=False, mask=np.array([[True, False]]))
    assert all(np.isfinite(array).all() for array in (mixed, *pull(mixed)))


def test_dropout_of_weights():
    layer, x = made(4, 2, dropout=0.5), floats(1, 6, 4)
    assert [name for name, _ in layer.named_generators()] == ["dropout.rng"]
    state = layer.generator_state_dict()
    y, pullback = layer.vjp(x)
    assert not np.allclose(layer(x), y)
    numeric, weights, step = np.zeros_like(x), floats(1, 6, 4, seed=1), 1e-6
    for index in np.ndindex(x.shape):
        values = []
        for change in (step, -step):
            moved = x.copy()
            moved[index] += change
            layer.load_generator_state_dict(state)
            values.append((layer(moved) * weights).sum())
        numeric[index] = (values[0] - values[1]) / (2 * step)
    np.testing.assert_allclose(pullback(weights), numeric, atol=1e-7)
    np.testing.assert_allclose(layer.eval()(x), by_loops(layer, x, causal=True), rtol=1e-12)


@pytest.mark.parametrize(
    ("make", "x", "message"),
    [
        (lambda: Attention(4, 2, num_kv_heads=3), None, "num_heads must be a multiple of num_kv_heads, got 2 and 3"),
        (lambda: Attention(6, 2, rotary_base=10.0), None, "heads of an even number of columns, got 10.0 and 3"),
        (lambda: Attention(4, 2, dtype=np.complex64), None, "dtype must be of real floating-point numbers"),
        (lambda: Attention(4, 2), (np.ones((2, 3, 4), np.float32), np.ones((2, 3), int)), "boolean mask .* int64"),
        (lambda: Attention(4, 2), (np.ones((2, 3, 4), np.float32), np.ones((3, 3), bool)), r"got bool \(3, 3\)"),
        (lambda: Attention(4, 2), (np.ones((2, 3, 4), np.float32),) * 3, "or a tuple of an array and a mask"),
        (lambda: CrossAttention(4, 2), np.ones((2, 3, 4), np.float32), r"expected a tuple \(x, memory\)"),
        (
            lambda: CrossAttention(4, 2),
            (np.ones((2, 3, 4), np.float32), np.ones((1, 3, 4), np.float32)),
            "as many rows",
        ),
    ],
)
def test_wrong_options_and_masks_are_refused(make, x, message):
    with pytest.raises(ferro.UsageError, match=message):
        make()(x)
