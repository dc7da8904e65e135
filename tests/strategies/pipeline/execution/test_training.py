"""Pipeline: loss and gradients equal those of one process, whatever the schedule and the batch."""

import ml_dtypes
import numpy as np
import pytest

from ferro_strategies.nn import BatchNorm, Checkpoint, Linear, Module, Sequential, cross_entropy, mse_loss
from ferro_strategies.optim import SGD
from ferro_strategies.pipeline import Action, Kind, Pipeline, PipelineSchedule

from .pipeline_models import CLASSES, WORDS, alone, assert_equal, batch, gradients, make_stages, share, simulate

SCHEDULES = ["gpipe", "1f1b", "interleaved_1f1b", "zb_h1"]


def stepped(ranks, stages, inputs, targets, loss=cross_entropy, **options):
    """Loss and gradients of one step, by rank."""

    def run(group):
        pipeline = Pipeline(share(stages(), group), group, **options)
        first, last = group.rank == 0, group.rank == (len(stages()) - 1) % ranks
        value = pipeline.step(inputs if first else None, targets if last else None, loss)
        return value, gradients(pipeline)

    return simulate(run, ranks)


@pytest.mark.parametrize("schedule", SCHEDULES)
@pytest.mark.parametrize("ranks", [1, 2, 3, 4])
@pytest.mark.parametrize("per_rank", [1, 2, 3])
@pytest.mark.parametrize("microbatches", [1, 3, 6])
def test_loss_and_gradients_are_those_of_one_process(schedule, ranks, per_rank, microbatches):
    def stages():
        return make_stages(ranks * per_rank)

    inputs, targets = batch(rows=10)
    results = stepped(ranks, stages, inputs, targets, schedule=schedule, microbatches=microbatches)
    assert_equal(results, alone(stages(), inputs, targets))


@pytest.mark.parametrize("schedule", SCHEDULES)
@pytest.mark.parametrize("rows", [0, 1, 3])
def test_fewer_rows_than_microbatches_leave_empty_parts(schedule, rows):
    inputs, targets = batch(rows)
    results = stepped(2, lambda: make_stages(4), inputs, targets, schedule=schedule, microbatches=4)
    assert_equal(results, alone(make_stages(4), inputs, targets))


@pytest.mark.parametrize("schedule", SCHEDULES)
def test_a_loss_is_not_asked_for_the_mean_of_nothing(schedule):
    def mean_square(y, targets):
        return float(((y - targets) ** 2).mean()), 2 * (y - targets) / y.size  # nan of no rows

    x, targets = np.random.default_rng(5).standard_normal((2, 3, 2))

    def stages():
        return [Linear(2, 2, dtype=np.float64, rng=number) for number in range(2)]

    results = stepped(2, stages, x, targets, mean_square, schedule=schedule, microbatches=5)
    assert_equal(results, alone(stages(), x, targets, mean_square))


def test_microbatches_may_be_given_with_shapes_of_their_own():
    rng = np.random.default_rng(3)
    shapes = [(2, 3), (1, 5), (4,), (0, 2), (1, 1, 6)]
    inputs = [rng.integers(0, WORDS, shape) for shape in shapes]
    targets = [rng.integers(0, CLASSES, shape) for shape in shapes]
    results = stepped(3, lambda: make_stages(3), inputs, targets, microbatches=len(shapes))
    together = [np.concatenate([part.ravel() for part in parts]) for parts in (inputs, targets)]
    assert_equal(results, alone(make_stages(3), *together))


def test_a_loss_may_be_of_another_kind():
    rng = np.random.default_rng(4)
    inputs, _ = batch(rows=7)
    targets = rng.standard_normal((7, 3, CLASSES))
    results = stepped(2, lambda: make_stages(2), inputs, targets, mse_loss, microbatches=3)
    assert_equal(results, alone(make_stages(2), inputs, targets, mse_loss))


@pytest.mark.parametrize("schedule", SCHEDULES)
def test_ranks_train_like_one_process(schedule):
    batches = [batch(rows=5, seed=seed) for seed in range(4)]
    model = Sequential(*make_stages(6))
    optimizer = SGD(model.parameters(), lr=0.1, momentum=0.9)
    expected = []
    for x, labels in batches:
        y, pullback = model.vjp(x)
        loss, grad = cross_entropy(y, labels)
        pullback(grad)
        optimizer.step()
        optimizer.zero_grad()
        expected.append(loss)

    def run(group):
        pipeline = Pipeline(share(make_stages(6), group), group, schedule=schedule, microbatches=3)
        optimizer = SGD(pipeline.parameters(), lr=0.1, momentum=0.9)
        losses = []
        for x, labels in batches:
            losses.append(pipeline.step(x, labels, cross_entropy))
            optimizer.step()
            optimizer.zero_grad()
        return losses, pipeline.state_dict()

    whole = {}
    for losses, state in simulate(run, 3):
        np.testing.assert_allclose(losses, expected, rtol=1e-10)
        whole |= state
    for name, value in model.state_dict().items():
        np.testing.assert_allclose(whole[name.removeprefix("layers.")], value, rtol=1e-9, atol=1e-12, err_msg=name)


def test_steps_accumulate_until_zero_grad():
    inputs, targets = batch(rows=4)

    def run(group):
        pipeline = Pipeline(share(make_stages(2), group), group, microbatches=2)
        pipeline.step(inputs, targets, cross_entropy)
        once = gradients(pipeline)
        pipeline.step(inputs, targets, cross_entropy)
        twice = gradients(pipeline)
        pipeline.zero_grad()
        pipeline.step(inputs, targets, cross_entropy)
        return once, twice, gradients(pipeline)

    for once, twice, again in simulate(run, 2):
        for name, grad in once.items():
            np.testing.assert_allclose(twice[name], 2 * grad, rtol=1e-12)
            np.testing.assert_array_equal(again[name], grad)


def test_zero_bubble_adds_up_the_same_bits_as_1f1b():
    inputs, targets = batch(rows=12)
    for count in (2, 4):
        pair = [
            stepped(2, lambda: make_stages(count), inputs, targets, schedule=name, microbatches=5)  # noqa: B023 - called at once
            for name in ("1f1b", "zb_h1")
        ]
        for (loss, grads), (other_loss, other_grads) in zip(*pair, strict=True):
            assert loss == other_loss
            for name, grad in grads.items():
                np.testing.assert_array_equal(grad, other_grads[name], err_msg=name)


class Cast(Module):
    """Brings what passes to a dtype, and notes what it was, both ways."""

    def __init__(self, dtype, seen):
        self._dtype = dtype
        self._seen = seen

    def vjp(self, x):
        before = x.dtype
        self._seen.append(before)

        def pullback(grad):
            self._seen.append(grad.dtype)
            return grad.astype(before)

        return x.astype(self._dtype), pullback


def test_half_precision_travels_as_it_is():
    inputs, targets = batch(rows=6)
    wide, half = np.dtype(np.float64), np.dtype(ml_dtypes.bfloat16)
    seen = [[], []]

    def stages():
        first, second = make_stages(2)
        first.layers.append(Cast(half, seen[0]))
        second.layers.insert(0, Cast(wide, seen[1]))
        return first, second

    expected = alone(stages(), inputs, targets)
    for part in seen:
        part.clear()
    results = stepped(2, stages, inputs, targets, microbatches=1)
    assert seen == [[wide, half], [half, wide]]
    assert_equal(results, expected)


def test_a_schedule_of_ones_own_may_place_stages_anywhere():
    """Four stages on two ranks as 0 1 1 0, in GPipe's order; rank 2 has none."""
    rank_of = (0, 1, 1, 0)

    def order(rank):
        stages = [stage for stage in range(4) if rank_of[stage] == rank]
        forward = [Action(Kind.FORWARD, s, m) for s in stages for m in range(3)]
        backward = [Action(Kind.BACKWARD, s, m) for s in reversed(stages) for m in range(3)]
        return tuple(forward + backward)

    schedule = PipelineSchedule(name="vee", microbatches=3, rank_of=rank_of, actions=(order(0), order(1), order(2)))
    inputs, targets = batch(rows=5)

    def run(group):
        stages = [s for s, rank in zip(make_stages(4), rank_of, strict=True) if rank == group.rank]
        pipeline = Pipeline(stages, group, schedule=schedule, microbatches=3)
        at_ends = group.rank == 0
        args = (inputs, targets) if at_ends else (None, None)
        return pipeline.step(*args, cross_entropy), gradients(pipeline)

    assert_equal(simulate(run, 3), alone(make_stages(4), inputs, targets))


@pytest.mark.parametrize("wrap", [lambda stage: stage, Checkpoint])
@pytest.mark.parametrize("momentum", [0.1, None])
def test_batchnorm_normalises_microbatches_and_learns_the_statistics_of_the_batch(wrap, momentum):
    def stages():
        norm = BatchNorm(4, momentum=momentum, dtype=np.float64)
        return [
            wrap(Sequential(Linear(3, 4, dtype=np.float64, rng=0), norm)),
            Sequential(Linear(4, 2, dtype=np.float64, rng=1)),
        ]

    x, t = np.random.default_rng(5).standard_normal((7, 3)), np.zeros((7, 2))
    model = Sequential(*stages())
    for part in (slice(0, 4), slice(4, 7)):
        y, pullback = model.vjp(x[part])
        pullback(mse_loss(y, t[part])[1] * len(y) / 7)
    whole = Sequential(*stages())
    for _ in range(2):
        whole(x)

    def run(group):
        pipeline = Pipeline(share(stages(), group), group, microbatches=2)
        pipeline.step(x, t, mse_loss)
        grads = gradients(pipeline)
        pipeline.step(x, t, mse_loss)
        return pipeline.state_dict(), grads

    state, grads = simulate(run, 2)[0]
    for name, expected in whole.layers[0].state_dict().items():
        if "running" in name or "tracked" in name:
            np.testing.assert_allclose(state[f"0.{name}"], expected, rtol=1e-12, err_msg=name)
    for name, expected in gradients(model.layers[0]).items():
        np.testing.assert_allclose(grads[f"0.{name}"], expected, rtol=1e-10, atol=1e-14, err_msg=name)
