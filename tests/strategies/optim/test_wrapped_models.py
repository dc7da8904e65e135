"""Optimizers and averages made before or after wrapping, with states of whole arrays, equal one process."""

import numpy as np
import pytest

import ferro
from ferro_strategies import DDP, FSDP, DeviceMesh, nn
from ferro_strategies.fsdp import ShardingStrategy
from ferro_strategies.optim import (
    EMA,
    SGD,
    Adafactor,
    Adagrad,
    AdamW,
    CosineSchedule,
    Lion,
    Muon,
    clip_grad_norm,
    decay_groups,
    matrices_and_others,
)
from ferro_strategies.tensor_parallel import ColumnParallelLinear, RowParallelLinear, full_state_dict, parallelize

RNG = np.random.default_rng(0)
X, T = RNG.standard_normal((6, 4, 3)), RNG.standard_normal((6, 4, 2))
SHARDINGS = [sharding for sharding in ShardingStrategy if sharding is not ShardingStrategy.HYBRID_SHARD]
OPTIMIZERS = {
    "sgd": lambda net: SGD(decay_groups(net, 0.1), 0.05, momentum=0.9),
    "adamw": lambda net: AdamW(decay_groups(net, 0.1), 0.05),
    "adagrad": lambda net: Adagrad(net, 0.05),
    "lion": lambda net: Lion(net, 0.01),
    "adafactor": lambda net: Adafactor(net, 0.05, weight_decay=0.1),
    "muon": lambda net: Muon(matrices_and_others(net)[0], 0.05),
}


def build(dtype=np.float64):
    layers = (
        nn.Linear(3, 5, dtype=dtype, rng=0),
        nn.LayerNorm(5, dtype=dtype),
        nn.ReLU(),
        nn.Linear(5, 2, dtype=dtype, rng=1),
    )
    return nn.Sequential(*layers)


def train(model, optimizer, which, part=slice(None), ema=None):
    for i in which:
        y, pull = model.vjp(X[i][part].astype(next(model.parameters()).data.dtype))
        pull(nn.mse_loss(y, T[i][part].astype(y.dtype))[1])
        optimizer.step()
        model.zero_grad()
        if ema is not None:
            ema.update()


def same(one, other, **tolerance):
    assert one.keys() == other.keys()
    for name, array in one.items():
        np.testing.assert_allclose(array, other[name], **({"rtol": 1e-10, "atol": 1e-13} | tolerance))


def serial(make):
    """Train 3 steps, save, and train 3 more; return the saved states and the end."""
    net = build()
    optimizer = make(net)
    optimizer.follow(CosineSchedule(8))
    train(net, optimizer, range(3))
    saved = net.state_dict(), optimizer.state_dict()
    train(net, optimizer, range(3, 6))
    return *saved, net.state_dict()


@pytest.mark.parametrize("name", OPTIMIZERS)
def test_state_loaded_before_wrapping_is_cut_with_the_parameters(name):
    make = OPTIMIZERS[name]
    saved, saved_state, expected = serial(make)

    def run(group, wrap, moment):
        net = build()
        net.load_state_dict(saved)
        optimizer = make(net)
        optimizer.follow(CosineSchedule(8))
        if moment == "before":
            optimizer.load_state_dict(saved_state)
        model = wrap(net, group)
        if moment == "after":  # by names, from the whole arrays
            names = [key for key, p in net.named_parameters() for q in optimizer.parameters if p is q]
            index_of = {str(optimizer.parameters.index(p)): key for key, p in net.named_parameters() if key in names}
            whole = {
                ".".join([index_of[key.partition(".")[0]], key.partition(".")[2]]) if key[0].isdecimal() else key: array
                for key, array in saved_state.items()
            }
            model.load_full_optimizer_state_dict(optimizer, whole)
            same(model.full_optimizer_state_dict(optimizer), whole)
        train(model, optimizer, range(3, 6), slice(group.rank, None, 2))
        return model.state_dict()

    for wrap in (DDP, *(lambda net, group, s=sharding: FSDP(net, group, sharding=s) for sharding in SHARDINGS)):
        for moment in ("before",) if wrap is DDP else ("before", "after"):
            for result in ferro.simulate(lambda group, w=wrap, m=moment: run(group, w, m), 2, timeout_s=20):
                same(result, expected)


def test_ranks_with_different_states_are_told_when_the_model_is_wrapped():
    def run(group, wrap):
        net = build()
        optimizer = AdamW(net)
        if group.rank == 1:
            train(net, optimizer, [0])
        net.load_state_dict(build().state_dict())
        with pytest.raises(
            ferro.UsageError, match=r"'layers\.0\.weight' the state of AdamW: none yet, rank 1 has .*m float64"
        ):
            wrap(net, group)

    for wrap in (DDP, FSDP):
        ferro.simulate(lambda group, w=wrap: run(group, w), 2, timeout_s=20)


def test_state_that_cannot_be_cut_is_refused_before_anything_changes():
    def run(group):
        net = build()
        optimizer = SGD(net, 0.1, momentum=0.9)
        train(net, optimizer, [0])
        optimizer.state[0]["momentum"] = np.zeros(4)
        with pytest.raises(ferro.UsageError, match=r"'momentum' of parameter .* has shape \(4,\)"):
            FSDP(net, group)
        assert net.layers[0].weight.data.shape == (3, 5)

    ferro.simulate(run, 2, timeout_s=20)


def test_averages_follow_every_strategy_and_are_swapped_in():
    net = build()
    optimizer, ema = SGD(net, 0.1), EMA(net, decay=0.5)
    train(net, optimizer, range(4), ema=ema)
    expected, last = [state["average"] for state in ema.state], net.state_dict()
    names = [name for name, _ in net.named_parameters()]

    def run(group, wrap, moment):
        net = build()
        ema = EMA(net, decay=0.5) if moment == "before" else None
        model = wrap(net, group)
        ema = ema or EMA(model, decay=0.5)
        train(model, SGD(model, 0.1), range(4), slice(group.rank, None, 2), ema=ema)
        with ema.applied():
            applied = model.state_dict()
        if wrap is FSDP:
            whole = model.full_optimizer_state_dict(ema)
            again = EMA(model, decay=0.1)
            model.load_full_optimizer_state_dict(again, whole)
            assert (again.decay, int(again.updates)) == (0.5, 4)
            same({name: whole[f"{name}.average"] for name in names}, dict(zip(names, expected, strict=True)))
        return applied, model.state_dict()

    for wrap in (DDP, FSDP):
        for moment in ("before", "after"):
            for applied, after in ferro.simulate(lambda group, w=wrap, m=moment: run(group, w, m), 2, timeout_s=20):
                same(applied, dict(zip(names, expected, strict=True)))
                same(after, last)


def test_averages_of_half_precision_are_wide_and_changes_inside_are_refused():
    net = build(np.float16)
    ema = EMA(net, decay=0.999)
    start = net.layers[0].weight.data.copy()
    net.layers[0].weight.data += np.float16(1e-3)
    moved = net.layers[0].weight.data - start
    for _ in range(3):
        ema.update()
    expected = start + moved.astype(np.float32) * (1 - 0.999**3)
    np.testing.assert_allclose(ema.state[0]["average"], expected, rtol=1e-6)
    kept = net.layers[0].weight.data.copy()
    with pytest.raises(ferro.UsageError, match="were changed while they had their averages"), ema.applied():
        net.layers[0].weight.data += np.float16(1)
    np.testing.assert_array_equal(net.layers[0].weight.data, kept)
    other = EMA(net)
    other.load_state_dict(ema.state_dict())
    same(other.state_dict(), ema.state_dict(), rtol=0)
    with pytest.raises(ferro.UsageError, match="decay must be"):
        EMA(net, decay=1.5)


@pytest.mark.parametrize("norm_type", [1.0, 2.0, 3.0, np.inf])
def test_every_norm_is_that_of_the_whole_model(norm_type):
    net = build()
    y, pull = net.vjp(X[0])
    pull(nn.mse_loss(y, T[0])[1])
    gradients = {name: parameter.grad.copy() for name, parameter in net.named_parameters()}
    norm = clip_grad_norm(net, 0.1, norm_type)
    clipped = {name: parameter.grad for name, parameter in net.named_parameters()}
    flat = np.concatenate([gradient.ravel() for gradient in gradients.values()])
    assert norm == pytest.approx(np.linalg.norm(flat, norm_type))

    def run(group):
        mesh = DeviceMesh((2, 2), ("pp", "dp"), group)
        stage, names = mesh["pp"].rank, list(gradients)
        first = names[:3] if stage == 0 else names[3:]
        model = FSDP(build(), mesh["dp"])
        y, pull = model.vjp(X[0][mesh["dp"].rank :: 2])
        pull(nn.mse_loss(y, T[0][mesh["dp"].rank :: 2])[1])
        held = [parameter for name, parameter in model.named_parameters() if name in first]
        for parameter in held:
            parameter.stages = mesh["pp"]
        assert clip_grad_norm(held, 0.1, norm_type) == pytest.approx(norm)
        for parameter, sharded in zip(held, [model._sharded[name] for name in first], strict=True):
            part = sharded.local_part(clipped[sharded.name], model._config)
            np.testing.assert_allclose(parameter.grad, part, rtol=1e-10)

    ferro.simulate(run, 4, timeout_s=20)


# -- tensor parallelism ------------------------------------------------------------------------------


@pytest.mark.parametrize("name", OPTIMIZERS)
def test_state_from_before_parallelize_is_cut_with_the_parameters(name):
    make = OPTIMIZERS[name]
    plan = {"layers.0": ColumnParallelLinear.from_serial, "layers.3": RowParallelLinear.from_serial}

    def run(group, fsdp):
        mesh = DeviceMesh((2, 2 if fsdp else 1), ("tp", "dp"), group)
        net = build()
        net.layers[1:2] = []  # a LayerNorm would have to see all columns
        optimizer = make(net)
        optimizer.follow(CosineSchedule(8))
        train(net, optimizer, range(3))
        model = parallelize(net, mesh["tp"], {"layers.0": plan["layers.0"], "layers.2": plan["layers.3"]})
        if fsdp:
            model = FSDP(model, mesh["dp"])
        train(model, optimizer, range(3, 6), slice(mesh["dp"].rank, None, 2 if fsdp else None))
        return model.full_optimizer_state_dict(optimizer), full_state_dict(model, model.state_dict())

    net = build()
    net.layers[1:2] = []
    optimizer = make(net)
    optimizer.follow(CosineSchedule(8))
    train(net, optimizer, range(6))
    for fsdp in (False, True):
        for state, values in ferro.simulate(lambda group, f=fsdp: run(group, f), 4 if fsdp else 2, timeout_s=20):
            same(values, net.state_dict())
            same(state, net.full_optimizer_state_dict(optimizer))


def test_parameters_that_parallelize_replaces_by_others_are_refused_at_the_step():
    def run(group):
        net = build()
        optimizer = SGD(net, 0.1)
        model = parallelize(
            net, group, {"layers.3": lambda layer, _: nn.Linear(5, 2, bias=False, dtype=np.float64, rng=0)}
        )
        with pytest.raises(ferro.UsageError, match=r"the model no longer has: .* Make the SGD from the parameters"):
            optimizer.step()
        SGD(model, 0.1).step()

    ferro.simulate(run, 2, timeout_s=20)
