"""Mixed precision in FSDP: computation and messages in half precision, shards in float32."""

import math

import ml_dtypes
import numpy as np
import pytest

from ferro_strategies.fsdp import MixedPrecision, ShardingStrategy
from ferro_strategies.nn import Module, Parameter, ReLU, Sequential, mse_loss
from ferro_strategies.optim import SGD, LossScaler

from .models import assert_same, batch, gathered_grads, grads_of, shard, simulate

HALVES = [np.dtype(np.float16), np.dtype(ml_dtypes.bfloat16)]


class Weigh(Module):
    """Computes y = x * weight + bias elementwise, which rounds alike in every floating type."""

    def __init__(self, size, dtype, rng):
        self.weight = Parameter(rng.standard_normal(size).astype(dtype))
        self.bias = Parameter(rng.standard_normal(size).astype(dtype))

    def vjp(self, x):
        weight, bias = self.weight.use(), self.bias.use()

        def pullback(grad):
            weight.add_grad((grad * x).sum(axis=0))
            bias.add_grad(grad.sum(axis=0))
            return grad * weight.data

        return x * weight.data + bias.data, pullback


def build(dtype=np.float32):
    rng = np.random.default_rng(0)
    return Sequential(Weigh(3, dtype, rng), ReLU(), Weigh(3, dtype, rng))


def backward(model, x, target, scale=None):
    y, pullback = model.vjp(x)
    _, grad = mse_loss(y, np.broadcast_to(target, y.shape).astype(y.dtype))
    return y, pullback(grad if scale is None else scale(grad))


@pytest.mark.parametrize("sharding", list(ShardingStrategy))
@pytest.mark.parametrize("half", HALVES, ids=str)
def test_the_computation_is_in_half_and_the_shards_are_not(sharding, half):
    seen = set()

    class Look(Module):
        def __init__(self):
            self.inner = Weigh(3, np.float32, np.random.default_rng(1))

        def vjp(self, x):
            seen.add(x.dtype)
            seen.update(item.data.dtype for item in self.inner.parameters())
            y, pull = self.inner.vjp(x)

            def pullback(grad):
                result = pull(grad)
                seen.add(grad.dtype)
                assert {item.grad.dtype for item in self.inner.parameters()} == {np.dtype(np.float32)}
                return result

            return y, pullback

    def run(group):
        model = build()
        model.layers.append(Look())
        precision = MixedPrecision(param_dtype=half, reduce_dtype=np.float32, output_dtype=np.float32)
        model = shard(group, model, sharding=sharding, mixed_precision=precision)
        optimizer = SGD(model.parameters(), lr=0.1, momentum=0.9)
        x, target = batch(0, np.float32)
        y, grad_x = backward(model, x, target)
        assert y.dtype == grad_x.dtype == np.float32
        assert model(x).dtype == np.float32
        optimizer.step()
        dtypes = {p.data.dtype for p in model.parameters()}
        dtypes |= {p.grad.dtype for p in model.parameters()}
        dtypes |= {state["momentum"].dtype for state in optimizer.state}
        dtypes |= {value.dtype for value in model.state_dict().values()}
        return dtypes

    assert simulate(run, 4) == [{np.dtype(np.float32)}] * 4
    assert seen == {half}


@pytest.mark.parametrize("sharding", list(ShardingStrategy))
@pytest.mark.parametrize("half", HALVES, ids=str)
def test_gradients_are_those_of_a_model_in_half(sharding, half):
    def run(group):
        precision = MixedPrecision(param_dtype=half, reduce_dtype=np.float32)
        model = shard(group, sharding=sharding, model=build(), mixed_precision=precision)
        x, target = batch(0, np.float32)
        for _ in range(2):
            backward(model, x, target)
        return gathered_grads(model)

    plain = build(half)
    for (_, ours), (_, theirs) in zip(plain.named_parameters(), build().named_parameters(), strict=True):
        ours.data[...] = theirs.data
    x, target = batch(0, np.float32)
    backward(plain, x.astype(half), target)
    # Every rank has the same batch, so the mean in float32 is exact, and so is twice as much.
    expected = {name: 2 * grad.astype(np.float32) for name, grad in grads_of(plain).items()}
    for result in simulate(run, 4):
        assert_same(result, expected, rtol=0, atol=0)


def test_the_reduction_is_in_reduce_dtype():
    """bfloat16 rounds away what float16 keeps."""

    class Large(Module):
        def __init__(self):
            self.own = Parameter(np.ones(3, np.float32))

        def vjp(self, x):
            own = self.own.use()
            return x, lambda grad: own.add_grad(np.full(3, 1 + 2.0**-9, own.data.dtype))

    def run(group, reduce_dtype):
        precision = MixedPrecision(param_dtype=np.float16, reduce_dtype=reduce_dtype)
        model = shard(group, Large(), mixed_precision=precision)
        _, pullback = model.vjp(np.ones(1))
        pullback(np.ones(1, np.float16))
        return gathered_grads(model)["own"]

    fine = simulate(lambda group: run(group, None), 2)
    coarse = simulate(lambda group: run(group, ml_dtypes.bfloat16), 2)
    for exact, rounded in zip(fine, coarse, strict=True):
        np.testing.assert_array_equal(exact, np.full(3, 1 + 2.0**-9, np.float32))
        np.testing.assert_array_equal(rounded, np.ones(3, np.float32))


def test_inputs_are_cast_unless_told_otherwise_and_integers_never():
    def run(group):
        precision = MixedPrecision(param_dtype=np.float16, cast_inputs=False)
        model = shard(group, build(), mixed_precision=precision)
        assert model(np.ones((2, 3), np.float16)).dtype == np.float16
        indices = np.arange(3)
        assert MixedPrecision(param_dtype=np.float16).cast_input(indices) is indices
        complex_ = np.dtype(np.complex64)
        assert precision.compute_dtype_of(complex_) == precision.reduce_dtype_of(complex_) == complex_

    simulate(run, 1)


def test_shards_keep_what_half_precision_would_lose():
    def run(group):
        precision = MixedPrecision(param_dtype=np.float16)
        model = shard(group, build(), mixed_precision=precision)
        for parameter in model.parameters():
            parameter.data += 2.0**-14 * np.ones_like(parameter.data)
        model(batch(0, np.float32)[0])
        return model.state_dict()

    for result in simulate(run, 2):
        expected = {name: value + 2.0**-14 for name, value in build().state_dict().items()}
        assert_same(result, expected, rtol=1e-7, atol=0)


@pytest.mark.parametrize("sharding", list(ShardingStrategy))
def test_training_with_a_loss_scaler(sharding):
    """An overflow in one rank's shard makes all skip the step; then training goes on."""

    def run(group):
        precision = MixedPrecision(param_dtype=np.float16, output_dtype=np.float32)
        model = shard(group, build(), sharding=sharding, mixed_precision=precision)
        optimizer = SGD(model.parameters(), lr=0.05)
        scaler = LossScaler(initial_scale=2.0**10, group=group)
        losses, made = [], []
        for step in range(20):
            x, target = batch(0, np.float32)
            y, pullback = model.vjp(x)
            loss, grad = mse_loss(y, np.broadcast_to(target, y.shape))
            losses.append(float(loss))
            grad = scaler.scale(grad)
            if step == 3 and group.rank == 1:
                grad[0, 0] = np.inf
            with np.errstate(invalid="ignore"):
                pullback(grad)
            scaler.unscale(optimizer)
            norm = model.clip_grad_norm(10.0)
            assert math.isfinite(norm) == (step != 3)
            if step == 3 and sharding is ShardingStrategy.FULL_SHARD:
                bad = [not np.isfinite(item.grad).all() for item in model.parameters()]
                assert 0 < sum(map(any, group.all_gather_object(bad))) < group.world_size
            made.append(scaler.step(optimizer))
            optimizer.zero_grad()
        return losses, made, scaler.current_scale

    for losses, made, scale in simulate(run, 4):
        assert made == [step != 3 for step in range(20)]
        assert scale == 2.0**9
        assert losses[4] == losses[3]
        assert losses[-1] < 0.8 * losses[0]
