"""Tensor-parallel layers one by one: values, traffic, overlap, and what they refuse."""

import threading
import tracemalloc
from collections import Counter
from functools import partial

import ml_dtypes
import numpy as np
import pytest

import ferro
from ferro_strategies import FSDP, DeviceMesh, nn
from ferro_strategies import tensor_parallel as tp

F64 = np.float64
SECONDS = 20.0
RANKS = pytest.mark.parametrize("ranks", [1, 2, 3])


def floats(*shape, seed=0):
    return np.random.default_rng(seed).standard_normal(shape)


def simulate(run, ranks, **options):
    return ferro.simulate(run, ranks, timeout_s=SECONDS, **options)


class Traffic:
    """Counts the operations of rank 0, with their largest size; takes part as an observer."""

    def __init__(self):
        self.counts, self.largest = Counter(), 0

    def started(self, event):
        if event.rank == 0:
            self.counts[event.op] += 1
            self.largest = max(self.largest, event.nbytes)

    def finished(self, event):
        pass

    def close(self):
        pass

    def restart(self):
        self.counts, self.largest = Counter(), 0


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


def test_pieces_say_how_they_are_cut_and_the_serial_layer_is_left_alone():
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
        layer = tp.ColumnParallelLinear(
            3, 4, group, sequence_parallel=sequence_parallel, dtype=F64, rng=0
        )
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


REGIONS = {
    "CopyIn": (tp.CopyIn, "own", "sum"),
    "ReduceOut": (tp.ReduceOut, "sum", "own"),
    "GatherIn": (tp.GatherIn, "gather", "sum and cut"),
    "ScatterOut": (tp.ScatterOut, "sum and cut", "gather"),
    "SplitIn": (tp.SplitIn, "cut", "gather"),
    "GatherOut": (tp.GatherOut, "gather", "cut"),
}


def move(how, arrays, rank, dim):
    """Return what a rank should get of all ranks' arrays."""
    if how == "own":
        return arrays[rank]
    if how == "gather":
        return np.concatenate(arrays, axis=dim)
    whole = arrays[rank] if how == "cut" else sum(arrays)
    return whole if how == "sum" else np.array_split(whole, len(arrays), axis=dim)[rank]


@RANKS
@pytest.mark.parametrize("dim", [0, 1, -1])
@pytest.mark.parametrize(("kind", "forward", "backward"), REGIONS.values(), ids=REGIONS)
def test_regions_move_what_their_table_says(ranks, dim, kind, forward, backward):
    if kind in (tp.CopyIn, tp.ReduceOut):
        make, sizes = kind, [5] * ranks
    else:
        make = partial(kind, dim=dim)
        pieces = [len(piece) for piece in np.array_split(np.empty(5), ranks)]
        sizes = pieces if forward == "gather" else [5] * ranks

    def shaped(sizes, seed):
        arrays = []
        for rank, size in enumerate(sizes):
            shape = [2, 3, 4]
            shape[dim] = size
            arrays.append(floats(*shape, seed=seed + rank))
        return arrays

    xs = shaped(sizes, 0)
    ys = [move(forward, xs, rank, dim) for rank in range(ranks)]
    grads = [floats(*y.shape, seed=10 + rank) for rank, y in enumerate(ys)]

    def run(group):
        y, pullback = make(group).vjp(xs[group.rank])
        return y, pullback(grads[group.rank])

    for rank, (y, grad_x) in enumerate(simulate(run, ranks)):
        np.testing.assert_allclose(y, ys[rank], rtol=1e-12)
        np.testing.assert_allclose(grad_x, move(backward, grads, rank, dim), rtol=1e-12)


@RANKS
@pytest.mark.parametrize(
    ("dtype", "size", "rtol"), [(F64, 1.0, 1e-12), (F64, 1e4, 1e-12), (np.float32, 3.0, 1e-5)]
)
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
        attention = tp.ParallelAttention.from_serial(
            parts[1], group, sequence_parallel=sequence_parallel
        )
        columns = tp.ColumnParallelLinear(
            8, 8, group, dtype=dtype, rng=2, sequence_parallel=sequence_parallel
        )
        if sequence_parallel:
            ends = (tp.SplitIn(group), tp.SequenceParallelLayerNorm.from_serial(parts[0], group))
        else:
            ends = (parts[0],)
        loss_of = partial(tp.vocab_parallel_cross_entropy, labels=labels, group=group)
        y, loss, grad = train_pass(
            nn.Sequential(*ends, attention, columns), x.astype(dtype), loss_of
        )
        assert y.dtype == grad.dtype == dtype
        return loss, grad

    serial = nn.Sequential(norm, attention, nn.Linear(8, 8, dtype=F64, rng=2))
    _, expected, expected_grad = train_pass(serial, x, partial(nn.cross_entropy, labels=labels))
    error = 16 * float(ml_dtypes.finfo(dtype).eps)
    for loss, grad in simulate(run, 2):
        assert loss == pytest.approx(expected, rel=error)
        assert np.abs(grad - expected_grad).max() < error * np.abs(expected_grad).max()


def test_the_loss_gathers_no_logits():
    traffic, rows, classes = Traffic(), 8, 1000

    def run(group):
        labels = np.zeros(rows, np.int64)
        tp.vocab_parallel_cross_entropy(np.ones((rows, classes)), labels, group)

    simulate(run, 2, observers=[traffic])
    assert traffic.largest <= 2 * rows * 8


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
def test_a_pair_that_shares_its_table_does_so_in_pieces(ranks, sequence_parallel):
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


def test_a_model_in_pieces_of_pieces_loads_the_whole_state():
    def model(group):
        return tp.parallelize(
            nn.Sequential(nn.Linear(4, 5, dtype=F64, rng=0), nn.LayerNorm(5, dtype=F64)),
            group,
            {"layers.0": partial(COLUMN.from_serial, gather_output=True)},
        )

    def run(group):
        mesh = DeviceMesh((2, 2), ("dp", "tp"), group)
        sharded = FSDP(model(mesh["tp"]), mesh["dp"])
        whole = tp.full_state_dict(sharded, sharded.full_state_dict())
        changed = {name: value + 1 for name, value in whole.items()}
        tp.load_full_state_dict(sharded, changed, sharded.full_state_dict())
        loaded = tp.full_state_dict(sharded, sharded.full_state_dict())
        for name, value in changed.items():
            np.testing.assert_array_equal(loaded[name], value, err_msg=name)
        return whole["layers.0.weight"].shape

    assert simulate(run, 4) == [(4, 5)] * 4


def test_a_layer_within_a_checkpoint_is_replaced_by_its_name():
    def run(group):
        model = nn.Sequential(nn.Checkpoint(nn.Linear(4, 4, rng=0)))
        tp.parallelize(model, group, {"layers.0": tp.ColumnParallelLinear.from_serial})
        return type(model.layers[0]), type(model.layers[0].module)

    assert simulate(run, 2) == [(nn.Checkpoint, tp.ColumnParallelLinear)] * 2


def test_pieces_of_a_sharded_model_come_from_its_own_state():
    whole = nn.Linear(4, 5, dtype=F64, rng=0)

    def run(group):
        layer = tp.ColumnParallelLinear.from_serial(whole, group)
        pieces = layer.state_dict()
        layer.weight.splits += (nn.Split(group=group, dim=None),)
        with pytest.raises(ferro.UsageError, match=r"'weight' is also cut as one flat row.*local"):
            tp.full_state_dict(layer)
        with pytest.raises(ferro.UsageError, match=r"Pass local=.*FSDP.*full_state_dict\(\)"):
            tp.load_full_state_dict(layer, whole.state_dict())
        with pytest.raises(ferro.UsageError, match="local state lacks parameter 'bias'"):
            tp.full_state_dict(layer, {"weight": pieces["weight"]})
        full = tp.full_state_dict(layer, pieces)
        local = tp.local_state_dict(layer, full, pieces)
        for name, piece in pieces.items():
            np.testing.assert_array_equal(local[name], piece)
        return full

    for full in simulate(run, 2):
        np.testing.assert_array_equal(full["weight"], whole.weight.data)


def test_a_parameter_cut_by_two_groups_is_put_together():
    whole = nn.Linear(6, 5, dtype=F64, rng=0)

    def run(group):
        outer, inner = group.split(group.rank % 2), group.split(group.rank // 2)
        layer = tp.ColumnParallelLinear.from_serial(whole, outer)
        for parameter, dim in ((layer.weight, 0), (layer.bias, 0)):
            piece = np.array_split(parameter.data, 2, axis=dim)[inner.rank]
            parameter.hold(piece.copy(), grad=None, grad_memory=None)
            parameter.splits += (nn.Split(group=inner, dim=dim),)
        own, full = layer.state_dict(), tp.full_state_dict(layer)
        tp.load_full_state_dict(layer, full)
        for name, value in layer.state_dict().items():
            np.testing.assert_array_equal(value, own[name])
        return full

    for full in simulate(run, 4):
        np.testing.assert_array_equal(full["weight"], whole.weight.data)
        np.testing.assert_array_equal(full["bias"], whole.bias.data)


def test_a_state_that_does_not_fit_is_refused_and_nothing_loaded():
    def run(group):
        layer = tp.ColumnParallelLinear(4, 5, group, rng=0)
        before = layer.state_dict()
        state = tp.full_state_dict(layer)
        with pytest.raises(ferro.UsageError, match=r"'weight' is \(4, 5\) whole, given \(4, 6\)"):
            tp.load_full_state_dict(layer, state | {"weight": np.zeros((4, 6), np.float32)})
        with pytest.raises(ferro.UsageError, match="missing 'bias'; unexpected 'other'"):
            tp.load_full_state_dict(layer, {"weight": state["weight"], "other": before["bias"]})
        for name, value in layer.state_dict().items():
            np.testing.assert_array_equal(value, before[name])

    simulate(run, 2)


def tied_model():
    model = nn.Sequential(nn.Linear(3, 3, rng=0), nn.Linear(3, 3, rng=0))
    model.layers[1].weight = model.layers[0].weight
    return model


def tied_attention():
    attention, linear = nn.Attention(4, 2, rng=0), nn.Linear(4, 4, rng=1)
    linear.weight = attention.query.weight
    return nn.Sequential(attention, linear)


COLUMN = tp.ColumnParallelLinear
REFUSED = {
    "too few columns": (
        lambda group: COLUMN(4, 1, group, rng=0),
        r"1 out_features cannot be cut into \(1, 0\).*at least one",
    ),
    "too few rows": (
        lambda group: tp.RowParallelLinear(1, 4, group, rng=0),
        r"1 in_features cannot be cut into \(1, 0\)",
    ),
    "sizes": (
        lambda group: COLUMN.from_serial(nn.Linear(4, 4, rng=0), group, sizes=[3, 2]),
        r"4 out_features cannot be cut into \(3, 2\)",
    ),
    "too few heads": (
        lambda group: tp.ParallelAttention(4, 1, group, rng=0),
        r"1 num_heads cannot be cut into \(1, 0\)",
    ),
    "too few words": (
        lambda group: tp.ParallelEmbedding(1, 4, group, rng=0),
        r"1 num_embeddings cannot be cut into \(1, 0\)",
    ),
    "seeds": (
        lambda group: COLUMN(4, 4, group, rng=group.rank),
        "values of weight .give all ranks one rng seed.*rank 1 has",
    ),
    "options": (
        lambda group: COLUMN(4, 4, group, rng=0, sequence_parallel=group.rank == 0),
        "rank 0 has the option sequence_parallel=True, rank 1 has the option sequence_parallel=F",
    ),
    "another layer": (
        lambda group: tp.ParallelAttention.from_serial(nn.Linear(4, 4, rng=0), group),
        r"ParallelAttention is made of Attention, not of Linear\(4, 4",
    ),
    "in pieces already": (
        lambda group: tp.ParallelAttention.from_serial(
            tp.parallelize(nn.Attention(4, 2, rng=0), group, {"query": COLUMN.from_serial}), group
        ),
        r"parameter 'query.weight' of Attention.* is in pieces already",
    ),
    "gathered and cut": (
        lambda group: COLUMN(4, 4, group, gather_output=True, sequence_parallel=True),
        "gather_output makes whole sequences",
    ),
    "whole and cut": (
        lambda group: tp.RowParallelLinear(
            4, 4, group, input_is_parallel=False, sequence_parallel=True
        ),
        "sequence_parallel needs input_is_parallel",
    ),
    "dtype": (
        lambda group: COLUMN(4, 4, group, rng=0)(np.ones((2, 4))),
        "expected input of dtype float32",
    ),
    "column shape": (
        lambda group: COLUMN(4, 4, group, rng=0, sequence_parallel=True)(np.ones((2, 4), "f")),
        r"expected input of shape \(B, t, 4\), got \(2, 4\)",
    ),
    "row shape": (
        lambda group: tp.RowParallelLinear(4, 4, group, rng=0)(np.ones((2, 4), "f")),
        r"expected input of shape \(..., 2\), got \(2, 4\)",
    ),
    "row sequences": (
        lambda group: tp.RowParallelLinear(4, 4, group, rng=0, sequence_parallel=True)(
            np.ones((3, 2), "f")
        ),
        r"expected input of shape \(B, T, 2\), got \(3, 2\)",
    ),
    "attention shape": (
        lambda group: tp.ParallelAttention(4, 2, group, rng=0)(np.ones((2, 0, 4), "f")),
        r"expected input of shape \(B, T >= 1 over all ranks, 4\), got \(2, 0, 4\)",
    ),
    "norm shape": (
        lambda group: tp.SequenceParallelLayerNorm(4, group)(np.ones((2, 3), "f")),
        r"expected input of shape \(..., 4\), got \(2, 3\)",
    ),
    "unembedding shape": (
        lambda group: tp.ParallelUnembedding(tp.ParallelEmbedding(5, 4, group, rng=0))(
            np.ones((2, 3), "f")
        ),
        r"ParallelUnembedding.* expected input of shape \(\.\.\., 4\), got \(2, 3\)",
    ),
    "region shape": (
        lambda group: tp.SplitIn(group)(np.ones(3)),
        r"expected input of shape of at least 2 dimensions, got \(3,\)",
    ),
    "indices": (
        lambda group: tp.ParallelEmbedding(5, 4, group, rng=0)(np.array([1, 5])),
        "expected indices from 0 to 4, got 1 to 5",
    ),
    "no indices": (
        lambda group: tp.ParallelEmbedding(5, 4, group, rng=0)(np.ones(2)),
        "expected integer indices, got float64",
    ),
    "label": (
        lambda group: tp.vocab_parallel_cross_entropy(np.ones((1, 2)), np.array([4]), group),
        "labels must be from 0 to 3, got 4 to 4",
    ),
    "labels' dtype": (
        lambda group: tp.vocab_parallel_cross_entropy(np.ones((1, 2)), np.ones(1), group),
        "labels must be integers, got float64",
    ),
    "labels' shape": (
        lambda group: tp.vocab_parallel_cross_entropy(np.ones((1, 2)), np.array([1, 0]), group),
        r"need labels of shape \(1,\), got \(2,\)",
    ),
    "no classes": (
        lambda group: tp.vocab_parallel_cross_entropy(
            np.ones((1, 1 - group.rank)), np.array([0]), group
        ),
        r"have \(1, 0\) classes; each needs at least one",
    ),
    "plan": (
        lambda group: tp.parallelize(
            nn.Sequential(nn.Linear(2, 2)), group, {"layers.*": COLUMN.from_serial, "head": COLUMN}
        ),
        r"no module is called like \['head'\]. There are: layers.0",
    ),
    "plan among many": (
        lambda group: tp.parallelize(
            nn.Sequential(*[nn.ReLU() for _ in range(50)]), group, {"head": COLUMN.from_serial}
        ),
        r"There are: layers.0, layers.1, layers.2, layers.3, and 46 more\.",
    ),
    "tied": (
        lambda group: tp.parallelize(tied_model(), group, {"layers.1": COLUMN.from_serial}),
        "'layers.1' and 'layers.0' share parameter 'weight'.*ParallelUnembedding",
    ),
    "tied and cut differently": (
        lambda group: tp.parallelize(
            tied_model(),
            group,
            {"layers.0": COLUMN.from_serial, "layers.1": tp.RowParallelLinear.from_serial},
        ),
        "'layers.1' shares parameter 'weight' with another layer.*do not cut it alike",
    ),
    "tied below": (
        lambda group: tp.parallelize(
            tied_attention(),
            group,
            {"layers.0": tp.ParallelAttention.from_serial, "layers.1": COLUMN.from_serial},
        ),
        "'layers.1' and 'layers.0.query' share parameter 'weight'",
    ),
}


@pytest.mark.parametrize(("attempt", "message"), REFUSED.values(), ids=REFUSED)
def test_what_is_refused_is_refused_on_every_rank(attempt, message):
    def run(group):
        with pytest.raises(ferro.UsageError, match=message):
            attempt(group)

    simulate(run, 2)
