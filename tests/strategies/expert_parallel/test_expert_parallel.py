"""Experts divided over ranks: every output and gradient is that of one process on all tokens."""

import copy

import ml_dtypes
import numpy as np
import pytest

import ferro
from ferro_strategies import DDP, FSDP, DeviceMesh, ExpertParallel, MoE, nn, optim
from ferro_strategies import tensor_parallel as tp
from ferro_strategies.expert_parallel import ParallelMoE, top_k_routing
from ferro_testing.strategies import CHECKS, StrategyCase

F64 = np.float64


def simulate(run, ranks, **options):
    return ferro.simulate(run, ranks, timeout_s=20.0, **options)


def model_of(top_k=2, capacity_factor=None, seed=0, dtype=F64, aux_loss_weight=0.3):
    wide = {"dtype": dtype, "rng": np.random.default_rng(seed)}
    moe = MoE(4, 6, 5, top_k, capacity_factor=capacity_factor, aux_loss_weight=aux_loss_weight, **wide)
    return nn.Sequential(nn.Linear(4, 4, **wide), nn.Residual(moe), nn.Linear(4, 3, **wide))


def gradients(model):
    return {name: parameter.grad for name, parameter in model.named_parameters()}


def assert_close(mine, theirs, rtol=1e-10, atol=1e-12):
    assert list(mine) == list(theirs)
    for name, value in theirs.items():
        np.testing.assert_allclose(mine[name], value, rtol=rtol, atol=atol, err_msg=name)


@pytest.mark.parametrize(("top_k", "capacity_factor"), [(1, None), (2, None), (3, 1.0), (1, 0.5)])
def test_the_serial_layer_has_right_gradients(top_k, capacity_factor):
    moe = MoE(2, 3, 3, top_k, capacity_factor=capacity_factor, aux_loss_weight=0.0, dtype=F64, rng=0)
    nn.check_gradients(moe, np.random.default_rng(1).standard_normal((2, 2, 2)))


def test_the_serial_layer_is_the_weighted_sum_of_its_experts():
    moe = MoE(4, 6, 3, 2, dtype=F64, rng=0)
    x = np.random.default_rng(1).standard_normal((5, 4))
    scores = x @ moe.router.data
    expected = np.zeros((5, 4))
    for token in range(5):
        chosen = np.argsort(-scores[token])[:2]
        gates = np.exp(scores[token, chosen]) / np.exp(scores[token, chosen]).sum()
        for gate, expert in zip(gates, chosen, strict=True):
            hidden = nn.GELU()(x[token : token + 1] @ moe.up.data[expert] + moe.up_bias.data[expert])
            expected[token] += gate * (hidden @ moe.down.data[expert] + moe.down_bias.data[expert])[0]
    np.testing.assert_allclose(moe(x), expected, rtol=1e-12)


def test_first_choices_come_first_where_capacity_is_short():
    moe = MoE(2, 2, 2, 2, capacity_factor=0.5, dtype=F64, rng=0)
    moe.router.data[...] = np.eye(2)
    moe.vjp(np.array([[0.0, 1.0], [1.0, 0.0], [1.0, 0.0]]))
    assert moe.statistics.load == [2, 2]  # ceil(0.5 * 3 * 2 / 2); all first choices, and the first token's second
    routing = top_k_routing(np.array([[0.0, 0.0, 1.0]]), 2)
    assert routing.experts.tolist() == [[2, 0]]


def test_the_auxiliary_loss_has_the_gradient_of_its_formula():
    x = np.random.default_rng(1).standard_normal((6, 4))
    moe = MoE(4, 6, 3, 1, aux_loss_weight=0.7, dtype=F64, rng=0)
    moe.aux_loss_scale = 2.0
    y, pullback = moe.vjp(x)
    pullback(np.zeros_like(y))
    shares = np.bincount((x @ moe.router.data).argmax(axis=1), minlength=3) / 6

    def loss(router):
        scores = np.exp(x @ router)
        return 3 * (shares * (scores / scores.sum(axis=1, keepdims=True)).mean(axis=0)).sum()

    assert moe.statistics.aux_loss == pytest.approx(loss(moe.router.data), rel=1e-12)
    for place in np.ndindex(4, 3):
        step = np.zeros((4, 3))
        step[place] = 1e-5
        slope = (loss(moe.router.data + step) - loss(moe.router.data - step)) / 2e-5
        assert moe.router.grad[place] == pytest.approx(2 * 0.7 * slope, abs=1e-8)


@pytest.mark.parametrize("sizes", [(12,), (6, 6), (3, 9), (5, 0, 7)])
def test_output_and_gradients_are_those_of_one_process(sizes):
    rng = np.random.default_rng(3)
    x, grad = rng.standard_normal((12, 4)), rng.standard_normal((12, 3))
    cases = [(1, None), (2, None), (3, None), (1, 0.5), (2, 1.0), (3, 1.25)]
    ends = np.cumsum([0, *sizes])

    def one_pass(model, rows, scale):
        y, pullback = model.vjp(x[rows])
        grad_x = pullback(grad[rows] * scale)
        [moe] = [layer for layer in model.modules() if isinstance(layer, MoE)]
        return y, grad_x / scale, moe.statistics.load, moe.statistics.aux_loss

    def run(group):
        rows = slice(ends[group.rank], ends[group.rank + 1])
        results = []
        for case in cases:
            model = ExpertParallel(model_of(*case, seed=group.rank), group)
            found = one_pass(model, rows, len(sizes))
            whole = model.full_state_dict()
            results.append((*found, tp.full_state_dict(model, gradients(model)), whole))
            model.load_full_state_dict(whole)
        return results

    by_rank = simulate(run, len(sizes))
    for case, results in zip(cases, zip(*by_rank, strict=True), strict=True):
        serial = model_of(*case)
        y, grad_x, load, aux_loss = one_pass(serial, slice(None), 1)
        np.testing.assert_allclose(np.concatenate([result[0] for result in results]), y, rtol=1e-12)
        mine = np.concatenate([result[1] for result in results])
        np.testing.assert_allclose(mine, grad_x, rtol=1e-10, atol=1e-13)
        for _, _, my_load, my_aux_loss, grads, state in results:
            assert (my_load, my_aux_loss) == (load, pytest.approx(aux_loss, rel=1e-12))
            assert_close(grads, gradients(serial))
            assert_close(state, serial.state_dict(), rtol=0, atol=0)


@pytest.mark.parametrize("strategy", [DDP, FSDP])
def test_data_parallel_over_another_axis_and_an_optimizer_made_before(strategy):
    def train(model, optimizer, share):
        for step in range(3):
            x, target = np.random.default_rng(step).standard_normal((2, 8, 4))
            y, pullback = model.vjp(x[share])
            pullback(nn.mse_loss(y, target[share, :3])[1])
            optimizer.step()
            optimizer.zero_grad()

    def run(group):
        mesh = DeviceMesh((2, 2), ("dp", "ep"), group)
        model = model_of(aux_loss_weight=0.0)
        optimizer = optim.SGD(model.parameters(), 0.3, momentum=0.9)
        train(model, optimizer, slice(None))  # in one process first
        inner = ExpertParallel(model, mesh["ep"])
        outer = strategy(inner, mesh["dp"])
        train(outer, optimizer, slice(group.rank, None, 4))
        local = outer.full_state_dict() if strategy is FSDP else outer.state_dict()
        return tp.full_state_dict(outer, local)

    serial = model_of(aux_loss_weight=0.0)  # the product of two means differs between parts of a batch and the whole
    optimizer = optim.SGD(serial.parameters(), 0.3, momentum=0.9)
    train(serial, optimizer, slice(None))
    train(serial, optimizer, slice(None))
    for state in simulate(run, 4):
        assert_close(state, serial.state_dict(), rtol=1e-9)


@pytest.mark.parametrize(("dtype", "tolerance"), [(np.float32, 1e-5), (np.float16, 4e-3), (ml_dtypes.bfloat16, 4e-2)])
def test_half_precision_is_that_of_one_process(dtype, tolerance):
    x = np.random.default_rng(3).standard_normal((8, 4)).astype(dtype)

    def one_pass(model, rows):
        y, pullback = model.vjp(x[rows])
        return y, pullback(np.ones_like(y))

    def run(group):
        model = ExpertParallel(model_of(dtype=dtype, aux_loss_weight=0.0), group)
        return one_pass(model, slice(4 * group.rank, 4 * group.rank + 4))

    results = simulate(run, 2)
    for mine, wanted in zip(
        zip(*results, strict=True), one_pass(model_of(dtype=dtype, aux_loss_weight=0.0), slice(None)), strict=True
    ):
        found = np.concatenate(mine)
        assert found.dtype == dtype
        np.testing.assert_allclose(found.astype(F64), wanted.astype(F64), rtol=tolerance, atol=tolerance)


def test_many_tokens_of_half_precision_do_not_saturate_the_bias_gradient():
    moe = MoE(2, 2, 1, 1, aux_loss_weight=0.0, dtype=np.float16, rng=0)
    y, pullback = moe.vjp(np.ones((8192, 2), np.float16))
    pullback(np.ones_like(y))
    assert moe.down_bias.grad.tolist() == [[8192, 8192]]


def test_what_cannot_be_divided_is_refused():
    def run(group):
        with pytest.raises(ferro.UsageError, match="ExpertParallel: the module has no MoE"):
            ExpertParallel(nn.Linear(2, 2, rng=0), group)
        with pytest.raises(ferro.UsageError, match="has fewer experts than the 2 ranks"):
            ExpertParallel(MoE(2, 2, 1, 1, rng=0), group)
        with pytest.raises(ferro.UsageError, match=r"ExpertParallel on group .*the models differ"):
            ExpertParallel(MoE(2, 2 + group.rank, 2, rng=0), group)
        with pytest.raises(ferro.UsageError, match=r"ParallelMoE is made of MoE, not of Linear"):
            ParallelMoE.from_serial(nn.Linear(2, 2, rng=0), group)
        y, pullback = ExpertParallel(MoE(2, 2, 2, rng=0), group).vjp(np.ones((3, 2), np.float32))
        with pytest.raises(ferro.UsageError, match=r"an array of shape \(3, 2\)"):
            pullback(y.T)

    simulate(run, 2)
    for options, message in [
        ({"top_k": 3}, "top_k must be at most num_experts, got 3 and 2"),
        ({"capacity_factor": 0.0}, "capacity_factor must be above 0"),
        ({"activation": nn.ReLU}, r"activation must be a module, such as nn.ReLU\(\)"),
        ({"activation": nn.SwiGLU()}, r"its activation, SwiGLU\(\), made \(2, 1\) of \(2, 2\)"),
    ]:
        with pytest.raises(ferro.UsageError, match=message):
            MoE(2, 2, 2, **options)(np.ones((1, 2), np.float32))


def train_on_shares(group, shares):
    """Train for the checks of the testing kit."""
    moe = MoE(3, 5, 4, 2, aux_loss_weight=0.0, dtype=F64, rng=0)
    model = nn.Sequential(nn.Linear(3, 3, dtype=F64, rng=1), moe)
    if group is not None:
        model = ExpertParallel(model, group)
    optimizer = optim.SGD(model.parameters(), 0.1, momentum=0.9)
    for (x, target), weight in shares:
        y, pullback = model.vjp(x)
        pullback(nn.mse_loss(y, target)[1] * weight)
        optimizer.step()
        optimizer.zero_grad()
    return model.state_dict() if group is None else model.full_state_dict()


@pytest.mark.parametrize("check", CHECKS, ids=lambda check: check.__name__)
def test_the_checks_of_strategies(check):
    batches = [tuple(np.random.default_rng(step).standard_normal((2, 12, 3))) for step in range(3)]
    check(StrategyCase(train=train_on_shares, batches=batches))


def test_a_deep_copy_trains_by_itself():
    def run(group):
        twin = copy.deepcopy(ExpertParallel(model_of(), group))
        y, pullback = twin.vjp(np.full((3, 4), 1.0 + group.rank))
        pullback(y)
        return {name: p.grad for name, p in twin.named_parameters() if not p.splits}

    first, second = simulate(run, 2)
    assert_close(first, second, rtol=0, atol=0)
