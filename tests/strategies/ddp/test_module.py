"""DDP: replicas train like one process, and models that differ are refused."""

import numpy as np
import pytest

import ferro
from ferro_strategies import DDP, FSDP
from ferro_strategies.nn import (
    BatchNorm,
    Conv2d,
    Embedding,
    Flatten,
    LayerNorm,
    Linear,
    Module,
    ReLU,
    Sequential,
    cross_entropy,
)
from ferro_strategies.optim import SGD, AdamW
from ferro_strategies.tensor_parallel import ColumnParallelLinear

SMALL = {"bucket_bytes": 256, "first_bucket_bytes": 64}


def simulate(function, world_size):
    return ferro.simulate(function, world_size, timeout_s=10, run_timeout_s=30)


class Everything(Module):
    """A model from images (N, 1, 6, 6) to 3 classes with most kinds of layers, one used twice."""

    def __init__(self, dtype):
        self.trunk = Sequential(Conv2d(1, 2, 3, dtype=dtype, rng=0), Flatten(), Linear(32, 8, dtype=dtype, rng=1))
        self.table = Embedding(5, 8, dtype=dtype, rng=2)
        self.norm = LayerNorm(8, dtype=dtype)
        tied = Linear(8, 8, dtype=dtype, rng=3)
        self.head = Sequential(tied, ReLU(), tied, Linear(8, 3, dtype=dtype, rng=4))

    def vjp(self, x):
        h, pull_trunk = self.trunk.vjp(x)
        words = (np.abs(x).sum(axis=(1, 2, 3)) * 7).astype(np.int64) % 5
        e, pull_table = self.table.vjp(words)
        z, pull_norm = self.norm.vjp(h + e)
        y, pull_head = self.head.vjp(z)

        def pullback(grad):
            grad = pull_norm(pull_head(grad))
            pull_table(grad)
            return pull_trunk(grad)

        return y, pullback


def batches(dtype, count=4, size=12):
    rng = np.random.default_rng(7)
    return [(rng.standard_normal((size, 1, 6, 6)).astype(dtype), rng.integers(0, 3, size)) for _ in range(count)]


def train(model, optimizer, data):
    for x, labels in data:
        y, pullback = model.vjp(x)
        pullback(cross_entropy(y, labels)[1])
        optimizer.step()
        optimizer.zero_grad()
    return model.state_dict()


OPTIMIZERS = {
    "sgd": lambda parameters: SGD(parameters, lr=0.1, momentum=0.9),
    "adamw": lambda parameters: AdamW(parameters, lr=0.01),
}


@pytest.mark.parametrize("world_size", [1, 2, 3, 4])
@pytest.mark.parametrize("optimizer", OPTIMIZERS)
@pytest.mark.parametrize(("dtype", "atol"), [(np.float64, 1e-12), (np.float32, 1e-4)])
def test_ranks_train_like_one_process(world_size, optimizer, dtype, atol):
    build = OPTIMIZERS[optimizer]
    alone = Everything(dtype)
    expected = train(alone, build(alone.parameters()), batches(dtype))

    def run(group):
        model = DDP(Everything(dtype), group, **SMALL)
        share = slice(group.rank, None, group.world_size)
        mine = [(x[share], labels[share]) for x, labels in batches(dtype)]
        return train(model, build(model.parameters()), mine)

    results = simulate(run, world_size)
    for name, value in expected.items():
        np.testing.assert_allclose(results[0][name], value, rtol=0, atol=atol, err_msg=name)
        for other in results:
            np.testing.assert_array_equal(other[name], results[0][name], err_msg=name)


def test_every_rank_starts_with_the_values_of_rank_0():
    def run(group):
        model = Sequential(Linear(300, 5, rng=group.rank), BatchNorm(5), Linear(5, 2))
        model.layers[1].running_mean.data += group.rank
        return DDP(model, group, **SMALL).state_dict()

    results = simulate(run, 3)
    np.testing.assert_array_equal(results[0]["layers.0.weight"], Linear(300, 5, rng=0).weight.data)
    for name, value in results[0].items():
        for other in results[1:]:
            np.testing.assert_array_equal(other[name], value, err_msg=name)


def test_gradients_are_means_and_views_of_few_buckets():
    def run(group):
        model = DDP(Sequential(Linear(2, 3, rng=0), Linear(3, 1, rng=1)), group)
        y, pullback = model.vjp(np.full((1, 2), group.rank, np.float32))
        pullback(np.ones_like(y))
        return {name: item.grad for name, item in model.named_parameters()}

    first, second = simulate(run, 2)
    np.testing.assert_array_equal(first["layers.1.bias"], [1.0])
    for name in first:
        np.testing.assert_array_equal(first[name], second[name])
    owners = {id(grad.base) for grad in first.values()}
    assert len(owners) == 1


def test_mixed_dtypes_do_not_share_buckets():
    class Mixed(Module):
        def __init__(self):
            self.wide = Linear(2, 2, dtype=np.float64, rng=0)
            self.narrow = Linear(2, 2, rng=1)

        def vjp(self, x):
            y, pull_wide = self.wide.vjp(x)
            z, pull_narrow = self.narrow.vjp(y.astype(np.float32))
            return z, lambda grad: pull_wide(pull_narrow(grad).astype(np.float64))

    def run(group):
        model = DDP(Mixed(), group)
        y, pullback = model.vjp(np.full((1, 2), 1.0 + group.rank))
        pullback(np.ones_like(y))
        return {name: item.grad for name, item in model.named_parameters()}

    alone = Mixed()
    y, pullback = alone.vjp(np.array([[1.0, 1.0], [2.0, 2.0]]))
    pullback(np.full_like(y, 0.5))
    first, _ = simulate(run, 2)
    for name, parameter in alone.named_parameters():
        assert first[name].dtype == parameter.data.dtype
        np.testing.assert_allclose(first[name], parameter.grad, rtol=1e-6, err_msg=name)


# -- buffers ---------------------------------------------------------------------------------------


def normed(group, **options):
    return DDP(Sequential(Linear(2, 3, rng=0), BatchNorm(3)), group, **options)


def rows(group, step):
    return np.random.default_rng((group.rank, step)).standard_normal((4, 2)).astype(np.float32)


@pytest.mark.parametrize("share", [True, False])
def test_training_begins_with_the_buffers_of_rank_0(share):
    def run(group):
        model = normed(group, broadcast_buffers=share)
        statistics = model.module.layers[1]
        model.vjp(rows(group, 0))
        after_first = statistics.running_mean.data.copy()
        inputs = model.module.layers[0](rows(group, 1))
        model.vjp(rows(group, 1))
        # running = 0.9 * before + 0.1 * mean of the batch
        return after_first, (statistics.running_mean.data - 0.1 * inputs.mean(axis=0)) / 0.9

    results = simulate(run, 2)
    source = [0, 0] if share else [0, 1]
    for rank in range(2):
        np.testing.assert_allclose(results[rank][1], results[source[rank]][0], atol=1e-6)
    assert not np.allclose(results[0][0], results[1][0])


def test_evaluation_and_accumulation_leave_buffers_alone():
    def run(group):
        model = normed(group)
        buffer = model.module.layers[1].running_mean
        buffer.data[...] = group.rank
        model.eval()
        model.vjp(rows(group, 0))
        assert (buffer.data == group.rank).all()
        model.train()
        assert model.module.layers[1].training
        inputs = model.module.layers[0](rows(group, 0))
        with model.no_sync():
            model.vjp(rows(group, 0))
        expected = 0.9 * group.rank + 0.1 * inputs.mean(axis=0)
        np.testing.assert_allclose(buffer.data, expected, atol=1e-6)

    simulate(run, 2)


def test_the_output_alone_is_one_ranks_own_affair():
    def run(group):
        model = normed(group)
        if group.rank == 1:
            x = rows(group, 0)
            np.testing.assert_array_equal(model(x), model.module(x))

    simulate(run, 2)


# -- names and state -------------------------------------------------------------------------------


def test_state_goes_round_with_and_without_ddp():
    def run(group):
        model = normed(group)
        state = model.state_dict()
        plain = Sequential(Linear(2, 3, rng=5), BatchNorm(3))
        assert set(state) == set(plain.state_dict())
        model.load_state_dict(plain.state_dict())
        np.testing.assert_array_equal(model.module.layers[0].weight.data, plain.layers[0].weight.data)
        plain.load_state_dict(state)
        np.testing.assert_array_equal(plain.state_dict()["layers.0.weight"], state["layers.0.weight"])
        assert [name for name, _ in model.named_parameters()] == [
            "layers.0.weight",
            "layers.0.bias",
            "layers.1.weight",
            "layers.1.bias",
        ]
        assert next(item.name for item in model.parameters()) == "layers.0.weight"
        assert len(list(model.buffers())) == 3

    simulate(run, 1)


def test_a_layer_that_is_removed_after_wrapping_leaves_the_state():
    def run(group):
        model = normed(group)
        del model.module.layers[1]
        assert set(model.state_dict()) == {"layers.0.weight", "layers.0.bias"}

    simulate(run, 1)


def test_it_is_found_by_name():
    assert ferro.strategies.get("ddp") is DDP
    assert "gradients" in ferro.strategies.available()["ddp"]


# -- refusals --------------------------------------------------------------------------------------


def refusals(build, world_size=3, **options):
    """Collect every rank's message; check that the group is usable and no model was changed."""

    def run(group):
        model = build(group.rank)
        before = model.state_dict()
        with pytest.raises(ferro.UsageError) as caught:
            DDP(model, group, **{name: value(group.rank) for name, value in options.items()})
        for name, value in model.state_dict().items():
            np.testing.assert_array_equal(value, before[name])
        assert group.all_reduce(1) == world_size
        return str(caught.value)

    return simulate(run, world_size)


@pytest.mark.parametrize(
    ("build", "words"),
    [
        (
            lambda rank: Sequential(ReLU(), Linear(2, 5 if rank == 2 else 4)),
            ["'layers.1.weight'", "(2, 4)", "(2, 5)", "rank 0", "rank 2"],
        ),
        (
            lambda rank: Linear(2, 3, dtype=np.float64 if rank == 1 else np.float32),
            ["'weight'", "float32", "float64", "rank 1"],
        ),
        (lambda rank: Linear(2, 3, bias=rank == 0), ["'bias'", "nothing more", "rank 1"]),
        (
            lambda rank: Sequential(Linear(2, 3), BatchNorm(3) if rank else ReLU()),
            ["nothing more", "'layers.1.weight'"],
        ),
    ],
    ids=["shape", "dtype", "absent", "extra"],
)
def test_models_that_differ_are_refused_on_every_rank(build, words):
    messages = refusals(build)
    assert len(set(messages)) == 1
    for word in words:
        assert word in messages[0]


def test_parameters_frozen_on_one_rank_only_are_refused():
    def build(rank):
        model = Linear(2, 3)
        model.bias.requires_grad = rank == 0
        return model

    assert all("'bias', float32 (3,), frozen" in message for message in refusals(build))


def test_options_that_differ_are_refused():
    messages = refusals(lambda rank: Linear(2, 3), bucket_bytes=lambda rank: 100 + rank)
    assert all("bucket_bytes=100" in m and "bucket_bytes=101" in m for m in messages)


@pytest.mark.parametrize("options", [{}, {"find_unused": True}, {"check_replicas": False}])
def test_a_model_without_trainable_parameters_has_nothing_to_average(options):
    def run(group):
        model = DDP(ReLU(), group, **options)
        for _ in range(2):
            y, pullback = model.vjp(np.full((1, 2), group.rank - 0.5))
            grad = pullback(np.ones_like(y))
            with model.no_sync():
                model.vjp(np.ones((1, 2)))[1](np.ones((1, 2)))
            model.sync_gradients()
        return grad.tolist()

    assert simulate(run, 2) == [[[0.0, 0.0]], [[1.0, 1.0]]]


@pytest.mark.parametrize("name", ["bucket_bytes", "first_bucket_bytes"])
def test_buckets_of_no_size_are_refused(name):
    assert all(name in m for m in refusals(lambda rank: Linear(2, 3), **{name: lambda rank: 0}))


def test_a_parameter_that_thaws_is_refused():
    def run(group):
        model = Linear(2, 3)
        model.bias.requires_grad = False
        model = DDP(model, group)
        y, pullback = model.vjp(np.ones((1, 2), np.float32))
        pullback(y)
        assert model.module.bias.grad is None
        model.module.bias.requires_grad = True
        with pytest.raises(ferro.UsageError, match="'bias' was frozen"):
            model.vjp(np.ones((1, 2), np.float32))

    simulate(run, 2)


def test_a_parameter_added_after_wrapping_is_refused_when_training_is_chosen_again():
    def run(group):
        model = DDP(Sequential(Linear(2, 3)), group)
        assert model.eval().train() is model
        model.module.layers.append(Linear(3, 1))
        with pytest.raises(ferro.UsageError, match=r"'layers\.1\.weight' was frozen or absent"):
            model.train()

    simulate(run, 2)


def test_a_second_wrapping_takes_the_gradients_from_the_first():
    def run(group):
        module = Linear(2, 3, rng=0)
        first, second = DDP(module, group), DDP(module, group)
        y, pullback = second.vjp(np.ones((1, 2), np.float32))
        pullback(y)
        second.zero_grad()
        y, pullback = first.vjp(np.ones((1, 2), np.float32))
        with pytest.raises(ferro.UsageError, match="Wrap a module once"):
            pullback(y)

    simulate(run, 2)


@pytest.mark.parametrize("wrap", [DDP, FSDP])
def test_parameters_in_pieces_over_the_same_ranks_are_refused(wrap):
    def run(group):
        pair, column = group.split(group.rank // 2), group.split(group.rank % 2)
        model = Sequential(ColumnParallelLinear(4, 6, pair, rng=0))
        before = model.layers[0].weight.data.copy()
        for wrong in (pair, group):
            with pytest.raises(ferro.UsageError, match=r"'layers.0.weight' is in pieces over"):
                wrap(model, wrong)
        np.testing.assert_array_equal(model.layers[0].weight.data, before)
        wrap(model, column)

    simulate(run, 4)
