"""Half precision is computed in float32 and rounded once; a complex number is two real ones."""

import ml_dtypes
import numpy as np
import pytest

from ferro_strategies.nn import Parameter
from ferro_strategies.optim import SGD, Adafactor, Adagrad, Adam, AdamW, Lion, Muon, clip_grad_norm, clip_grad_value

HALF = [np.float16, ml_dtypes.bfloat16]
# Each with settings under which a step of a weight near 1 is below the resolution of half precision.
OPTIMIZERS = [
    lambda p, **options: SGD(p, lr=1e-4, momentum=0.5, weight_decay=0.1, **options),
    lambda p, **options: SGD(p, lr=1e-4, **options),
    lambda p, **options: Adam(p, lr=2e-4, **options),
    lambda p, **options: AdamW(p, lr=2e-4, weight_decay=0.5, **options),
    lambda p, **options: Adagrad(p, lr=1e-3, **options),
    lambda p, **options: Adafactor(p, lr=2e-4, **options),
    lambda p, **options: Lion(p, lr=2e-4, weight_decay=0.5, **options),
    lambda p, **options: Muon(p, lr=2e-4, **options),
]
EACH = pytest.mark.parametrize("make", OPTIMIZERS)


def train(make, dtype, steps=60, **options):
    """Take `steps` steps with float32 values, gradients of 1e-3 and 1; return parameter and optimizer."""
    rng = np.random.default_rng(0)
    parameter = Parameter(np.array([[1.0, -1.5], [1.25, 1.75]], dtype))
    optimizer = make([parameter], **options)
    for _ in range(steps):
        grad = rng.standard_normal((2, 2)).astype(np.float16) * np.array([[1e-3, 1], [1e-3, 1]])
        parameter.grad = grad.astype(np.float16).astype(dtype)
        optimizer.step()
    return parameter, optimizer


@EACH
@pytest.mark.parametrize("dtype", HALF)
def test_small_steps_add_up_in_the_master_weights(make, dtype):
    exact, _ = train(make, np.float32)
    parameter, optimizer = train(make, dtype)
    assert parameter.data.dtype == dtype
    eps = float(ml_dtypes.finfo(dtype).eps)
    np.testing.assert_allclose(parameter.data.astype(np.float32), exact.data, rtol=eps)
    state = optimizer.state[0]
    assert {array.dtype for name, array in state.items() if name != "t"} == {np.dtype(np.float32)}
    np.testing.assert_array_equal(state["master"].astype(dtype), parameter.data)


@EACH
@pytest.mark.parametrize("dtype", HALF)
def test_without_master_weights_each_step_is_rounded_once(make, dtype):
    parameter, optimizer = train(make, dtype, steps=1, master_weights=False)
    exact, _ = train(make, np.float32, steps=1)
    assert "master" not in optimizer.state[0]
    if dtype == np.float16:  # the gradients are the same in float16 and float32
        np.testing.assert_array_equal(parameter.data, exact.data.astype(dtype))


@pytest.mark.parametrize("dtype", HALF)
def test_nothing_overflows_or_vanishes_in_the_state(dtype):
    for grad, moved in ((0.0, 0.0), (1e-4, 0.03), (6e4, 0.03)):
        parameter = Parameter(np.array([1.0, -2.0], dtype))
        optimizer = AdamW([parameter], lr=1e-2, weight_decay=0.0)
        for _ in range(3):
            parameter.grad = np.full(2, grad, dtype)
            optimizer.step()
        np.testing.assert_allclose(parameter.data.astype(float), [1 - moved, -2 - moved], rtol=5e-3)


def test_weight_decay_is_not_lost_in_bfloat16():
    parameter = Parameter(np.ones(1, ml_dtypes.bfloat16))
    optimizer = AdamW([parameter], lr=1e-2, weight_decay=0.1)
    for _ in range(500):
        parameter.grad = np.zeros(1, ml_dtypes.bfloat16)
        optimizer.step()
    assert float(parameter.data[0]) == pytest.approx(0.999**500, rel=4e-3)


def test_values_that_are_written_into_a_parameter_count_more_than_its_master():
    parameter, optimizer = train(OPTIMIZERS[1], np.float16, steps=5)
    kept = optimizer.state[0]["master"][0, 0].copy()
    parameter.data[1] = 7.0  # as load_state_dict does
    parameter.grad = np.zeros((2, 2), np.float16)
    optimizer.step()
    assert (parameter.data[1] == 7).all()
    assert optimizer.state[0]["master"][0, 0] == kept


def test_master_weights_are_restored():
    _, optimizer = train(OPTIMIZERS[3], ml_dtypes.bfloat16, steps=7)
    parameter, other = train(OPTIMIZERS[3], ml_dtypes.bfloat16, steps=1)
    parameter.data[...] = optimizer.parameters[0].data
    other.load_state_dict(optimizer.state_dict())
    for each in (optimizer, other):
        each.parameters[0].grad = np.ones((2, 2), ml_dtypes.bfloat16)
        each.step()
    for name, array in optimizer.state[0].items():
        np.testing.assert_array_equal(other.state[0][name], array)


@pytest.mark.parametrize("make", OPTIMIZERS[:5] + OPTIMIZERS[6:7])
@pytest.mark.parametrize("dtype", [np.complex64, np.complex128])
def test_a_complex_number_is_two_real_ones(make, dtype):
    rng = np.random.default_rng(0)
    value = (rng.standard_normal((3, 2)) + 1j * rng.standard_normal((3, 2))).astype(dtype)
    number, pair = Parameter(value.copy()), Parameter(value.view(value.real.dtype).copy())
    first, second = make([number]), make([pair])
    for _ in range(5):
        grad = (rng.standard_normal((3, 2)) + 1j * rng.standard_normal((3, 2))).astype(dtype)
        number.grad, pair.grad = grad, grad.view(value.real.dtype)
        assert clip_grad_norm([number], 2.0) == clip_grad_norm([pair], 2.0)
        clip_grad_value([number], 0.5)
        clip_grad_value([pair], 0.5)
        first.step()
        second.step()
    np.testing.assert_array_equal(number.data.view(value.real.dtype), pair.data)
    assert number.data.dtype == dtype


def test_a_complex_scalar_and_complex_state():
    parameter = Parameter(np.array(1 + 1j))
    optimizer = AdamW([parameter], lr=0.1)
    for _ in range(100):
        parameter.grad = 2 * (parameter.data - (3 - 2j))
        optimizer.step()
    assert abs(parameter.data - (3 - 2j)) < 0.05
    other = AdamW([parameter], lr=0.1)
    other.load_state_dict(optimizer.state_dict())
    assert other.state[0]["v"] == optimizer.state[0]["v"]
