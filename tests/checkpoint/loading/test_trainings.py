"""Optimizers, averages and hooks in a checkpoint: what belongs to which parameter, and to which rank."""

import logging
from contextlib import suppress

import numpy as np
import pytest

import ferro
import ferro_checkpoint
from ferro import UsageError
from ferro_checkpoint import StateError
from ferro_strategies import DDP, FSDP, Pipeline, hooks, nn, split_model
from ferro_strategies.optim import EMA, SGD, AdamW, CosineSchedule, LossScaler


def net(seed=0, dtype=np.float32):
    return nn.Sequential(*(nn.Linear(2, 2, dtype=dtype, rng=seed + index) for index in range(3)))


def train(model, *optimizers):
    x = np.ones((1, 2), next(iter(model.parameters())).dtype)
    y, pullback = model.vjp(x)
    pullback(y)
    for optimizer in optimizers:
        optimizer.step()


def groups(model, order, moved=0):
    """Two groups of the first layer, and of the others, with other settings, in either order."""
    layers = [list(layer.parameters()) for layer in model.layers]
    first, rest = layers[0] + layers[1][:moved], layers[1][moved:] + layers[2]
    return [({"params": first}, {"params": rest})[index] for index in order]


def grouped(model, order, lrs, moved=0, schedule=True):
    optimizer = SGD(groups(model, order, moved), lr=0.1)
    for group, lr in zip(optimizer.groups, lrs, strict=True):
        group["lr"] = lr
    if schedule:
        optimizer.follow(CosineSchedule(10))
    return optimizer


def test_settings_belong_to_the_parameters_of_a_group(tmp_path):
    model = net()
    optimizer = grouped(model, (0, 1), (0.001, 0.5))
    ferro_checkpoint.save(tmp_path / "c", {"model": model, "optimizer": optimizer})
    model = net(5)
    optimizer = grouped(model, (1, 0), (1.0, 2.0))
    ferro_checkpoint.load(tmp_path / "c", {"model": model, "optimizer": optimizer})
    train(model, optimizer)
    assert [lr / optimizer.groups[0]["lr"] for lr in optimizer.lrs] == pytest.approx([1, 0.002])
    assert 0.4 < optimizer.lr < 0.5
    for moved in (1, 2):
        other = grouped(model, (0, 1), (1.0, 2.0), moved)
        before, lrs = model.layers[0].weight.data.copy(), other.lrs
        with pytest.raises(
            UsageError, match=r"group 0 \('layers\.0\.weight'.*of its groups \[0, 1\].*Nothing was loaded"
        ):
            ferro_checkpoint.load(tmp_path / "c", {"model": model, "optimizer": other})
        assert (model.layers[0].weight.data == before).all()
        assert other.lrs == lrs


@pytest.mark.parametrize(("n", "m"), [(3, 1), (3, 2), (2, 3)])
def test_settings_of_groups_fit_other_stages(tmp_path, n, m):
    """A rank of a pipeline knows some parameters, so it may have none of a group, or alone know one that is frozen."""

    def state(group, order, lrs, frozen):
        model = net()
        first, last = model.layers[0].weight.data.copy(), model.layers[2].weight.data.copy()
        if group.world_size > 1:
            split = split_model(model, group)
            model = Pipeline(split.stages, group, microbatches=1, ties=split.ties)
        weights = [each for each in model.parameters() if np.array_equal(each.data, first)]
        rest = [each for each in model.parameters() if not np.array_equal(each.data, first)]
        for parameter in rest:
            parameter.requires_grad = not (frozen and np.array_equal(parameter.data, last))
        optimizer = SGD([({"params": weights}, {"params": rest})[index] for index in order], lr=0.1, momentum=0.9)
        optimizer.lrs = lrs
        return {"model": model, "optimizer": optimizer}

    for frozen in (True, False):

        def save(group, frozen=frozen):
            ferro_checkpoint.save(tmp_path / "c", state(group, (0, 1), [0.25, 0.5], frozen), group, overwrite=True)

        def load(group, frozen=frozen):
            loaded = state(group, (1, 0), [1.0, 2.0], not frozen)
            ferro_checkpoint.load(tmp_path / "c", loaded, group)
            return loaded["optimizer"].lrs

        simulate(save, n)
        assert simulate(load, m) == [[0.5, 0.25]] * m


def simulate(function, ranks):
    return ferro.simulate(function, ranks, timeout_s=20, run_timeout_s=40)


def test_gradients_that_no_step_has_used_are_refused(tmp_path):
    model = net(dtype=np.float16)
    optimizer, scaler = SGD(model, lr=0.1), LossScaler()
    state = {"model": model, "optimizer": optimizer, "scaler": scaler}

    def save():
        ferro_checkpoint.save(tmp_path / "c", state, overwrite=True)

    train(model)
    with pytest.raises(UsageError, match=r"gradients that no step has used: '.*weight'.*optimizer\.zero_grad"):
        save()
    optimizer.step()
    save()
    optimizer.zero_grad()
    save()
    train(model)
    ferro_checkpoint.load(tmp_path / "c", state)  # The gradients are of the weights from before.
    assert model.layers[0].weight.grad is None
    save()
    train(model)
    model.layers[0].weight.grad *= np.float32(np.inf)
    assert not scaler.step(optimizer)
    save()

    def accumulated(group):
        model = FSDP(net(), group)
        state = {"model": model, "optimizer": SGD(model, lr=0.1)}
        with model.no_sync():
            train(model)
        with pytest.raises(UsageError, match=r"no_sync\(\) has accumulated"):
            ferro_checkpoint.save(tmp_path / "d", state, group)
        model.zero_grad()
        ferro_checkpoint.save(tmp_path / "d", state, group)

    simulate(accumulated, 2)


def test_averages_that_are_applied_are_saved_with_the_model_alone(tmp_path):
    model = net()
    optimizer = SGD(model, lr=0.1)
    ema = EMA(model, 0.5, optimizer=optimizer)
    train(model, optimizer)
    for state in ({"model": model, "ema": ema}, {"optimizer": optimizer}):
        with ema.applied(), pytest.raises(UsageError, match=r"inside EMA\.applied\(\)"):
            ferro_checkpoint.save(tmp_path / "c", state)
        with suppress(ZeroDivisionError), ema.applied():
            ferro_checkpoint.save(tmp_path / "averages", {"model": model}, overwrite=True)
            raise ZeroDivisionError
        ferro_checkpoint.save(tmp_path / "c", state, overwrite=True)
    found = ferro_checkpoint.load(tmp_path / "averages")["model"]["layers.0.weight"]
    assert (found == ema.state[0]["average"]).all()


@pytest.mark.parametrize(("n", "m"), [(2, 3), (3, 2)])
def test_powersgd_goes_on_with_ranks_that_are_new(tmp_path, n, m):
    def state(group):
        hook = hooks.PowerSGD(rank=2, start_after=2)
        model = DDP(nn.Linear(24, 24, rng=0), group, hook=hook)
        return {"model": model, "optimizer": SGD(model, lr=0.1), "hook": hook}

    def run(group, state, steps):
        rng = np.random.default_rng(group.rank)
        for _ in range(steps):
            y, pullback = state["model"].vjp(rng.standard_normal((5, 24)).astype(np.float32))
            pullback(y)
            state["optimizer"].step()
            state["optimizer"].zero_grad()
        return state["hook"].state_dict()

    def save(group):
        own = state(group)
        run(group, own, 4)
        ferro_checkpoint.save(tmp_path / "c", own, group)
        return own["hook"].state_dict()

    def load(group):
        own = state(group)
        ferro_checkpoint.load(tmp_path / "c", own, group)
        return own["hook"].state_dict(), run(group, own, 1)

    saved, found = simulate(save, n), simulate(load, m)
    for rank, (loaded, after) in enumerate(found):
        assert (loaded["0.qs"] == saved[0]["0.qs"]).all()
        assert loaded["0.steps"] == saved[0]["0.steps"] == 4
        assert after["0.steps"] == 5
        assert ("0.error.1" in loaded) == (rank < n)
        assert (after["0.qs"] == found[0][1]["0.qs"]).all()
        assert rank >= n or (loaded["0.error.1"] == saved[rank]["0.error.1"]).all()


def test_names_do_not_depend_on_the_order_of_the_state(tmp_path):
    def state(keys, seed):
        model = net(seed)
        optimizer = SGD(model.parameters(), lr=0.1, momentum=0.9)
        train(model, optimizer)
        items = {"h1": model.layers[0], "h2": model.layers[1], "m": model, "o": optimizer}
        return {key: items[key] for key in keys}

    for index, keys in enumerate((("h1", "h2", "m", "o"), ("m", "o", "h2"), ("o", "h1", "m"))):
        ferro_checkpoint.save(tmp_path / str(index), state(keys, 0))
        names = ferro_checkpoint.load(tmp_path / str(index))["o"].keys()
        assert names == {f"layers.{i}.{kind}.momentum" for i in range(3) for kind in ("weight", "bias")}
        loaded = state(tuple(reversed(keys)), 5)
        ferro_checkpoint.load(tmp_path / str(index), loaded)
        assert (loaded["o"].state[0]["momentum"] == state(keys, 0)["o"].state[0]["momentum"]).all()
    for keys in (("a", "b"), ("b", "a")):
        modules = {key: nn.Linear(2, 2, rng=0) for key in keys}
        optimizer = SGD([each for key in "ab" for each in modules[key].parameters()], lr=0.1, momentum=0.9)
        ferro_checkpoint.save(tmp_path / "c", {**modules, "o": optimizer}, overwrite=True)
        names = ferro_checkpoint.load(tmp_path / "c")["o"].keys()
        assert names == {f"{key}.{kind}.momentum" for key in "ab" for kind in ("weight", "bias")}


@pytest.mark.parametrize("dtype", [np.float32, np.float16])
@pytest.mark.parametrize("given", ["all", "trained"])
def test_parameters_are_frozen_and_unfrozen(tmp_path, dtype, given, caplog):
    """Also where the optimizer is given those alone that are trained."""

    def state(frozen, seed):
        model = net(seed, dtype)
        for parameter in model.layers[0].parameters():
            parameter.requires_grad = not frozen
        own = [each for each in model.parameters() if given == "all" or each.requires_grad]
        optimizer = AdamW(own, lr=0.1)
        return {"model": model, "optimizer": optimizer, "ema": EMA(own, 0.5, optimizer=optimizer)}

    for frozen in (True, False):
        saved, loaded = state(frozen, 0), state(not frozen, 5)
        train(saved["model"], saved["optimizer"])
        train(loaded["model"], loaded["optimizer"])
        path = tmp_path / f"{frozen}"
        ferro_checkpoint.save(path, saved)
        with caplog.at_level(logging.WARNING, "ferro.checkpoint"):
            ferro_checkpoint.load(path, loaded)
        assert ("begin with a new state" if frozen else "are frozen") in caplog.text
        caplog.clear()
        for index, parameter in enumerate(loaded["optimizer"].parameters):
            for kind, array in loaded["optimizer"].state[index].items():
                if kind == "master":
                    assert (array.astype(dtype) == parameter.data).all()
        for parameter, arrays in zip(loaded["ema"].parameters, loaded["ema"].state, strict=True):
            if frozen and parameter is loaded["model"].layers[0].weight and given == "trained":
                assert (arrays["average"] == parameter.data).all()
    other = state(False, 5)
    other["optimizer"] = AdamW([each for layer in other["model"].layers[1:] for each in layer.parameters()])
    with pytest.raises(StateError, match="nothing in the state takes tensor 'optimizer"):
        ferro_checkpoint.load(path, other)
