"""SyncBatchNorm: equal to BatchNorm on the batch of all ranks in one process."""

import ml_dtypes
import numpy as np
import pytest

import ferro
from ferro_strategies import DDP, FSDP
from ferro_strategies.nn import (
    BatchNorm,
    Conv2d,
    Flatten,
    LayerNorm,
    Linear,
    Module,
    ReLU,
    Residual,
    Sequential,
    cross_entropy,
)
from ferro_strategies.optim import SGD
from ferro_strategies.sync_batchnorm import (
    SyncBatchNorm,
    SyncBatchNorm1d,
    SyncBatchNorm2d,
    SyncBatchNorm3d,
    convert_sync_batchnorm,
)
from ferro_testing import run_ranks

F64 = np.float64
CHANNELS = 3


def simulate(function, world_size, observers=()):
    return ferro.simulate(function, world_size, timeout_s=5, run_timeout_s=20, observers=observers)


def floats(*shape, seed=0, dtype=F64):
    # Channels differ in mean and spread, and so do rows: each rank's statistics are its own.
    rng = np.random.default_rng(seed)
    channel = np.arange(1, CHANNELS + 1).reshape(1, -1, *[1] * (len(shape) - 2))
    row = np.arange(shape[0]).reshape(-1, *[1] * (len(shape) - 1))
    return (channel * rng.standard_normal(shape) + 2 * channel + row).astype(dtype)


def scrambled(norm):
    rng = np.random.default_rng(5)
    for parameter in norm.parameters():
        parameter.data += rng.standard_normal(CHANNELS).astype(parameter.data.dtype)
    return norm


def passes(norm, steps):
    """Make passes; return outputs, input gradients, and all of the module's state and gradients."""
    outputs, grads = [], []
    for x, grad_y in steps:
        y, pullback = norm.vjp(x)
        outputs.append(y)
        grads.append(pullback(grad_y))
    sums = {f"grad {name}": item.grad for name, item in norm.named_parameters()}
    return np.concatenate(outputs), np.concatenate(grads), norm.state_dict(), sums


def compare(kind, rest, sizes, *, dtype=F64, tolerance=1e-12, **options):
    """Two steps on batches of these sizes, against one process with all of them together."""
    starts = np.cumsum([0, *sizes])
    steps = [
        (
            floats(starts[-1], CHANNELS, *rest, seed=seed, dtype=dtype),
            floats(starts[-1], CHANNELS, *rest, seed=seed + 9, dtype=dtype),
        )
        for seed in (1, 2)
    ]
    y, grad_x, state, sums = passes(scrambled(BatchNorm(CHANNELS, **options, dtype=dtype)), steps)

    def run(group):
        rows = slice(starts[group.rank], starts[group.rank + 1])
        norm = scrambled(kind(CHANNELS, group, **options, dtype=dtype))
        return passes(norm, [(x[rows], grad[rows]) for x, grad in steps])

    results = simulate(run, len(sizes))

    def close(actual, expected, what):
        # Running statistics and parameters' gradients are float32 in half precision.
        kept = np.promote_types(dtype, np.float32) if "running" in what or "grad " in what else dtype
        assert actual.dtype == expected.dtype == (np.int64 if "tracked" in what else kept)
        atol = tolerance * np.abs(expected).max(initial=1)
        np.testing.assert_allclose(actual, expected, rtol=tolerance, atol=atol, err_msg=what)

    for at, (whole, what) in enumerate([(y, "output"), (grad_x, "gradient of the input")]):
        firsts = [result[at][:size] for result, size in zip(results, sizes, strict=True)]
        seconds = [result[at][size:] for result, size in zip(results, sizes, strict=True)]
        close(np.concatenate([*firsts, *seconds]), whole, what)
    for name, value in state.items():
        for result in results:
            close(result[2][name], value, name)
            np.testing.assert_array_equal(result[2][name], results[0][2][name])
    for name, value in sums.items():
        close(np.sum([result[3][name] for result in results], axis=0, dtype=value.dtype), value, f"sum of {name}")


KINDS = {
    "rows": (SyncBatchNorm1d, ()),
    "sequences": (SyncBatchNorm1d, (4,)),
    "images": (SyncBatchNorm2d, (3, 2)),
    "volumes": (SyncBatchNorm3d, (2, 1, 3)),
    "any": (SyncBatchNorm, (2, 1, 2, 2)),
}
SIZES = [(5,), (3, 3), (1, 4), (0, 3), (2, 0, 5), (4, 1, 2, 3), (0, 0, 2, 0)]


@pytest.mark.parametrize(("kind", "rest"), KINDS.values(), ids=KINDS)
@pytest.mark.parametrize("sizes", SIZES, ids=str)
def test_equals_batchnorm_on_the_whole_batch(kind, rest, sizes):
    compare(kind, rest, sizes)


@pytest.mark.parametrize(
    "options",
    [{"affine": False}, {"momentum": None}, {"momentum": 0.7, "eps": 0.3}],
    ids=["plain", "cumulative", "options"],
)
def test_options_mean_what_they_mean_for_batchnorm(options):
    compare(SyncBatchNorm2d, (2, 2), (2, 0, 3), **options)


@pytest.mark.parametrize(("dtype", "tolerance"), [(np.float32, 2e-6), (np.float16, 2e-3), (ml_dtypes.bfloat16, 2e-2)])
def test_narrower_dtypes(dtype, tolerance):
    compare(SyncBatchNorm2d, (3, 3), (4, 1, 2), dtype=dtype, tolerance=tolerance)


def test_statistics_do_not_cancel_far_from_zero():
    def run(group):
        x = 1e7 + floats(4, CHANNELS, 8, seed=group.rank)
        norm = SyncBatchNorm1d(CHANNELS, group, momentum=1.0, eps=0.0, dtype=F64)
        return x, norm(x), norm.running_var.data

    xs, ys, variances = zip(*simulate(run, 3), strict=True)
    whole = np.concatenate(xs) - 1e7
    exact = np.moveaxis(whole, 1, 0).reshape(CHANNELS, -1)
    for var in variances:
        np.testing.assert_allclose(var, exact.var(1, ddof=1), rtol=1e-8)
    y = np.moveaxis(np.concatenate(ys), 1, 0).reshape(CHANNELS, -1)
    np.testing.assert_allclose(y.mean(1), 0, atol=1e-7)
    np.testing.assert_allclose(y.std(1), 1, rtol=1e-8)


def test_sums_over_many_values_do_not_overflow_half_precision():
    x = np.concatenate([np.full((1, 1, 300, 300), value, np.float16) for value in (1, 3)])

    def run(group):
        norm = SyncBatchNorm2d(1, group, momentum=1.0, dtype=np.float16)
        y, pullback = norm.vjp(x[group.rank :: 2])
        pullback(np.full_like(y, 0.5))
        return y, norm.running_mean.data, norm.bias.grad

    for rank, (y, mean, grad_bias) in enumerate(simulate(run, 2)):
        np.testing.assert_allclose(y, 2 * rank - 1, rtol=1e-3)
        assert (mean, grad_bias) == (2, 45_000)


def test_constant_channels_have_no_variance():
    def run(group):
        x = np.full((2, CHANNELS), 0.1, np.float32)
        norm = SyncBatchNorm1d(CHANNELS, group, momentum=1.0)
        y = norm(x)
        return y, norm.running_var.data

    for y, var in simulate(run, 3):
        np.testing.assert_allclose(y, 0, atol=1e-5)
        assert ((var >= 0) & (var < 1e-12)).all()


def test_one_message_forward_one_backward_and_none_in_evaluation():
    metrics = ferro.Metrics()

    def run(group):
        norm = SyncBatchNorm2d(CHANNELS, group)
        x = floats(2, CHANNELS, 2, 2, dtype=np.float32)
        pullback = norm.vjp(x)[1]
        norm.eval()  # after the forward pass: the pullback remains one of training
        pullback(x)
        if group.rank == 0:  # alone
            y, pullback = norm.vjp(x)
            inverse = 1 / np.sqrt(norm.running_var.data + norm.eps)
            np.testing.assert_allclose(
                pullback(np.ones_like(y)), np.broadcast_to(inverse[:, None, None], x.shape), 1e-6
            )
            norm(x)

    simulate(run, 2, observers=[metrics])
    counts = {op: total.count for (_, op), total in metrics.totals().items()}
    assert counts == {"all_gather": 2, "all_reduce": 2}  # one on each rank


def test_several_microbatches_in_flight():
    def run(group):
        norm = SyncBatchNorm1d(CHANNELS, group, dtype=F64)
        one, two = (floats(3, CHANNELS, seed=group.rank + at) for at in (10, 20))
        _, pull_one = norm.vjp(one)
        _, pull_two = norm.vjp(two)
        late = pull_two(two), pull_one(one)
        _, pull_one = norm.vjp(one)
        early = pull_one(one)
        _, pull_two = norm.vjp(two)
        np.testing.assert_array_equal(late[1], early)
        np.testing.assert_array_equal(late[0], pull_two(two))

    simulate(run, 2)


def test_a_batch_of_one_value_is_refused_on_all_ranks_and_moves_nothing():
    def run(group):
        norm = SyncBatchNorm1d(CHANNELS, group, dtype=F64)
        x = np.ones((1 - group.rank, CHANNELS))
        with pytest.raises(ferro.UsageError, match=r"SyncBatchNorm1d\(3, .*with 1\."):
            norm.vjp(x)
        assert norm.num_batches_tracked.data == 0
        np.testing.assert_array_equal(norm.running_mean.data, 0)
        assert norm(np.ones((2 * group.rank, CHANNELS))).shape == (2 * group.rank, CHANNELS)

    simulate(run, 2)


@pytest.mark.parametrize(
    ("kind", "shape", "takes"),
    [
        (SyncBatchNorm1d, (2, 3, 1, 1), r"\(N, 3\) or \(N, 3, L\)"),
        (SyncBatchNorm1d, (2, 4), r"\(N, 3\) or \(N, 3, L\)"),
        (SyncBatchNorm2d, (2, 3, 1), r"\(N, 3, H, W\)"),
        (SyncBatchNorm2d, (2, 3, 1, 1, 1), r"\(N, 3, H, W\)"),
        (SyncBatchNorm3d, (2, 3, 1, 1), r"\(N, 3, D, H, W\)"),
        (SyncBatchNorm, (3,), r"\(N, 3\) or \(N, 3, \.\.\.\)"),
    ],
)
def test_each_kind_takes_its_shapes_only(kind, shape, takes):
    def run(group):
        with pytest.raises(ferro.UsageError, match=rf"{kind.__name__}\(3.*{takes}, got"):
            kind(3, group)(np.zeros(shape, np.float32))
        with pytest.raises(ferro.UsageError, match="dtype float32"):
            kind(3, group)(np.zeros(shape))
        with pytest.raises(ferro.UsageError, match=f"{kind.__name__}: num_features"):
            kind(0, group)

    simulate(run, 1)


# --- conversion, and training with DDP ---


class Holder(Module):
    """A module with norms in a list and a dict, one of them twice."""

    def __init__(self):
        shared = BatchNorm(2)
        self.norms = [shared, Residual(shared), LayerNorm(2)]
        self.named = {"last": BatchNorm(2, eps=0.5, momentum=None, affine=False, dtype=F64)}

    def vjp(self, x):
        raise NotImplementedError


def test_conversion_keeps_parameters_buffers_names_and_settings():
    def run(group):
        model = Holder()
        last = model.named["last"].eval()
        parameters, buffers = dict(model.named_parameters()), dict(model.named_buffers())
        assert convert_sync_batchnorm(model, group) is model
        assert dict(model.named_parameters()) == parameters  # by identity
        assert dict(model.named_buffers()) == buffers
        first, residual, layer = model.norms
        assert type(first) is SyncBatchNorm
        assert residual.module is first
        assert type(layer) is LayerNorm
        new = model.named["last"]
        assert type(new) is SyncBatchNorm
        assert (new.eps, new.momentum, new.weight, new.training) == (0.5, None, None, False)
        assert first.training
        assert new.running_mean is last.running_mean
        again = convert_sync_batchnorm(model, group)
        assert again.norms[0] is first
        norm = BatchNorm(2)
        root = convert_sync_batchnorm(norm, group)
        assert type(root) is SyncBatchNorm
        assert root.weight is norm.weight

    simulate(run, 1)


def make_model():
    return Sequential(
        BatchNorm(1, dtype=F64),  # first of all: its parameters have gradients, too
        Conv2d(1, 3, 2, rng=1, dtype=F64),
        BatchNorm(3, momentum=None, dtype=F64),
        ReLU(),
        Flatten(),
        Linear(12, 4, rng=2, dtype=F64),
        BatchNorm(4, dtype=F64),
        Linear(4, 3, rng=3, dtype=F64),
    )


def train(model, optimizer, rank=0, ranks=1):
    rng = np.random.default_rng(0)
    for _ in range(3):
        x, labels = rng.standard_normal((12, 1, 3, 3)), rng.integers(0, 3, 12)
        y, pullback = model.vjp(x[rank::ranks])
        pullback(cross_entropy(y, labels[rank::ranks])[1])
        optimizer.step()
        optimizer.zero_grad()
    return model.state_dict()


def train_alone():
    model = make_model()
    return train(model, SGD(model.parameters(), lr=0.2, momentum=0.9))


def wrap_in_ddp(model, group):
    return DDP(model, group, bucket_bytes=256, first_bucket_bytes=64, broadcast_buffers=False)


def train_replica(group, wrap=wrap_in_ddp, *, convert_first=True):
    model = make_model()
    optimizer = SGD(model.parameters(), lr=0.2, momentum=0.9)  # made before, valid after
    if convert_first:
        wrapped = wrap(convert_sync_batchnorm(model, group), group)
    else:
        wrapped = wrap(model, group)
        assert convert_sync_batchnorm(wrapped, group) is wrapped
    assert [type(module) for module in wrapped.modules()].count(SyncBatchNorm) == 3
    return train(wrapped, optimizer, group.rank, group.world_size)


def check_replicas(states):
    expected = train_alone()
    for state in states:
        assert state.keys() == expected.keys()
        for name, value in expected.items():
            np.testing.assert_allclose(state[name], value, rtol=1e-9, atol=1e-11, err_msg=name)
            np.testing.assert_array_equal(state[name], states[0][name], err_msg=name)


@pytest.mark.parametrize("world_size", [1, 2, 3, 4])
def test_replicas_train_like_one_process(world_size):
    check_replicas(simulate(train_replica, world_size))


@pytest.mark.parametrize("wrap", [wrap_in_ddp, FSDP])
def test_conversion_may_come_after_wrapping(wrap):
    check_replicas(simulate(lambda group: train_replica(group, wrap, convert_first=False), 2))


def test_replicas_train_like_one_process_between_processes():
    check_replicas(run_ranks(train_replica, 2, backend="gloo"))


@pytest.mark.parametrize("dtype", [np.float64, np.float16])
def test_without_rows_on_any_rank_there_is_nothing_to_normalise(dtype):
    def run(group):
        norm = SyncBatchNorm(3, group, dtype=dtype)
        y, pullback = norm.vjp(np.zeros((0, 3, 2), dtype))
        grad = pullback(y)
        assert (y.shape, grad.shape, int(norm.num_batches_tracked.data)) == ((0, 3, 2), (0, 3, 2), 0)
        assert norm.weight.grad.tolist() == norm.running_mean.data.tolist() == [0, 0, 0]
        assert norm.running_var.data.tolist() == [1, 1, 1]

    ferro.simulate(run, 2, timeout_s=20.0)
