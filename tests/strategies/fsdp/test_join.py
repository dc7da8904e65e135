"""join with FSDP: ranks with different numbers of batches train as one process would."""

import numpy as np
import pytest

import ferro
from ferro_strategies.fsdp import MixedPrecision, ShardingStrategy
from ferro_strategies.nn import BatchNorm, Checkpoint, Linear, Sequential
from ferro_strategies.optim import SGD, AdamW, LossScaler, clip_grad_norm

from .models import Switch, assert_same, backward, build, gathered_grads, grads_of, shard, simulate, train
from .ways import shared_out

pytestmark = pytest.mark.usefixtures("both_ways")

EVERY = list(ShardingStrategy)


def batch(rank, step):
    rng = np.random.default_rng((rank, step))
    return rng.standard_normal((4, 3)), rng.standard_normal((4, 1))


def union(counts, step):
    """Concatenate the batches of the ranks that have one at this step; count these ranks."""
    active = [rank for rank, count in enumerate(counts) if step < count]
    batches = [batch(rank, step) for rank in active]
    return *(np.concatenate(arrays) for arrays in zip(*batches, strict=True)), len(active)


def alone(counts, *, divide_by_all=False, clip=None):
    """Train in one process on what the ranks have at each step."""
    model = build()
    optimizer = AdamW(model.parameters(), lr=0.02)
    for step in range(max(counts)):
        x, target, active = union(counts, step)
        backward(model, x, target)
        if divide_by_all:
            for parameter in model.parameters():
                parameter.grad *= active / len(counts)
        if clip is not None:
            clip_grad_norm(model.parameters(), clip)
        optimizer.lr *= 0.9
        optimizer.step()
        optimizer.zero_grad()
    return model.state_dict()


@shared_out(
    sharding=EVERY,
    case=[
        ((3, 1, 2, 3), False, None),
        ((1, 3, 0, 0), False, 0.05),
        ((0, 2, 4, 1), True, None),
        ((2, 2, 2, 2), True, 0.05),
    ],
)
def test_uneven_batches_train_like_one_process(sharding, case):
    counts, divide_by_all, clip = case

    def run(group):
        model = shard(group, sharding=sharding)
        optimizer = AdamW(model.parameters(), lr=0.02)
        with model.join(optimizer, divide_by_initial_world_size=divide_by_all):
            for step in range(counts[group.rank]):
                backward(model, *batch(group.rank, step))
                if clip is not None:
                    model.clip_grad_norm(clip)
                optimizer.lr *= 0.9
                optimizer.step()
                optimizer.zero_grad()
        assert all(item.grad is None for item in model.parameters())
        joined = model.state_dict()
        # Afterwards all ranks go on together, with the same moments and learning rate.
        return joined, train(model, group.rank, 4, optimizer=optimizer), optimizer.lr

    expected = alone(counts, divide_by_all=divide_by_all, clip=clip)
    results = simulate(run, 4)
    for joined, trained, lr in results:
        assert_same(joined, expected)
        assert_same(trained, results[0][1], rtol=0, atol=0)
        assert lr == results[0][2]


@pytest.mark.parametrize("prefetch", [False, True])
@pytest.mark.parametrize("counts", [(2, 0), (1, 3), (0, 0)], ids=str)
def test_two_ranks_nested_units_and_two_optimizers(prefetch, counts):
    def halves(model):
        held = list(model.parameters())
        return SGD(held[::2], lr=0.1, momentum=0.9), SGD(held[1::2], lr=0.05)

    def steps(model, optimizers, batches):
        for x, target in batches:
            backward(model, x, target)
            for optimizer in optimizers:
                optimizer.step()
                optimizer.zero_grad()

    def run(group):
        model = shard(group, prefetch=prefetch, units=lambda *_: True)
        optimizers = halves(model)
        with model.join(*optimizers):
            mine = [batch(group.rank, step) for step in range(counts[group.rank])]
            steps(model, optimizers, mine)
        return model.state_dict()

    model = build()
    steps(model, halves(model), [union(counts, step)[:2] for step in range(max(counts))])
    for result in simulate(run, 2):
        assert_same(result, model.state_dict())


@pytest.mark.parametrize("sharding", EVERY)
def test_mixed_precision_inside_join(sharding):
    counts = (2, 0, 1, 3)

    def run(group):
        precision = MixedPrecision(param_dtype=np.float32, output_dtype=np.float64)
        model = shard(group, sharding=sharding, mixed_precision=precision)
        optimizer = SGD(model.parameters(), lr=0.1)
        with model.join(optimizer):
            for step in range(counts[group.rank]):
                backward(model, *batch(group.rank, step))
                optimizer.step()
                optimizer.zero_grad()
        return model.state_dict()

    model = build()
    optimizer = SGD(model.parameters(), lr=0.1)
    for step in range(3):
        backward(model, *union(counts, step)[:2])
        optimizer.step()
        optimizer.zero_grad()
    for result in simulate(run, 4):
        assert_same(result, model.state_dict(), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("clips", [False, True])
@pytest.mark.parametrize("sharding", [ShardingStrategy.FULL_SHARD, ShardingStrategy.HYBRID_SHARD])
def test_steps_by_a_loss_scaler_inside_join(sharding, clips):
    """Ranks that have left unscale, agree and step with the others; one step overflows."""
    counts, overflows = (3, 0, 1, 4), 2

    def run(group):
        model = shard(group, sharding=sharding)
        optimizer = AdamW(model.parameters(), lr=0.02)
        scaler = LossScaler(initial_scale=8.0, growth_interval=2, group=group)
        with model.join(optimizer, scaler=scaler):
            for step in range(counts[group.rank]):
                x, target = batch(group.rank, step)
                y, pullback = model.vjp(x)
                grad = scaler.scale(2 * (y - target) / y.size)
                if (group.rank, step) == (3, overflows):
                    grad[...] = np.inf
                with np.errstate(invalid="ignore"):
                    pullback(grad)
                if clips:
                    scaler.unscale(optimizer)
                    model.clip_grad_norm(0.5)
                assert scaler.step(optimizer) == (step != overflows)
                optimizer.zero_grad()
        return model.state_dict(), scaler.current_scale

    model = build()
    optimizer = AdamW(model.parameters(), lr=0.02)
    for step in range(4):
        backward(model, *union(counts, step)[:2])
        if clips:
            clip_grad_norm(model.parameters(), 0.5)
        if step != overflows:
            optimizer.step()
        optimizer.zero_grad()
    for state, scale in simulate(run, 4):
        assert_same(state, model.state_dict())
        assert scale == 8.0, "doubled after two steps, halved by the third"


def test_a_scaler_given_on_other_ranks_only_is_asked_for():
    def run(group):
        model = shard(group)
        optimizer = SGD(model.parameters(), lr=0.1)
        if group.rank:
            with pytest.raises(ferro.UsageError, match="scaler=scaler"), model.join(optimizer):
                pass
            raise KeyError  # so that rank 0 does not wait
        scaler = LossScaler(group=group)
        with model.join(optimizer, scaler=scaler):
            backward(model, *batch(0, 0))
            scaler.step(optimizer)

    with pytest.raises(KeyError):
        simulate(run, 2)


def test_gradients_that_stay_are_added_to():
    """Without zero_grad, gradients of a rank that has joined accumulate as on the others."""
    counts = (1, 3)

    def run(group):
        model = shard(group)
        with model.join(SGD(model.parameters(), lr=1.0)):
            for step in range(counts[group.rank]):
                backward(model, *batch(group.rank, step))
        return gathered_grads(model)

    model = build()
    for step in range(3):
        backward(model, *union(counts, step)[:2])
    for result in simulate(run, 2):
        assert_same(result, grads_of(model))


def test_gradients_are_absent_afterwards_where_they_are_on_the_last_rank():
    def run(group):
        model = shard(group)
        with model.join(SGD(model.parameters(), lr=1.0)):
            backward(model, *batch(group.rank, 0))
            if group.rank == 1:
                model.zero_grad()
                backward(model, *batch(1, 1))
                model.zero_grad()
        assert all(item.grad is None for item in model.parameters())

    simulate(run, 3)


def test_units_left_out_by_the_others_are_not_updated():
    def run(group):
        model = shard(group, Switch())
        optimizer = SGD(model.parameters(), lr=0.5)
        with model.join(optimizer):
            for step in range(1 + 2 * group.rank):
                model.module.chosen = [0, 1, 2] if step == 0 else [2]
                optimizer.zero_grad()
                y, pullback = model.vjp(np.ones(1))
                pullback(np.ones_like(y))
                optimizer.step()
        return [float(value[0]) for value in model.state_dict().values()]

    assert simulate(run, 2) == [[0.5, 1.5, 1.5]] * 2


@pytest.mark.parametrize("sharding", EVERY)
def test_accumulation_and_several_in_flight_inside_join(sharding):
    counts = (1, 2, 2, 0)

    def run(group):
        model = shard(group, sharding=sharding)
        with model.join(SGD(model.parameters(), lr=1.0)):
            for step in range(counts[group.rank]):
                parts = [batch(group.rank, 3 * step + part) for part in range(3)]
                with model.no_sync():
                    backward(model, *parts[0])
                passes = [(model.vjp(x), target) for x, target in parts[1:]]
                for (y, pullback), target in passes:
                    pullback(2 * (y - target) / y.size)
        return gathered_grads(model)

    model = build()
    for step, ranks in ((0, (0, 1, 2)), (1, (1, 2))):
        for rank in ranks:
            for part in range(3):
                x, target = batch(rank, 3 * step + part)
                y, pullback = model.vjp(x)
                pullback(2 * (y - target) / y.size / len(ranks))
    for result in simulate(run, 4):
        assert_same(result, grads_of(model))


def test_evaluation_and_checkpointing_inside_join():
    counts = (0, 2, 1)

    def checkpointed():
        model = build()
        model.layers = [Checkpoint(layer) for layer in model.layers]
        return model

    def run(group):
        model = shard(group, checkpointed(), units=lambda _, module: isinstance(module, Linear))
        with model.join(SGD(model.parameters(), lr=1.0)):
            for step in range(counts[group.rank]):
                model(batch(group.rank, step)[0])
                backward(model, *batch(group.rank, step))
        return gathered_grads(model)

    model = build()
    for step in range(2):
        backward(model, *union(counts, step)[:2])
    for result in simulate(run, 3):
        assert_same(result, grads_of(model))


def test_buffers_are_those_of_a_rank_that_was_last():
    counts = (1, 3, 2)

    def run(group):
        model = shard(group, Sequential(Linear(3, 2, dtype=np.float64), BatchNorm(2, dtype=np.float64)))
        with model.join(SGD(model.parameters(), lr=1.0)):
            for step in range(counts[group.rank]):
                model.vjp(batch(group.rank, step)[0])[1](np.ones((4, 2)))
            mean = next(model.buffers()).data.copy()
        return mean, next(model.buffers()).data.copy()

    results = simulate(run, 3)
    for _, after in results:
        np.testing.assert_array_equal(after, results[1][0])


def test_ranks_at_different_steps_are_told():
    def run(group):
        model = shard(group)
        optimizer = SGD(model.parameters(), lr=0.1)

        def steps():
            with model.join(optimizer):
                backward(model, *batch(group.rank, 0))
                if group.rank == 0:
                    optimizer.step()
                backward(model, *batch(group.rank, 1))

        words = r"FSDP.join: .* \(rank 0: STEP, rank 1: GATHER of 'layers.0'\)"
        with pytest.raises(ferro.UsageError, match=words):
            steps()

    simulate(run, 2)


def test_calls_not_allowed_inside_join_are_refused():
    def run(group):
        model = shard(group)
        with model.join(SGD(model.parameters(), lr=1.0)):
            with pytest.raises(ferro.UsageError, match="inside join"), model.join(SGD(model.parameters(), lr=1.0)):
                pass
            with pytest.raises(ferro.UsageError, match="not inside join"):
                model.state_dict()

        def leaves_early():
            with model.join(SGD(model.parameters(), lr=1.0)), model.no_sync():
                backward(model, *batch(0, 0))

        with pytest.raises(ferro.UsageError, match="no_sync"):
            leaves_early()
        model.zero_grad()
        with pytest.raises(KeyError), model.join(SGD(model.parameters(), lr=1.0)):
            raise KeyError
        return train(model, group.rank, 2)

    for result in simulate(run, 2):
        assert_same(result, train(build()))


def test_training_without_the_optimizer_is_refused():
    def run(group):
        model = shard(group, Linear(4, 3))
        with pytest.raises(ferro.UsageError, match=r"no optimizer is given"), model.join():
            pass
        with model.eval().join():
            return model(np.ones((1, 4), np.float32)).shape

    assert simulate(run, 2) == [(1, 3)] * 2
