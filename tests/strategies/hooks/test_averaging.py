"""Half-precision hooks: their means are close to exact, and the same on every rank."""

import numpy as np
import pytest

import ferro
from ferro_strategies import DDP, hooks
from ferro_strategies.nn import Linear, ReLU, Sequential


def averaged(hook, dtype=np.float32, world_size=3):
    def run(group):
        model = Sequential(Linear(6, 16, dtype=dtype, rng=0), ReLU(), Linear(16, 4, dtype=dtype, rng=1))
        model = DDP(model, group, hook=hook, bucket_bytes=256, first_bucket_bytes=64)
        x = np.random.default_rng(group.rank).standard_normal((5, 6)).astype(dtype)
        y, pullback = model.vjp(x)
        pullback(y)
        return {name: item.grad for name, item in model.named_parameters()}

    return ferro.simulate(run, world_size, timeout_s=10, run_timeout_s=30)


@pytest.mark.parametrize("dtype", [np.float32, np.float64])
@pytest.mark.parametrize(("hook", "bits"), [(hooks.float16, 11), (hooks.bfloat16, 8)], ids=["float16", "bfloat16"])
def test_half_precision_is_close_and_alike(hook, bits, dtype):
    exact, results = averaged(None, dtype), averaged(hook, dtype)
    for name, value in exact[0].items():
        # Each rank's share is rounded, then the mean.
        bound = 4 * 2.0**-bits * max(np.abs(result[name]).max() for result in results)
        np.testing.assert_allclose(results[0][name], value, rtol=0, atol=bound, err_msg=name)
        assert not np.array_equal(results[0][name], value)
        for other in results[1:]:
            np.testing.assert_array_equal(other[name], results[0][name])


def test_the_mean_of_large_numbers_does_not_overflow():
    def run(group):
        model = DDP(Linear(1, 1, bias=False), group, hook=hooks.float16)
        _, pullback = model.vjp(np.ones((1, 1), np.float32))
        pullback(np.full((1, 1), 60000.0, np.float32))
        return float(model.module.weight.grad[0, 0])

    assert ferro.simulate(run, 4, timeout_s=10) == [60000.0 - 60000.0 % 32] * 4


def test_gradients_of_half_precision_are_averaged_in_float32_without_a_hook():
    sent, exact = averaged(hooks.float16, np.float16), averaged(None, np.float16)
    for name, value in exact[0].items():
        assert value.dtype == np.float32
        np.testing.assert_allclose(sent[0][name], value, rtol=1e-2, atol=1e-3, err_msg=name)


def test_a_hook_of_ones_own():
    def signs(bucket, group):
        """Send signs only (majority vote)."""
        np.sign(bucket.buffer, out=bucket.buffer)
        return hooks.mean(bucket, group)

    for result in averaged(signs):
        for grad in result.values():
            assert set(np.unique(np.round(grad * 3))) <= {-3.0, -2.0, -1.0, 0.0, 1.0, 2.0, 3.0}
