"""Tensor-parallel layers one by one: values, messages, overlap and half precision."""

import threading
from functools import partial

import ml_dtypes
import numpy as np
import pytest

from ferro_strategies import nn
from ferro_strategies import tensor_parallel as tp

from .models import F64, RANKS, SECONDS, Traffic, floats, simulate

LAYERS = {
    "column": (
        lambda: nn.Linear(4, 7, dtype=F64, rng=5),
        lambda group: tp.ColumnParallelLinear(4, 7, group, dtype=F64, rng=5),
        tp.ColumnParallelLinear.from_serial,
    ),
    "row": (
        lambda: nn.Linear(7, 4, dtype=F64, rng=5),
        lambda group: tp.RowParallelLinear(7, 4, group, dtype=F64, rng=5),
        tp.RowParallelLinear.from_serial,
    ),
    "without bias": (
        lambda: nn.Linear(4, 7, False, dtype=F64, rng=5),
        lambda group: tp.ColumnParallelLinear(4, 7, group, False, dtype=F64, rng=5),
        tp.ColumnParallelLinear.from_serial,
    ),
    "embedding": (
        lambda: nn.Embedding(7, 4, dtype=F64, rng=5),
        lambda group: tp.ParallelEmbedding(7, 4, group, dtype=F64, rng=5),
        tp.ParallelEmbedding.from_serial,
    ),
    "attention": (
        lambda: nn.Attention(8, 4, causal=False, dtype=F64, rng=5),
        lambda group: tp.ParallelAttention(8, 4, group, causal=False, dtype=F64, rng=5),
        tp.ParallelAttention.from_serial,
    ),
    "norm": (
        lambda: nn.LayerNorm((2, 3), eps=1e-3, dtype=F64),
        lambda group: tp.SequenceParallelLayerNorm((2, 3), group, eps=1e-3, dtype=F64),
        tp.SequenceParallelLayerNorm.from_serial,
    ),
}


@RANKS
@pytest.mark.parametrize(("serial", "direct", "convert"), LAYERS.values(), ids=LAYERS)
def test_one_seed_gives_the_values_of_the_serial_layer(ranks, serial, direct, convert):
    def run(group):
        made = [direct(group), convert(serial(), group)]
        return [tp.full_state_dict(module) for module in made], str(made[0]) == str(made[1])

    expected = serial().state_dict()
    for states, same in simulate(run, ranks):
        assert same
        for state in states:
            assert list(state) == list(expected)
            for name, value in expected.items():
                np.testing.assert_array_equal(state[name], value, err_msg=name)


def test_splits_tell_how_shards_were_made_and_the_serial_layer_is_not_changed():
    def run(group):
        whole = nn.Linear(4, 5, rng=0).eval()
        whole.bias.requires_grad = False
        column = tp.ColumnParallelLinear.from_serial(whole, group)
        row = tp.RowParallelLinear.from_serial(whole, group)
        column.weight.data += 1
        parameters = (column.weight, column.bias, row.weight, row.bias)
        assert [p.requires_grad for p in parameters] == [True, False, True, False]
        assert [column.training, row.training] == [False, False]
        dims = [[split.dim for split in p.splits if split.group is group] for p in parameters]
        shapes = [p.data.shape for p in parameters]
        np.testing.assert_array_equal(whole.weight.data, nn.Linear(4, 5, rng=0).weight.data)
        return dims, shapes

    first, second = simulate(run, 2)
    assert first == ([[1], [0], [0], []], [(4, 3), (3,), (2, 5), (5,)])
    assert second == ([[1], [0], [0], []], [(4, 2), (2,), (2, 5), (5,)])


def whole_pass(module, x, grad_y):
    y, pullback = module.vjp(x)
    grads = {"x": pullback(grad_y)}
    grads |= {name: parameter.grad for name, parameter in module.named_parameters()}
    return y, grads


@RANKS
@pytest.mark.parametrize("kind", [tp.ColumnParallelLinear, tp.RowParallelLinear])
@pytest.mark.parametrize("shape", [(4,), (3, 4), (2, 3, 4), (0, 4)])
@pytest.mark.parametrize("bias", [True, False])
def test_linear_layers_between_serial_ones(ranks, kind, shape, bias):
    whole = nn.Linear(4, 5, bias, dtype=F64, rng=1)
    x, grad_y = floats(*shape), floats(*shape[:-1], 5, seed=1)
    y, grads = whole_pass(whole, x, grad_y)
    option = "gather_output" if kind is tp.ColumnParallelLinear else "input_is_parallel"

    def run(group):
        choice = {option: option == "gather_output"}
        module = kind(4, 5, group, bias, dtype=F64, rng=1, **choice)
        mine, my_grads = whole_pass(module, x, grad_y)
        return mine, tp.full_state_dict(module, my_grads)

    for mine, my_grads in simulate(run, ranks):
        np.testing.assert_allclose(mine, y, rtol=1e-12, atol=1e-14)
        for name, grad in grads.items():
            np.testing.assert_allclose(my_grads[name], grad, rtol=1e-12, atol=1e-14, err_msg=name)


@pytest.mark.parametrize("sequence_parallel", [False, True])
def test_attention_sums_and_gathers_once(sequence_parallel):
    traffic = Traffic()

    def run(group):
        layer = tp.ParallelAttention(4, 2, group, sequence_parallel=sequence_parallel, rng=0)
        x = np.ones((2, 3, 4), np.float32)
        layer.vjp(x)  # the inputs of the first pass are compared
        group.barrier()
        if group.rank == 0:
            traffic.restart()
        group.barrier()
        y, pullback = layer.vjp(x)
        forward = traffic.counts.copy()
        pullback(y)
        return forward, traffic.counts - forward

    forward, backward = simulate(run, 2, observers=[traffic])[0]
    del forward["barrier"]
    if sequence_parallel:
        # Lengths, then the sequences; backward those of the gradient, and the input's again.
        assert forward == {"all_gather": 2, "reduce_scatter": 1}
        assert backward == {"all_gather": 2, "reduce_scatter": 1}
    else:
        assert forward == {"all_reduce": 1}
        assert backward == {"all_reduce": 1}


@pytest.mark.parametrize("sequence_parallel", [False, True])
def test_the_weight_gradient_is_computed_while_the_input_gradient_is_summed(sequence_parallel):
    computed = threading.Event()

    def run(group):
        layer = tp.ColumnParallelLinear(3, 4, group, sequence_parallel=sequence_parallel, dtype=F64, rng=0)
        y, pullback = layer.vjp(floats(2, 2, 3))
        if group.rank == 0:
            layer.weight.on_complete(lambda _: computed.set())
            return pullback(y).shape
        # Rank 1 joins the sum only after rank 0 has its weight's gradient. It still gathers
        # the sequences, for those are what that gradient is made of.
        all_reduce, reduce_scatter = group.all_reduce, group.reduce_scatter

        def late(call):
            def called(*args, **options):
                assert computed.wait(SECONDS / 2), "rank 0 waits for the sum first"
                return call(*args, **options)

            return called

        group.all_reduce, group.reduce_scatter = late(all_reduce), late(reduce_scatter)
        return pullback(y).shape

    assert simulate(run, 2) == [(2, 2, 3)] * 2


def test_frozen_weights_get_no_gradient_and_the_input_does():
    whole = nn.Linear(3, 4, dtype=F64, rng=0)
    x, grad_y = floats(5, 3), floats(5, 4)
    expected = whole.vjp(x)[1](grad_y)

    def run(group):
        layer = tp.ColumnParallelLinear.from_serial(whole, group, gather_output=True)
        for parameter in layer.parameters():
            parameter.requires_grad = False
        grad_x = layer.vjp(x)[1](grad_y)
        assert all(parameter.grad is None for parameter in layer.parameters())
        return grad_x

    for grad_x in simulate(run, 2):
        np.testing.assert_allclose(grad_x, expected, rtol=1e-12)


PRECISIONS = pytest.mark.parametrize("dtype", [np.float16, ml_dtypes.bfloat16])


@PRECISIONS
@pytest.mark.parametrize("sequence_parallel", [False, True])
def test_half_precision_is_near_the_exact_result(dtype, sequence_parallel):
    """Column, row and norm within attention and a loss, as in a model."""
    norm, attention = nn.LayerNorm(8, dtype=F64), nn.Attention(8, 2, dtype=F64, rng=1)
    x, labels = floats(2, 4, 8), np.arange(8).reshape(2, 4)

    def train_pass(model, x, loss_of):
        y, pullback = model.vjp(x)
        loss, grad = loss_of(y)
        return y, loss, pullback(grad)

    def run(group):
        parts = nn.LayerNorm(8, dtype=dtype), nn.Attention(8, 2, dtype=dtype, rng=1)
        attention = tp.ParallelAttention.from_serial(parts[1], group, sequence_parallel=sequence_parallel)
        columns = tp.ColumnParallelLinear(8, 8, group, dtype=dtype, rng=2, sequence_parallel=sequence_parallel)
        if sequence_parallel:
            ends = (tp.SplitIn(group), tp.SequenceParallelLayerNorm.from_serial(parts[0], group))
        else:
            ends = (parts[0],)
        loss_of = partial(tp.vocab_parallel_cross_entropy, labels=labels, group=group)
        y, loss, grad = train_pass(nn.Sequential(*ends, attention, columns), x.astype(dtype), loss_of)
        assert y.dtype == grad.dtype == dtype
        return loss, grad

    serial = nn.Sequential(norm, attention, nn.Linear(8, 8, dtype=F64, rng=2))
    _, expected, expected_grad = train_pass(serial, x, partial(nn.cross_entropy, labels=labels))
    error = 16 * float(ml_dtypes.finfo(dtype).eps)
    for loss, grad in simulate(run, 2):
        assert loss == pytest.approx(expected, rel=error)
        assert np.abs(grad - expected_grad).max() < error * np.abs(expected_grad).max()


@RANKS
@pytest.mark.parametrize("sequence_parallel", [False, True])
def test_attention_with_grouped_heads_rotary_positions_and_a_mask_is_the_serial_one(ranks, sequence_parallel):
    x, grad = floats(2, 5, 16), floats(2, 5, 16, seed=1)
    mask = np.array([[True] * 5, [True, True, True, False, False]])

    def serial():
        return nn.Attention(16, 8, num_kv_heads=4, rotary_base=100.0, dtype=F64, rng=3)

    def run(group):
        layer = tp.ParallelAttention.from_serial(serial(), group, sequence_parallel=sequence_parallel)
        ends = (tp.SplitIn(group), tp.GatherOut(group)) if sequence_parallel else (nn.Sequential(),) * 2
        own, pull_in = ends[0].vjp(x)
        y, pull = layer.vjp((own, mask))
        whole, pull_out = ends[1].vjp(y)
        grad_x, no_gradient = pull(pull_out(grad))
        assert no_gradient is None
        grads = {name: parameter.grad for name, parameter in layer.named_parameters()}
        return whole, pull_in(grad_x), tp.full_state_dict(layer, grads)

    layer = serial()
    y, pull = layer.vjp((x, mask))
    grad_x, _ = pull(grad)
    for found, found_grad, grads in simulate(run, ranks):
        np.testing.assert_allclose(found, y, rtol=1e-12, atol=1e-13)
        np.testing.assert_allclose(found_grad, grad_x, rtol=1e-10, atol=1e-13)
        for name, parameter in layer.named_parameters():
            np.testing.assert_allclose(grads[name], parameter.grad, rtol=1e-10, atol=1e-12, err_msg=name)


def test_attention_drops_other_weights_on_each_rank_and_trains_alike():
    def run(group):
        model = nn.Sequential(nn.Attention(8, 4, dropout=0.5, dtype=F64, rng=group.rank))
        tp.parallelize(model, group, {"layers.0": tp.ParallelAttention.from_serial})
        state = model.generator_state_dict()
        layer = model.layers[0]
        layer.query.weight.data[...] = layer.key.weight.data[...] = 0  # all weights before dropout are alike
        layer.value.weight.data[...] = 1
        mixed = []
        output, layer.output = layer.output, Recorder(mixed)
        model(np.ones((1, 6, 8)))
        layer.output = output
        y, pull = model.vjp(np.ones((1, 6, 8)))
        pull(y)
        return mixed[0], y, state

    (first, y, state), (second, other_y, other_state) = simulate(run, 2)
    assert not np.array_equal(first, second)
    np.testing.assert_array_equal(y, other_y)
    assert list(state) == list(other_state) == ["layers.0.dropout.rng"]
    assert state != other_state


class Recorder(nn.Module):
    """Keep the inputs in a list."""

    def __init__(self, inputs):
        self.inputs = inputs

    def vjp(self, x):
        self.inputs.append(x)
        return x, lambda grad: grad
