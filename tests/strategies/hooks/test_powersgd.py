"""PowerSGD: bytes sent, error feedback, and training with it."""

import ml_dtypes
import numpy as np
import pytest

import ferro
from ferro_strategies import DDP
from ferro_strategies.hooks import GradBucket, PowerSGD
from ferro_strategies.nn import Linear, ReLU, Sequential, mse_loss
from ferro_strategies.optim import SGD


def simulate(function, world_size):
    return ferro.simulate(function, world_size, timeout_s=10, run_timeout_s=30)


def bucket_of(*grads):
    """Make a bucket that holds copies of these gradients."""
    buffer = np.concatenate([grad.reshape(-1) for grad in grads])
    ends = np.cumsum([grad.size for grad in grads])
    views = tuple(buffer[end - grad.size : end].reshape(grad.shape) for end, grad in zip(ends, grads, strict=True))
    names = tuple(f"p{index}" for index in range(len(grads)))
    return GradBucket(index=0, buffer=buffer, grads=views, names=names)


def draw(rank, *shape):
    return np.random.default_rng(rank).standard_normal(shape)


def low_rank(rank, n, m, r):
    """Make a matrix of rank r; all ranks' rows span one space, so the mean has rank r too."""
    return draw(rank, n, r) @ draw(99, r, m)


@pytest.mark.parametrize("r", [1, 2, 3])
@pytest.mark.parametrize("world_size", [1, 3])
def test_a_mean_of_that_rank_is_exact(r, world_size):
    def run(group):
        vector = draw(group.rank + 50, 7)
        bucket = bucket_of(low_rank(group.rank, 20, 30, r), vector, draw(group.rank, 2, 2))
        PowerSGD(rank=r)(bucket, group).wait()
        return bucket

    results = simulate(run, world_size)
    ranks = range(world_size)
    expected = [
        np.mean([low_rank(rank, 20, 30, r) for rank in ranks], axis=0),
        np.mean([draw(rank + 50, 7) for rank in ranks], axis=0),
        np.mean([draw(rank, 2, 2) for rank in ranks], axis=0),
    ]
    for bucket in results:
        for grad, value in zip(bucket.grads, expected, strict=True):
            np.testing.assert_allclose(grad, value, atol=1e-12)
        np.testing.assert_array_equal(bucket.buffer, results[0].buffer)


@pytest.mark.parametrize("warm_start", [True, False])
def test_error_feedback_sends_everything_in_time(warm_start):
    """The sum of all gradients is the sum of all results and the mean of the last errors."""

    def run(group):
        hook = PowerSGD(rank=2, warm_start=warm_start)
        given, sent = np.zeros((16, 12)), np.zeros((16, 12))
        for step in range(6):
            grad = draw((group.rank, step), 16, 12)
            bucket = bucket_of(grad)
            hook(bucket, group).wait()
            given += grad
            sent += bucket.grads[0]
        last = bucket_of(np.zeros((16, 12)))
        # A gradient of zero sends a part of what is left; the rest is what stays behind.
        for _ in range(200):
            last = bucket_of(np.zeros((16, 12)))
            hook(last, group).wait()
            sent += last.grads[0]
        return given, sent

    results = simulate(run, 2)
    mean = np.mean([given for given, _ in results], axis=0)
    for _, sent in results:
        np.testing.assert_allclose(sent, mean, atol=1e-6)


def test_without_error_feedback_what_is_left_out_is_lost():
    def run(group):
        hook = PowerSGD(rank=1, error_feedback=False)
        hook(bucket_of(draw(group.rank, 16, 12)), group).wait()
        last = bucket_of(np.zeros((16, 12)))
        hook(last, group).wait()
        return np.abs(last.buffer).max()

    assert simulate(run, 2) == [0.0, 0.0]


def test_a_warm_start_comes_closer_from_step_to_step():
    def run(group):
        hook = PowerSGD(rank=1, error_feedback=False)
        target = np.mean([draw(rank, 16, 12) for rank in range(2)], axis=0)
        errors = []
        for _ in range(60):
            bucket = bucket_of(draw(group.rank, 16, 12))
            hook(bucket, group).wait()
            errors.append(np.linalg.norm(bucket.grads[0] - target))
        return errors, np.linalg.svd(target)[1]

    for errors, singular in simulate(run, 2):
        assert errors[-1] < errors[0]
        np.testing.assert_allclose(errors[-1], np.linalg.norm(singular[1:]), rtol=1e-3)


def test_the_first_steps_are_exact_when_asked():
    def run(group):
        hook = PowerSGD(rank=1, start_after=2)
        exact = []
        for _ in range(3):
            bucket = bucket_of(draw(group.rank, 16, 12))
            hook(bucket, group).wait()
            mean = np.mean([draw(rank, 16, 12) for rank in range(2)], axis=0)
            exact.append(bool(np.allclose(bucket.grads[0], mean, atol=1e-12)))
        return exact

    assert simulate(run, 2) == [[True, True, False]] * 2


class Sent:
    """An observer that adds up the bytes of reductions."""

    def __init__(self):
        self.nbytes = 0

    def started(self, event):
        self.nbytes += event.nbytes

    def finished(self, event):
        pass

    def close(self):
        pass


def test_only_thin_matrices_and_vectors_are_sent():
    sent = Sent()

    def run(group):
        PowerSGD(rank=2)(bucket_of(draw(0, 40, 5, 12), draw(1, 9), draw(2, 3, 3)), group).wait()

    ferro.simulate(run, 1, observers=[sent], timeout_s=10)
    assert sent.nbytes == 8 * (2 * (40 + 60) + 9 + 9)


@pytest.mark.parametrize(("dtype", "atol"), [(np.float16, 0.01), (ml_dtypes.bfloat16, 0.08)])
def test_half_precision_is_compressed_in_single(dtype, atol):
    def run(group):
        bucket = bucket_of(low_rank(group.rank, 20, 30, 1).astype(dtype))
        PowerSGD()(bucket, group).wait()
        return bucket.grads[0]

    first, second = simulate(run, 2)
    mean = np.mean([low_rank(rank, 20, 30, 1) for rank in range(2)], axis=0)
    assert first.dtype == dtype
    np.testing.assert_allclose(first.astype(np.float64), mean, rtol=0, atol=atol)
    np.testing.assert_array_equal(first, second)


def test_a_model_learns_with_it_and_stays_one_model():
    target = draw(7, 24, 16) / 5

    def run(group):
        model = Sequential(Linear(24, 32, dtype=np.float64, rng=0), ReLU(), Linear(32, 16, dtype=np.float64, rng=1))
        hook = PowerSGD(rank=2)
        model = DDP(model, group, hook=hook, bucket_bytes=8192, first_bucket_bytes=1024)
        optimizer = SGD(model.parameters(), lr=0.5, momentum=0.5)
        losses = []
        for step in range(60):
            x = draw((group.rank, step), 32, 24)
            y, pullback = model.vjp(x)
            loss, grad = mse_loss(y, x @ target)
            pullback(grad)
            optimizer.step()
            optimizer.zero_grad()
            losses.append(loss)
        return losses, model.state_dict()

    (losses, first), (_, second) = simulate(run, 2)
    assert losses[-1] < losses[0] / 4
    for name, value in first.items():
        np.testing.assert_array_equal(second[name], value, err_msg=name)


@pytest.mark.parametrize(
    ("options", "message"), [({"rank": 0}, "rank must be at least 1"), ({"start_after": -1}, "start_after must be")]
)
def test_wrong_options_are_refused(options, message):
    with pytest.raises(ferro.UsageError, match=message):
        PowerSGD(**options)


def test_one_hook_for_two_models_is_refused():
    def run(group):
        hook = PowerSGD()
        hook(bucket_of(draw(0, 8, 8)), group).wait()
        with pytest.raises(ferro.UsageError, match="one PowerSGD for each DDP"):
            hook(bucket_of(draw(0, 8, 8), draw(1, 3)), group)

    simulate(run, 1)
