"""LossScaler: small gradients survive half precision, large ones skip a step, on all ranks."""

import ml_dtypes
import numpy as np
import pytest

import ferro
from ferro_strategies import DDP
from ferro_strategies.nn import Linear, Parameter, Split
from ferro_strategies.optim import SGD, LossScaler, clip_grad_norm

DTYPES = [np.float16, ml_dtypes.bfloat16, np.float32, np.float64]


def simulate(function, world_size):
    return ferro.simulate(function, world_size, timeout_s=5, run_timeout_s=20)


def held(*grads, dtype=np.float32):
    """Make an optimizer of parameters at 0 with these gradients; return it and the parameters."""
    parameters = [Parameter(np.zeros(np.shape(grad), dtype)) for grad in grads]
    for parameter, grad in zip(parameters, grads, strict=True):
        parameter.grad = np.array(grad, dtype)
    return SGD(parameters, lr=1.0), parameters


@pytest.mark.parametrize("dtype", DTYPES)
def test_a_step_with_scaled_gradients_is_that_without_scale(dtype):
    scaler = LossScaler(initial_scale=2.0**16)
    grad = scaler.scale(np.array([0.5, -0.25], dtype))
    assert grad.dtype == dtype
    np.testing.assert_array_equal(grad, np.array([2.0**15, -(2.0**14)], dtype))
    optimizer, (parameter,) = held(grad, dtype=dtype)
    assert scaler.step(optimizer) is True
    assert parameter.data.dtype == dtype
    np.testing.assert_array_equal(parameter.data, np.array([-0.5, 0.25], dtype))


def test_what_half_precision_cannot_hold_survives():
    module, scaler = Linear(1, 1, bias=False, dtype=np.float16, rng=0), LossScaler()
    module.weight.data[:] = 0
    master = Parameter(np.zeros((1, 1), np.float32))
    optimizer = SGD([master], lr=1.0)
    x, grad = np.full((1, 1), 2.0**-12, np.float16), np.full((1, 1), 2.0**-14, np.float16)
    _, pullback = module.vjp(x)
    pullback(grad)
    assert not module.weight.grad.astype(np.float16).any()  # 2**-26 is too small
    module.zero_grad()
    _, pullback = module.vjp(x)
    pullback(scaler.scale(grad))
    master.grad = module.weight.grad
    assert scaler.step(optimizer)
    np.testing.assert_array_equal(master.data, -(2.0**-26))


@pytest.mark.parametrize("value", [np.inf, -np.inf, np.nan])
@pytest.mark.parametrize("dtype", DTYPES)
def test_a_gradient_that_is_not_finite_skips_the_step_and_halves_the_scale(value, dtype):
    long = np.zeros(40_000)  # more than a block
    long[-1] = value
    optimizer, parameters = held([1.0], long, [1.0], dtype=dtype)
    scaler = LossScaler(initial_scale=8.0)
    assert scaler.step(optimizer) is False
    assert scaler.current_scale == 4.0
    assert not any(parameter.data.any() for parameter in parameters)
    for parameter in parameters:
        parameter.grad = np.ones_like(parameter.data)
    assert scaler.step(optimizer) is True
    assert scaler.current_scale == 4.0
    assert all((parameter.data == -0.25).all() for parameter in parameters)


def test_overflow_in_scaling_skips():
    scaler = LossScaler(initial_scale=2.0**16)
    grad = scaler.scale(np.array([2.0], np.float16))
    assert np.isinf(grad).all()
    assert scaler.step(held(grad, dtype=np.float16)[0]) is False


def test_overflow_in_unscaling_skips():
    scaler = LossScaler(initial_scale=2.0**-4)
    assert scaler.step(held([3e38])[0]) is False


def test_the_scale_grows_after_steps_in_a_row_only():
    scaler = LossScaler(initial_scale=8.0, growth_factor=4.0, backoff_factor=0.25, growth_interval=3)
    good, bad = [1.0], [np.nan]
    scales = []
    for grad in (good, good, bad, good, good, good, good, good, good, bad):
        scaler.step(held(grad)[0])
        scales.append(scaler.current_scale)
    assert scales == [8, 8, 2, 2, 2, 8, 8, 8, 32, 8]


def test_the_scale_stays_within_what_float32_holds():
    scaler = LossScaler(initial_scale=2.0**127, growth_interval=1)
    optimizer, (parameter,) = held([2.0**127])
    assert scaler.step(optimizer)
    assert parameter.data == -1
    assert scaler.current_scale == 2.0**127
    scaler = LossScaler(initial_scale=2.0**-125)
    assert not scaler.step(held([np.nan])[0])
    for _ in range(2):
        with pytest.raises(ferro.UsageError, match=r"even when scaled by 1\.17549e-38"):
            scaler.step(held([np.nan])[0])
    assert scaler.step(held([2.0**-126])[0])


def test_unscaling_before_the_step_happens_once():
    optimizer, (parameter,) = held([30.0, 40.0])
    parameter.grad *= 8
    scaler = LossScaler(initial_scale=8.0)
    scaler.unscale(optimizer)
    np.testing.assert_array_equal(parameter.grad, [30, 40])
    with pytest.raises(ferro.UsageError, match="of this SGD are unscaled already"):
        scaler.unscale(optimizer)
    assert clip_grad_norm([parameter], 5.0) == 50
    assert scaler.step(optimizer)
    np.testing.assert_allclose(parameter.data, [-3, -4], rtol=1e-6)
    scaler.unscale(optimizer)  # the next step's
    parameter.grad = None
    assert scaler.step(optimizer)  # found finite, whatever became of it


def test_an_overflow_is_remembered_from_unscaling_on():
    optimizer, (parameter,) = held([np.inf])
    scaler = LossScaler()
    scaler.unscale(optimizer)
    parameter.grad = np.zeros(1)
    assert not scaler.step(optimizer)
    assert scaler.step(optimizer)


def test_optimizers_given_together_step_together():
    scaler = LossScaler(initial_scale=4.0)
    (one, (a,)), (two, (b,)) = held([4.0]), held([np.inf])
    assert not scaler.step(two, one)
    assert scaler.current_scale == 2
    assert (a.data, b.data) == (0, 0)
    a.grad, b.grad = np.array([2.0]), np.array([4.0])
    scaler.unscale(two)
    assert scaler.step(one, two)
    assert (a.data, b.data) == (-1, -2)
    with pytest.raises(ferro.UsageError, match="give the optimizer"):
        scaler.step()


def test_parameters_without_gradient_are_left_alone():
    optimizer, (one, two) = held([4.0], [4.0])
    two.grad = None
    scaler = LossScaler(initial_scale=4.0)
    assert scaler.step(optimizer)
    assert (one.data, two.data, two.grad) == (-1, 0, None)
    one.grad = None
    assert scaler.step(optimizer)


def test_state_goes_on_where_it_was():
    scaler = LossScaler(initial_scale=8.0, growth_interval=3)
    for _ in range(2):
        scaler.step(held([1.0])[0])
    state = scaler.state_dict()
    other = LossScaler(growth_interval=3)
    other.load_state_dict(state)
    assert other.current_scale == 8
    other.step(held([1.0])[0])
    assert other.current_scale == 16
    assert state["scale"] == 8  # a copy
    for wrong in (
        {},
        {"scale": np.array(1.0)},
        {**state, "more": np.array(1)},
        {**state, "scale": np.array(0.0)},
        {**state, "scale": np.array(np.nan)},
        {**state, "scale": np.ones(1)},
        {**state, "steps_in_a_row": np.array(-1)},
    ):
        with pytest.raises(ferro.UsageError, match="Nothing was loaded"):
            other.load_state_dict(wrong)
    assert other.current_scale == 16


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("initial_scale", 0.0),
        ("initial_scale", np.inf),
        ("growth_factor", 1.0),
        ("backoff_factor", 1.0),
        ("backoff_factor", 0.0),
        ("growth_interval", 0),
        ("growth_factor", np.nan),
    ],
)
def test_settings_have_ranges(name, value):
    with pytest.raises(ferro.UsageError, match=f"{name} must be from .* got {value}"):
        LossScaler(**{name: value})


# --- ranks ---


@pytest.mark.parametrize("dtype", [np.float16, np.float32])
def test_all_ranks_of_the_group_skip_when_one_overflows(dtype):
    def run(group):
        scaler = LossScaler(initial_scale=4.0, group=group)
        optimizer, (parameter,) = held([np.inf if group.rank == 1 else 4.0], dtype=dtype)
        parameter.splits = (Split(group=group, dim=0),)
        steps = [scaler.step(optimizer)]
        parameter.grad = np.full(1, 2 * group.rank, dtype)
        steps.append(scaler.step(optimizer))
        return steps, scaler.current_scale, float(parameter.data[0])

    assert simulate(run, 3) == [([False, True], 2.0, -rank) for rank in range(3)]


def test_all_ranks_with_pieces_or_stages_decide_together():
    """Six ranks: pieces over pairs, along one axis, and stages over threes, along the other."""

    def run(group, overflowing, scaler_group):
        pair, three = group.split(group.rank // 2), group.split(group.rank % 2)
        optimizer, (parameter, _) = held([np.inf if group.rank == overflowing else 1.0], [1.0])
        parameter.splits = (Split(group=pair, dim=0),)
        parameter.stages = three
        scaler = LossScaler(initial_scale=4.0, group=group if scaler_group else None)
        return scaler.step(optimizer), scaler.current_scale

    for overflowing, with_group in ((5, False), (0, False), (3, True), (None, False)):
        decided = simulate(lambda group, o=overflowing, w=with_group: run(group, o, w), 6)
        assert decided == [(True, 4.0) if overflowing is None else (False, 2.0)] * 6


def test_a_rank_without_parameters_needs_the_group():
    def run(group):
        optimizer = SGD([], lr=0.1) if group.rank == 1 else held([np.inf])[0]
        if group.rank == 1:
            with pytest.raises(ferro.UsageError, match="no parameters, so it cannot know"):
                LossScaler().step(optimizer)
        return LossScaler(group=group).step(optimizer)

    assert simulate(run, 2) == [False, False]


def test_replicas_decide_alike_without_a_group():
    def run(group):
        model = DDP(Linear(2, 1, rng=0), group)
        optimizer, scaler = SGD(model.parameters(), lr=0.1), LossScaler(initial_scale=4.0)
        made = []
        for step in range(3):
            y, pullback = model.vjp(np.ones((1, 2), np.float32))
            pullback(scaler.scale(np.full_like(y, np.inf if group.rank == step == 1 else 1)))
            made.append(scaler.step(optimizer))
            optimizer.zero_grad()
        return made, scaler.current_scale, model.module.weight.data

    first, second = simulate(run, 2)
    assert first[:2] == second[:2] == ([True, False, True], 2.0)
    np.testing.assert_array_equal(first[2], second[2])
    np.testing.assert_allclose(first[2], Linear(2, 1, rng=0).weight.data - 0.2, rtol=1e-6)
