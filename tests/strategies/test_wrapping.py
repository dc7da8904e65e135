"""Wrapping, and changes after it, by DDP and FSDP: what cannot work is refused with the names at fault."""

from collections import namedtuple
from copy import deepcopy

import numpy as np
import pytest

import ferro
from ferro_strategies import DDP, FSDP, MixedPrecision
from ferro_strategies.nn import Linear, Module, Parameter, ReLU, Sequential
from ferro_strategies.optim import SGD


def build():
    return Sequential(Linear(3, 4, rng=0), ReLU(), Linear(4, 2, rng=1))


X = np.ones((2, 3), np.float32)
WRAPPERS = [DDP, FSDP]


def one_pass(model):
    y, pullback = model.vjp(X)
    pullback(np.ones_like(y))


@pytest.mark.parametrize("outer", WRAPPERS)
@pytest.mark.parametrize("inner", WRAPPERS)
def test_a_part_is_wrapped_once(outer, inner):
    def run(group):
        with pytest.raises(ferro.UsageError, match=rf"it is a {inner.__name__}, which averages the gradients already"):
            outer(inner(build(), group), group)
        with pytest.raises(ferro.UsageError, match=rf"its part 'layers\.1' is a {inner.__name__}"):
            outer(Sequential(Linear(3, 3), inner(build(), group)), group)
        with pytest.raises(ferro.UsageError, match="got a NoneType second"):
            outer(build(), None)
        with pytest.raises(ferro.UsageError, match="got a ProcessGroup first"):
            outer(group, build())

    ferro.simulate(run, 1, timeout_s=10)


def replace_layer(model):
    model.module.layers[2] = Linear(4, 2, rng=7)


def add_parameter(model):
    model.module.layers[1].scale = Parameter(np.ones(2, np.float32))


def remove_layer(model):
    model.module.layers.pop()


CHANGES = {
    replace_layer: r"'layers\.2\.weight' was replaced; 'layers\.2\.bias' was replaced",
    add_parameter: r"'layers\.1\.scale' was added",
    remove_layer: r"'layers\.2\.weight' was removed",
}


@pytest.mark.parametrize("change", CHANGES)
def test_fsdp_refuses_parameters_that_change_after_wrapping(change):
    def run(group):
        model = FSDP(build(), group)
        optimizer = SGD(model.parameters(), lr=0.1)
        change(model)
        for use in (
            lambda: model.vjp(X),
            lambda: model(X),
            model.state_dict,
            model.sharded_state_dict,
            lambda: model.load_state_dict(build().state_dict()),
            lambda: model.full_optimizer_state_dict(optimizer),
        ):
            with pytest.raises(ferro.UsageError, match=CHANGES[change]):
                use()

    ferro.simulate(run, 2, timeout_s=10)


def test_fsdp_refuses_arrays_that_are_assigned_to_its_parameters():
    def run(group):
        model = FSDP(build(), group)
        parameter = next(model.parameters())
        parameter.data = parameter.data * 2
        for use in (lambda: one_pass(model), model.state_dict):
            with pytest.raises(ferro.UsageError, match=r"assigned to `data` of parameter 'layers\.0\.weight'"):
                use()

    ferro.simulate(run, 2, timeout_s=10)


def test_layers_without_parameters_may_be_replaced():
    def run(group):
        model = FSDP(build(), group)
        model.module.layers[1] = ReLU()
        model.eval()
        one_pass(model)
        return model.state_dict()

    assert len(ferro.simulate(run, 2, timeout_s=10)[0]) == 4


def test_a_deep_copy_of_ddp_evaluates_and_trains():
    def run(group):
        model = DDP(build(), group)
        one_pass(model)
        twin = deepcopy(model)
        np.testing.assert_array_equal(twin(X), model(X))
        twin.zero_grad()
        y, pullback = twin.vjp(X * (group.rank + 1))
        pullback(np.ones_like(y))
        SGD(twin.parameters(), lr=0.1).step()
        assert not np.array_equal(twin(X), model(X))
        one_pass(model)
        return twin.state_dict()

    first, second = ferro.simulate(run, 2, timeout_s=10)
    for name, value in first.items():
        np.testing.assert_array_equal(second[name], value)


def test_one_rank_that_evaluates_alone_is_named():
    def run(group):
        model = FSDP(build(), group)
        one_pass(model)
        if group.rank == 0:
            model(X)
        one_pass(model)

    with pytest.raises(ferro.CollectiveMismatch, match=r"called FSDP\.__call__") as caught:
        ferro.simulate(run, 2, timeout_s=10)
    assert "FSDP.vjp" in str(caught.value)


Towers = namedtuple("Towers", "left right")


class TwoTowers(Module):
    def __init__(self):
        self.layers = [Linear(3, 2, rng=0), Linear(4, 2, rng=1)]
        self.seen = []

    def vjp(self, x):
        inputs, mask = x["towers"], x["mask"]
        self.seen = [inputs.left.dtype, mask.dtype]
        (a, pull_a), (b, pull_b) = (layer.vjp(each) for layer, each in zip(self.layers, inputs, strict=True))

        def pullback(grads):
            return {"towers": Towers(pull_a(grads[0] * mask), pull_b(grads[1])), "mask": None}

        return (a, b), pullback


@pytest.mark.parametrize("wrap", WRAPPERS)
@pytest.mark.parametrize("half", [False, True])
def test_trees_of_arrays_pass_through(wrap, half):
    mask = np.array([[True], [False]])

    def inputs(rank):
        return {"towers": Towers(X * (rank + 1), np.ones((2, 4), np.float32)), "mask": mask}

    def train(model, rank):
        y, pullback = model.vjp(inputs(rank))
        grads = pullback((np.ones_like(y[0]), np.ones_like(y[1])))
        assert type(grads["towers"]) is Towers
        assert grads["mask"] is None
        assert grads["towers"].left.dtype == np.float32
        if model is not alone:
            with pytest.raises(ferro.UsageError, match="tree of arrays"):
                model.vjp(inputs(rank))[1](np.ones(2))
        return type(model(inputs(rank)))

    def run(group):
        options = {}
        if half and wrap is FSDP:
            options["mixed_precision"] = MixedPrecision(param_dtype=np.float16, output_dtype=np.float32)
        model = wrap(TwoTowers(), group, **options)
        assert train(model, group.rank) is tuple
        dtype = np.float16 if options else np.float32
        assert model.module.seen == [dtype, np.bool_]
        SGD(model.parameters(), lr=1.0).step()
        return model.state_dict()

    alone = TwoTowers()
    for rank in range(2):
        train(alone, rank)
    for parameter in alone.parameters():
        parameter.data -= parameter.grad / 2
    for state in ferro.simulate(run, 2, timeout_s=10):
        for name, value in alone.state_dict().items():
            np.testing.assert_allclose(state[name], value, rtol=1e-3 if half else 1e-6, atol=1e-2 if half else 1e-6)
