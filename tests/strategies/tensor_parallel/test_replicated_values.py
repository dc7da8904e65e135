"""Whatever stays whole is rank 0's on all ranks at the start, and its gradients are compared."""

import tracemalloc
from functools import partial

import ml_dtypes
import numpy as np
import pytest

import ferro
from ferro_strategies import DDP, DeviceMesh, nn, optim
from ferro_strategies import tensor_parallel as tp

from .models import F64, RANKS, Traffic, floats, simulate

PAIR = {"layers.0": tp.ColumnParallelLinear.from_serial, "layers.2": tp.RowParallelLinear.from_serial}


def pair(seed=None, dtype=F64, norm=True):
    more = [nn.BatchNorm(4, dtype=dtype)] if norm else []
    up, down = nn.Linear(4, 7, dtype=dtype, rng=seed), nn.Linear(7, 4, dtype=dtype, rng=seed)
    return nn.Sequential(up, nn.GELU(), down, *more, nn.Linear(4, 3, dtype=dtype, rng=seed))


@RANKS
def test_all_ranks_have_rank_0s_values_in_pieces_and_whole(ranks):
    def run(group):
        model = pair(seed=5 + group.rank)
        model.layers[3].running_mean.data += group.rank
        return tp.full_state_dict(tp.parallelize(model, group, PAIR))

    expected = pair(seed=5).state_dict()
    for state in simulate(run, ranks):
        assert list(state) == list(expected)
        for name, value in expected.items():
            np.testing.assert_array_equal(state[name], value, err_msg=name)


def test_models_of_another_structure_are_refused_before_anything_changes():
    def run(group):
        model = pair(seed=0)
        if group.rank == 1:
            model.layers[3] = nn.Linear(4, 4, dtype=F64, rng=0)
        with pytest.raises(ferro.UsageError, match=r"rank 0 has parameter 'layers.3.weight', float64 \(4,\), rank 1"):
            tp.parallelize(model, group, PAIR)
        assert type(model.layers[0]) is nn.Linear

    simulate(run, 2)


@RANKS
@pytest.mark.parametrize("tied", [False, True])
def test_an_optimizer_made_before_trains_the_pieces(ranks, tied):
    indices = np.random.default_rng(1).integers(0, 7, (2, 5))
    plan = {"layers.0": tp.ParallelEmbedding.from_serial, "layers.1.module.layers.0": PAIR["layers.0"]}
    plan |= {"layers.1.module.layers.2": PAIR["layers.2"], "layers.2": tp.ParallelUnembedding.from_serial}

    def build():
        table = nn.Embedding(7, 4, dtype=F64, rng=0)
        up, down = nn.Linear(4, 7, dtype=F64, rng=1), nn.Linear(7, 4, dtype=F64, rng=2)
        head = nn.Unembedding(table) if tied else nn.Linear(4, 7, dtype=F64, rng=3)
        return nn.Sequential(table, nn.Residual(nn.Sequential(up, nn.GELU(), down)), head)

    def train(model, optimizer, loss_of):
        for _ in range(3):
            scores, pullback = model.vjp(indices)
            pullback(loss_of(scores, indices)[1])
            optimizer.step()
            optimizer.zero_grad()

    def go_backward(model):
        scores, pullback = model.vjp(indices)
        pullback(nn.cross_entropy(scores, indices)[1])

    def run(group):
        model = build()
        optimizer = optim.SGD(model.parameters(), 0.5, momentum=0.9)
        train(model, optimizer, nn.cross_entropy)  # in one process first
        go_backward(model)
        used = plan if tied else plan | {"layers.2": tp.ColumnParallelLinear.from_serial}
        tp.parallelize(model, group, used)
        assert [id(p) for p in model.parameters()] == [id(p) for p in optimizer.parameters]
        optimizer.step()  # with the gradients from before
        optimizer.zero_grad()
        train(model, optimizer, partial(tp.vocab_parallel_cross_entropy, group=group))
        return tp.full_state_dict(model)

    serial = build()
    optimizer = optim.SGD(serial.parameters(), 0.5, momentum=0.9)
    train(serial, optimizer, nn.cross_entropy)
    go_backward(serial)
    optimizer.step()
    optimizer.zero_grad()
    train(serial, optimizer, nn.cross_entropy)
    for state in simulate(run, ranks):
        for name, value in serial.state_dict().items():
            np.testing.assert_allclose(state[name], value, rtol=1e-10, atol=1e-12, err_msg=name)


@pytest.mark.parametrize("dtype", [F64, np.float32, np.float16, ml_dtypes.bfloat16])
def test_a_whole_layer_that_sees_other_data_on_each_rank_is_named(dtype):
    def run(group):
        model = nn.Sequential(nn.Linear(4, 4, dtype=dtype, rng=1), pair(seed=0, dtype=dtype, norm=False))
        tp.parallelize(model, group, {f"layers.1.{name}": convert for name, convert in PAIR.items()})
        same = floats(3, 4).astype(dtype)
        for _ in range(3):
            y, pullback = model.vjp(same)
            pullback(y)
        y, pullback = model.vjp(floats(3, 4, seed=group.rank).astype(dtype))
        pullback(y)
        y, pullback = model.vjp(same)
        with pytest.raises(ferro.UsageError, match=r"'layers\.0\.weight.*differ between the ranks.*same batch"):
            pullback(y)  # the gradients of the pass before are compared

    simulate(run, 2)


DIFFERENT = {
    "column": lambda group: tp.ColumnParallelLinear(4, 4, group, dtype=F64, rng=0)(floats(2, 4, seed=group.rank)),
    "shape": lambda group: tp.ColumnParallelLinear(4, 4, group, dtype=F64, rng=0)(floats(2 + group.rank, 4)),
    "attention": lambda group: tp.ParallelAttention(4, 2, group, dtype=F64, rng=0)(floats(1, 2, 4, seed=group.rank)),
    "embedding": lambda group: tp.ParallelEmbedding(5, 4, group, rng=0)(np.array([[1, 2], [2, 1]][group.rank])),
    "indices' shape": lambda group: tp.ParallelEmbedding(5, 4, group, rng=0)(np.zeros(1 + group.rank, int)),
    "labels": lambda group: tp.vocab_parallel_cross_entropy(np.zeros((1, 2)), np.array([group.rank]), group),
}


@pytest.mark.parametrize("call", DIFFERENT.values(), ids=DIFFERENT)
def test_ranks_that_gave_different_inputs_all_say_so(call):
    def run(group):
        with pytest.raises(ferro.UsageError, match="of group 'world' gave different inputs"):
            call(group)

    simulate(run, 2)


def test_one_small_message_for_each_backward_pass_compares_the_gradients():
    traffic = Traffic()

    def run(group):
        model = tp.parallelize(pair(seed=0), group, PAIR)

        def step():
            y, pullback = model.vjp(floats(3, 4))
            pullback(y)

        step()
        step()
        if group.rank == 0:
            traffic.restart()
        step()

    simulate(run, 2, observers=[traffic])
    assert traffic.counts == {"all_reduce": 3}  # the row-parallel output, the column-parallel gradient, the check


def test_data_parallel_replicas_are_compared_each_within_its_group():
    def run(group):
        mesh = DeviceMesh((2, 2), ("dp", "tp"), group)
        model = DDP(tp.parallelize(pair(seed=0), mesh["tp"], PAIR), mesh["dp"])
        for step in range(3):
            y, pullback = model.vjp(floats(3, 4, seed=mesh["dp"].rank + 10 * step))
            pullback(y)

    simulate(run, 4)


def test_a_model_without_arrays_gets_its_pieces_one_layer_after_the_other():
    def build():
        return nn.Sequential(*(nn.Linear(512, 512, rng=seed) for seed in range(4)), nn.LayerNorm(512))

    plan = {"layers.[02]": PAIR["layers.0"], "layers.[13]": PAIR["layers.2"]}

    def run(group):
        with nn.deferred():
            model = build()
        tracemalloc.start()
        tp.parallelize(model, group, plan)
        peak = tracemalloc.get_traced_memory()[1]
        tracemalloc.stop()
        return tp.full_state_dict(model), peak

    expected = build().state_dict()
    layer = 4 * 512 * 512
    for _, peak in simulate(run, 1):
        assert peak < 6 * layer, "4 pieces, one layer that is drawn, and some random numbers"
    for state, _ in simulate(run, 2):
        for name, value in expected.items():
            np.testing.assert_array_equal(state[name], value, err_msg=name)


SEQUENCES = {"sequence_parallel": True}


class Scale(nn.Module):
    """Multiply by one number for each column."""

    def __init__(self, size):
        self.weight = nn.Parameter(np.linspace(0.5, 1.5, size), name="weight")

    def vjp(self, x):
        weight = self.weight.use()

        def pullback(grad_y):
            weight.add_grad((grad_y * x).sum(axis=(0, 1)))
            return grad_y * weight.data

        return x * weight.data, pullback


def sequences():
    rng = np.random.default_rng(0)
    return nn.Sequential(
        nn.Embedding(5, 4, dtype=F64, rng=rng),
        nn.LayerNorm(4, dtype=F64),
        nn.Linear(4, 8, dtype=F64, rng=rng),
        nn.GELU(),
        nn.Linear(8, 4, dtype=F64, rng=rng),
        Scale(4),
        nn.LayerNorm(4, dtype=F64),
        nn.Linear(4, 5, dtype=F64, rng=rng),
    )


def sequence_plan(rest):
    return rest | {
        "layers.0": partial(tp.ParallelEmbedding.from_serial, **SEQUENCES),
        "layers.1": tp.SequenceParallelLayerNorm.from_serial,
        "layers.[27]": partial(tp.ColumnParallelLinear.from_serial, **SEQUENCES),
        "layers.4": partial(tp.RowParallelLinear.from_serial, **SEQUENCES),
    }


def words():
    return np.random.default_rng(0).integers(0, 5, (2, 2, 5))


def test_a_plain_layer_between_sequence_parallel_ones_is_an_error_in_the_first_pass():
    def run(group):
        model = tp.parallelize(sequences(), group, sequence_plan({"layers.5": tp.SumGradients}))
        given, following = words()
        y, pullback = model.vjp(given)
        grad = tp.vocab_parallel_cross_entropy(y, following, group)[1]
        with pytest.raises(ferro.UsageError, match=r"'layers\.6\.bias' differ .* SequenceParallelLayerNorm"):
            pullback(grad)
        plan = sequence_plan({"layers.5": tp.SumGradients})
        unchecked = tp.parallelize(sequences(), group, plan, check_gradients=False)
        y, pullback = unchecked.vjp(given)
        pullback(grad)  # the model sums the gradients of layer 6 by itself

    simulate(run, 2)


@RANKS
@pytest.mark.parametrize("passes", [1, 2])
def test_sum_gradients_completes_the_gradients_of_any_layer(ranks, passes):
    given, following = words()

    def gradients(model, loss_of):
        pulls = [model.vjp(given) for _ in range(passes)]
        for y, pullback in pulls:
            pullback(loss_of(y, following)[1])
        return {name: parameter.grad for name, parameter in model.named_parameters()}

    def run(group):
        plan = sequence_plan({"layers.[56]": tp.SumGradients})
        model = tp.parallelize(sequences(), group, plan)
        grads = gradients(model, partial(tp.vocab_parallel_cross_entropy, group=group))
        return tp.full_state_dict(model, grads)

    expected = gradients(sequences(), nn.cross_entropy)
    for grads in simulate(run, ranks):
        assert list(grads) == list(expected)
        for name, value in expected.items():
            np.testing.assert_allclose(grads[name], value, rtol=1e-10, atol=1e-12, err_msg=name)
