"""Optimizers: compared with their formulas; tests/strategies/torch_parity compares them with torch."""

import numpy as np
import pytest

from ferro.errors import UsageError
from ferro_strategies.nn import Linear, Parameter
from ferro_strategies.optim import SGD, AdamW

SGD_CASES = [
    {},
    {"weight_decay": 0.1},
    {"momentum": 0.9},
    {"momentum": 0.9, "weight_decay": 0.1},
    {"momentum": 0.8, "nesterov": True},
    {"momentum": 0.8, "weight_decay": 0.1, "nesterov": True},
]
ADAMW_CASES = [{}, {"betas": (0.5, 0.9), "eps": 1e-3, "weight_decay": 0.3}, {"betas": (0.0, 0.0), "weight_decay": 0.0}]
CASES = [(SGD, {"lr": 0.1} | case) for case in SGD_CASES]
CASES += [(AdamW, {"lr": 0.01} | case) for case in ADAMW_CASES]
EACH = pytest.mark.parametrize(("optimizer_class", "options"), CASES)


def reference(optimizer_class, value, grads, *, lr, **options):
    """Compute `value` after one step for each gradient by the formula, in float64."""
    p, m, v = value.astype(np.float64), 0.0, 0.0
    decay = options.get("weight_decay", 0.0 if optimizer_class is SGD else 0.01)
    for t, grad in enumerate(grads, start=1):
        if optimizer_class is SGD:
            momentum = options.get("momentum", 0.0)
            d = grad + decay * p
            m = momentum * m + d
            p = p - lr * (d + momentum * m if options.get("nesterov") else m)
        else:
            b1, b2 = options.get("betas", (0.9, 0.999))
            p = p * (1 - lr * decay)
            m = b1 * m + (1 - b1) * grad
            v = b2 * v + (1 - b2) * grad**2
            p = p - lr * (m / (1 - b1**t)) / (np.sqrt(v / (1 - b2**t)) + options.get("eps", 1e-8))
    return p


def step(optimizer, grads):
    for grad in grads:
        for parameter in optimizer.parameters:
            parameter.zero_grad()
            parameter.add_grad(grad)
        optimizer.step()


def sample(shape, dtype, count=5):
    rng = np.random.default_rng(0)
    return rng.standard_normal(shape).astype(dtype), [rng.standard_normal(shape).astype(dtype) for _ in range(count)]


@EACH
@pytest.mark.parametrize("shape", [(3, 4), (), (0,), (40_000,)])  # the last: more than one block
def test_steps_follow_the_formula(optimizer_class, options, shape):
    value, grads = sample(shape, np.float64)
    parameter = Parameter(value.copy() if shape else np.array(value))
    memory = parameter.data
    step(optimizer_class([parameter], **options), grads)
    expected = reference(optimizer_class, value, grads, **options)
    np.testing.assert_allclose(parameter.data, expected, rtol=1e-10, atol=1e-12)
    assert parameter.data is memory


@EACH
def test_float32_stays_float32_and_gradients_are_kept(optimizer_class, options):
    value, grads = sample((3,), np.float32)
    parameter = Parameter(value)
    optimizer = optimizer_class([parameter], **options)
    step(optimizer, grads)
    assert parameter.data.dtype == np.float32
    assert all(array.dtype in (np.float32, np.int64) for array in optimizer.state[0].values())
    np.testing.assert_array_equal(parameter.grad, grads[-1])


@EACH
def test_parameters_without_gradient_rest(optimizer_class, options):
    used, unused = Parameter(np.ones(2)), Parameter(np.ones(2))
    optimizer = optimizer_class([used, unused], **options)
    used.add_grad(np.ones(2))
    optimizer.step()
    assert (used.data != 1).all()
    np.testing.assert_array_equal(unused.data, 1)  # not even decayed
    assert optimizer.state[1] == {}
    optimizer.zero_grad()
    assert used.grad is None


@EACH
def test_a_restored_optimizer_goes_on_where_the_other_stopped(optimizer_class, options):
    value, grads = sample((3, 2), np.float64, count=6)
    whole, half = Parameter(value.copy()), Parameter(value.copy())
    step(optimizer_class([whole, Parameter(np.ones((3, 2)))], **options), grads)
    # The second parameter stays without state: saved before its first step.
    before = optimizer_class([half, Parameter(np.ones(7))], **options)
    before.lr = 0.05
    for grad in grads[:3]:
        half.zero_grad()
        half.add_grad(grad)
        before.step()
    state = before.state_dict()
    after = optimizer_class([half, Parameter(np.ones(7))], **options)
    after.load_state_dict(state)
    assert after.lr == 0.05
    assert after.state[1] == {}
    for name, array in state.items():
        array[...] = np.nan if array.dtype.kind == "f" else -1  # the state was copied in
        np.testing.assert_array_equal(after.state_dict()[name], before.state_dict()[name])


def test_restoring_keeps_the_trajectory():
    value, grads = sample((4,), np.float64, count=6)
    for optimizer_class, options in CASES:
        parameter = Parameter(value.copy())
        first = optimizer_class([parameter], **options)
        step(first, grads[:3])
        second = optimizer_class([parameter], **options)
        second.load_state_dict(first.state_dict())
        step(second, grads[3:])
        expected = reference(optimizer_class, value, grads, **options)
        np.testing.assert_allclose(parameter.data, expected, rtol=1e-10, atol=1e-12)


def test_of_many_misfits_the_first_few_are_told():
    optimizer = AdamW([Parameter(np.ones(2))])
    state = optimizer.state_dict() | {f"layers.{i}.m": np.ones(2) for i in range(50)}
    with pytest.raises(UsageError, match=r"'layers\.3\.m'; and 46 more\. Nothing was loaded"):
        optimizer.load_state_dict(state)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"0.m": None}, "missing '0.m'"),
        ({"lr": None}, "'lr' is missing"),
        ({"1.m": np.zeros(2)}, "unexpected '1.m'"),
        ({"0.v": np.zeros(3)}, r"'0.v' is float64 \(2,\), given float64 \(3,\)"),
        ({"0.v": np.zeros(2, np.float32)}, "given float32"),
    ],
)
def test_a_state_that_does_not_fit_changes_nothing(change, message):
    parameter = Parameter(np.ones(2))
    optimizer = AdamW([parameter])
    step(optimizer, [np.ones(2)])
    before = optimizer.state_dict()
    state = {name: array + 1 for name, array in before.items()} | change
    with pytest.raises(UsageError, match=message):
        optimizer.load_state_dict({k: v for k, v in state.items() if v is not None})
    after = optimizer.state_dict()
    assert list(after) == list(before)
    for name, array in before.items():
        np.testing.assert_array_equal(after[name], array)


def test_the_learning_rate_may_follow_a_schedule():
    parameter = Parameter(np.zeros(1))
    optimizer = SGD([parameter], lr=1.0)
    for lr in (1.0, 0.5, 0.25):
        optimizer.lr = lr
        step(optimizer, [np.ones(1)])
    assert parameter.data[0] == -1.75


@pytest.mark.parametrize("optimizer_class", [SGD, AdamW])
def test_wrong_parameters_are_refused(optimizer_class):
    parameter = Parameter(np.zeros(1), name="w")
    optimizer_class([], lr=0.1).step()  # a stage of a pipeline may have no parameters
    used_up = Linear(1, 1).parameters()
    list(used_up)
    with pytest.raises(UsageError, match="read to its end before"):
        optimizer_class(used_up, lr=0.1)
    with pytest.raises(UsageError, match=r"item 1, Parameter\('w'.*twice"):
        optimizer_class([parameter, parameter], lr=0.1)
    with pytest.raises(UsageError, match="item 0 is a Linear"):
        optimizer_class([Linear(1, 1)], lr=0.1)
    assert len(optimizer_class(Linear(2, 2).parameters(), lr=0.1).parameters) == 2
    assert len(optimizer_class(Linear(2, 2), lr=0.1).parameters) == 2
    assert optimizer_class(parameter, lr=0.1).parameters == [parameter]


def test_betas_may_come_as_a_list():
    assert AdamW(Linear(2, 2), betas=[np.float64(0.5), 0]).groups[0]["betas"] == (0.5, 0.0)


@pytest.mark.parametrize(
    "build",
    [
        lambda p: SGD(p, lr=-1.0),
        lambda p: SGD(p, lr=float("nan")),
        lambda p: SGD(p, lr=0.1, momentum=-0.1),
        lambda p: SGD(p, lr=0.1, weight_decay=-0.1),
        lambda p: SGD(p, lr=0.1, nesterov=True),
        lambda p: AdamW(p, betas=(1.0, 0.9)),
        lambda p: AdamW(p, eps=-1.0),
    ],
)
def test_impossible_settings_are_refused(build):
    with pytest.raises(UsageError):
        build([Parameter(np.zeros(1))])


def test_listeners_are_told_before_each_step_until_they_leave():
    parameter = Parameter(np.ones(1))
    optimizer = SGD([parameter], lr=0.5)
    seen = []
    remove = optimizer.before_step(lambda: seen.append(parameter.data.item()))
    for _ in range(2):
        parameter.grad = np.ones(1)
        optimizer.step()
    remove()
    optimizer.step()
    assert seen == [1.0, 0.5]
