"""State of modules whose parts are strategies: each part's own methods are asked, and all is loaded or nothing."""

import numpy as np
import pytest

import ferro
from ferro import UsageError
from ferro_strategies import DDP, FSDP, nn, optim, tensor_parallel


class Doubled(nn.Module):
    """A strategy that keeps half of its module's weight, and notes the calls that it gets."""

    transparent = True

    def __init__(self, module):
        self.module = module
        module.weight.data /= 2
        self.calls = []

    def vjp(self, x):
        return self.module.vjp(x)

    def train(self, mode=True):
        self.calls.append("train")
        return super().train(mode)

    def eval(self):
        self.calls.append("eval")
        return super().eval()

    def zero_grad(self):
        self.calls.append("zero_grad")
        super().zero_grad()

    def state_dict(self):
        return {name: 2 * array if name == "weight" else array for name, array in super().state_dict().items()}

    def prepare_load_state_dict(self, state):
        halved = {name: array / 2 if name == "weight" else array for name, array in state.items()}
        return super().prepare_load_state_dict(halved)


def nested():
    shared = nn.Linear(2, 2, rng=1)
    strategy = Doubled(nn.Sequential(nn.Linear(2, 2, rng=0)).layers[0])
    return nn.Sequential(shared, nn.Residual(strategy), shared), strategy


def test_methods_of_a_strategy_inside_a_module_are_called():
    model, strategy = nested()
    outer = nn.Checkpoint(model)
    outer.eval()
    assert not strategy.training
    assert not strategy.module.training
    assert not model.layers[0].training
    outer.train()
    outer.zero_grad()
    assert strategy.calls == ["eval", "train", "zero_grad"]
    assert strategy.training
    assert strategy.module.training


def test_names_and_values_go_through_the_modules_around_a_strategy():
    model, strategy = nested()
    state = model.state_dict()
    assert list(state) == ["layers.0.weight", "layers.0.bias", "layers.1.module.weight", "layers.1.module.bias"]
    np.testing.assert_array_equal(state["layers.1.module.weight"], nn.Linear(2, 2, rng=0).weight.data)
    for array in state.values():
        array += 1
    assert model.load_state_dict(state) == ([], [])
    np.testing.assert_array_equal(strategy.module.weight.data * 2, state["layers.1.module.weight"])
    np.testing.assert_array_equal(model.layers[0].weight.data, state["layers.0.weight"])


@pytest.mark.parametrize("name", ["layers.0.bias", "layers.1.module.bias"])
def test_all_parts_are_checked_before_one_is_loaded(name):
    model, _ = nested()
    before = model.state_dict()
    state = {key: array + 1 for key, array in before.items()} | {name: np.ones(3, np.float32)}
    with pytest.raises(UsageError, match=r"'.*bias' is float32 \(2,\), given float32 \(3,\). Nothing was loaded"):
        model.load_state_dict(state)
    del state[name]
    state["layers.1.module.extra"] = state["other"] = np.ones(1)
    with pytest.raises(UsageError, match=rf"missing '{name}'; unexpected 'other'; unexpected 'layers.1.module.extra'"):
        model.load_state_dict(state)
    for key, array in model.state_dict().items():
        np.testing.assert_array_equal(array, before[key])
    assert model.load_state_dict(state, strict=False) == ([name], ["other", "layers.1.module.extra"])
    for key, array in model.state_dict().items():
        np.testing.assert_array_equal(array, before[key] + (key != name))


class OwnLoad(nn.Module):
    """A module of a third party with a load of its own."""

    def __init__(self):
        self.inner = nn.Linear(2, 2, bias=False)

    def vjp(self, x):
        return self.inner.vjp(x)

    def state_dict(self):
        return {"half": self.inner.weight.data / 2}

    def load_state_dict(self, state):
        self.inner.weight.data[...] = 2 * state["half"]


def test_a_module_may_override_loading_alone():
    model = nn.Sequential(nn.ReLU(), OwnLoad())
    model.load_state_dict({"layers.1.half": np.ones((2, 2), np.float32)})
    np.testing.assert_array_equal(model.layers[1].inner.weight.data, np.full((2, 2), 2.0))
    assert list(model.state_dict()) == ["layers.1.half"]


def test_parts_wrapped_one_by_one_save_and_load_whole_arrays():
    def build():
        return nn.Linear(3, 4, rng=0), nn.Linear(4, 4, rng=1), nn.Linear(4, 3, rng=2)

    plain = nn.Sequential(*build())
    whole = plain.state_dict()

    def work(group):
        a, b, c = build()
        model = nn.Sequential(DDP(a, group), nn.Sequential(FSDP(b, group)), DDP(nn.Residual(nn.Linear(3, 3)), group))
        model.layers[2] = c
        names = {name.replace("layers.1.layers.0", "layers.1"): array for name, array in model.state_dict().items()}
        for name, array in whole.items():
            np.testing.assert_array_equal(names[name], array)
        shifted = {name: array + 1 for name, array in model.state_dict().items()}
        # One rank has another file: nothing is loaded on any.
        wrong = shifted if group.rank else {**shifted, "layers.1.layers.0.bias": np.ones(5, np.float32)}
        with pytest.raises(UsageError, match=r"in 'layers.1.layers.0': 'bias' is float32 \(4,\), given float32 \(5,\)"):
            model.load_state_dict(wrong)
        for name, array in model.state_dict().items():
            np.testing.assert_array_equal(array + 1, shifted[name])
        model.load_state_dict(shifted)
        for name, array in model.state_dict().items():
            np.testing.assert_array_equal(array, shifted[name])
        # The gradient that FSDP has accumulated is cleared from outside.
        fsdp = model.layers[1].layers[0]
        with fsdp.no_sync():
            y, pull = fsdp.vjp(np.ones((2, 4), np.float32))
            pull(np.ones_like(y))
        model.zero_grad()
        fsdp.sync_gradients()
        assert all(parameter.grad is None for parameter in fsdp.parameters())

    ferro.simulate(work, 2, timeout_s=20)


@pytest.mark.parametrize("make", [lambda p: optim.SGD(p, 0.1, momentum=0.9), lambda p: optim.AdamW(p, 0.1)])
def test_an_optimizer_of_parts_wrapped_one_by_one_saves_and_loads_whole_arrays(make):
    x = np.linspace(-1, 1, 12, dtype=np.float32).reshape(4, 3)

    def build(group):
        a, b, c = nn.Linear(3, 4, rng=0), nn.Linear(4, 4, rng=1), nn.Linear(4, 2, rng=2)
        if group is not None:
            a, b = DDP(a, group), FSDP(b, group)
            c = FSDP(tensor_parallel.ColumnParallelLinear.from_serial(c, group.split(group.rank)), group)
        return nn.Sequential(a, b, c)

    def train(model, optimizer, steps):
        for _ in range(steps):
            y, pull = model.vjp(x)
            pull(y)
            optimizer.step()
            model.zero_grad()

    plain = build(None)
    alone = make(plain.parameters())
    train(plain, alone, 2)
    wanted = plain.full_optimizer_state_dict(alone)
    assert "layers.1.weight.momentum" in wanted or "layers.1.weight.exp_avg" in wanted or len(wanted) > 6

    def work(group):
        model = build(group)
        optimizer = make(model.parameters())
        train(model, optimizer, 2)
        found = model.full_optimizer_state_dict(optimizer)
        assert found.keys() == wanted.keys()
        for name, array in wanted.items():
            np.testing.assert_allclose(found[name], array, rtol=1e-5, atol=1e-6)
        again = build(group)
        another = make(again.parameters())
        again.load_full_optimizer_state_dict(another, found)
        for name, array in again.full_optimizer_state_dict(another).items():
            np.testing.assert_array_equal(array, found[name])
        key = next(name for name, array in found.items() if name.startswith("layers.1.weight") and array.shape)
        wrong = {**found, key: np.ones((4, 5), np.float32)} if group.rank == 1 else found
        with pytest.raises(UsageError, match=r"is \(4, 4\), given float32 \(4, 5\) \(found by rank 1|given float32"):
            again.load_full_optimizer_state_dict(another, wrong)
        with pytest.raises(UsageError, match="is none of this module"):
            again.layers[1].full_optimizer_state_dict(another)

    ferro.simulate(work, 2, timeout_s=20)
