"""Modules: parameters, buffers and submodules of their attributes, their state; containers."""

import copy

import numpy as np
import pytest

from ferro.errors import UsageError
from ferro_strategies.nn import (
    BatchNorm,
    Buffer,
    Conv2d,
    Dropout,
    Embedding,
    Flatten,
    Linear,
    MaxPool2d,
    Module,
    Parameter,
    ReLU,
    Residual,
    Sequential,
    replace_modules,
)


class Tree(Module):
    """A module that holds its parts in every way that is allowed."""

    def __init__(self):
        self.scale = Parameter(np.ones(1))
        self.first = Linear(2, 2, rng=0)
        self.width = 2
        self.blocks = [Linear(2, 2, bias=False, rng=1), (BatchNorm(2), ReLU())]
        self.heads = {"a": Linear(2, 3, rng=2), "b": self.first}
        self.seen = Buffer(np.zeros(2))
        self.again = self.scale

    def vjp(self, x):
        return self.first.vjp(x)


def test_parts_are_found_once_in_definition_order():
    tree = Tree()
    assert [name for name, _ in tree.named_parameters()] == [
        "scale",
        "first.weight",
        "first.bias",
        "blocks.0.weight",
        "blocks.1.0.weight",
        "blocks.1.0.bias",
        "heads.a.weight",
        "heads.a.bias",
    ]
    assert [name for name, _ in tree.named_buffers()] == [
        "blocks.1.0.running_mean",
        "blocks.1.0.running_var",
        "blocks.1.0.num_batches_tracked",
        "seen",
    ]
    assert [name for name, _ in tree.named_modules()] == [
        "",
        "first",
        "blocks.0",
        "blocks.1.0",
        "blocks.1.1",
        "heads.a",
    ]
    assert list(tree.parameters()) == [p for _, p in tree.named_parameters()]
    assert list(tree.buffers()) == [b for _, b in tree.named_buffers()]
    assert list(tree.modules()) == [m for _, m in tree.named_modules()]


def test_a_module_that_refers_back_to_its_parent_is_walked_once():
    tree = Tree()
    tree.first.parent = tree
    assert [name for name, _ in tree.named_modules()][:2] == ["", "first"]


def test_train_and_eval_reach_every_module():
    tree = Tree()
    assert all(module.training for module in tree.modules())
    assert tree.eval() is tree
    assert not any(module.training for module in tree.modules())
    assert tree.train() is tree
    assert not tree.train(False).training
    tree.train()
    assert all(module.training for module in tree.modules())


def test_zero_grad_reaches_every_parameter():
    tree = Tree()
    for parameter in tree.parameters():
        parameter.add_grad(parameter.data)
    tree.zero_grad()
    assert [p.grad for p in tree.parameters()] == [None] * 8


def test_state_makes_the_round_trip_in_place():
    source, target = Tree(), Tree()
    for index, holder in enumerate([*source.parameters(), *source.buffers()]):
        holder.data[...] = index
    state = source.state_dict()
    arrays = [parameter.data for parameter in target.parameters()]
    target.load_state_dict(state)
    assert list(state) == list(target.state_dict())
    for name, array in target.state_dict().items():
        np.testing.assert_array_equal(array, state[name])
    assert all(p.data is array for p, array in zip(target.parameters(), arrays, strict=True))
    state["scale"][...] = 99
    assert source.scale.data[0] == 0  # the state is a copy
    assert target.scale.data[0] == 0


def drop(state):
    del state["first.bias"]


def add(state):
    state["other"] = np.zeros(1)


def reshape(state):
    state["first.bias"] = np.zeros(3, np.float32)


def retype(state):
    state["first.bias"] = np.zeros(2, np.float64)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (drop, "missing 'first.bias'"),
        (add, "unexpected 'other'"),
        (reshape, r"'first.bias' is float32 \(2,\), given float32 \(3,\)"),
        (retype, r"'first.bias' is float32 \(2,\), given float64 \(2,\)"),
    ],
)
def test_a_state_that_does_not_fit_changes_nothing(change, message):
    tree = Tree()
    before = tree.state_dict()
    state = {name: array + 1 for name, array in before.items()}
    change(state)
    with pytest.raises(UsageError, match=message):
        tree.load_state_dict(state)
    for name, array in tree.state_dict().items():
        np.testing.assert_array_equal(array, before[name])


def test_of_many_misfits_the_first_few_are_told():
    model = Sequential(*(Linear(1, 1, rng=0) for _ in range(50)))
    state = {f"model.{name}": array for name, array in model.state_dict().items()}
    with pytest.raises(UsageError) as refused:
        model.load_state_dict(state)
    told = str(refused.value)
    assert "'layers.1.bias'; and 96 more; unexpected 'model.layers.0.weight'; " in told
    assert "'model.layers.1.bias'; and 96 more. Nothing was loaded." in told


def test_a_deep_copy_keeps_sharing_within_and_shares_nothing_with_the_original():
    tree = Tree()
    twin = copy.deepcopy(tree)
    assert twin.again is twin.scale
    assert twin.heads["b"] is twin.first
    twin.scale.data += 1
    assert tree.scale.data[0] == 1


def test_calling_gives_the_output_alone():
    model = Sequential(Linear(2, 3, rng=0), Residual(Sequential(Linear(3, 3, rng=1), ReLU())))
    x = np.random.default_rng(2).standard_normal((4, 2)).astype(np.float32)
    np.testing.assert_array_equal(model(x), model.vjp(x)[0])


def test_a_sequential_pullback_runs_once():
    model = Sequential(ReLU(), Flatten())
    _, pullback = model.vjp(np.ones((1, 2)))
    pullback(np.ones((1, 2)))
    with pytest.raises(UsageError, match="has been run"):
        pullback(np.ones((1, 2)))


def test_an_empty_sequential_is_the_identity():
    y, pullback = Sequential().vjp(np.array([1.0]))
    np.testing.assert_array_equal(y, [1])
    np.testing.assert_array_equal(pullback(np.array([2.0])), [2])


def test_a_sequential_that_begins_with_indices_has_no_input_gradient():
    model = Sequential(Flatten(), Embedding(3, 2, rng=0), Linear(2, 1, rng=1))
    _, pullback = model.vjp(np.array([[0, 2]]))
    assert pullback(np.ones((1, 2, 1), np.float32)) is None
    assert all(parameter.grad is not None for parameter in model.parameters())


def ints(*shape):
    return np.zeros(shape, np.int64)


def floats(*shape):
    return np.zeros(shape, np.float32)


@pytest.mark.parametrize(
    ("module", "x", "message"),
    [
        (Linear(2, 3), floats(4, 3), r"Linear\(2, 3.*expected input of shape \(\.\.\., 2\), got"),
        (Linear(2, 3), floats(), r"got \(\)"),
        (Linear(2, 3), np.zeros((4, 2)), "expected input of dtype float32.*got float64"),
        (Linear(2, 3), [[0.0, 0.0]], "expected a NumPy or CuPy array"),
        (Conv2d(2, 3, 3), floats(4, 2, 2, 5), r"Conv2d.*\(N, 2, H >= 3, W >= 3\)"),
        (Conv2d(2, 3, 3, padding=1), floats(4, 1, 5, 5), r"\(N, 2, H >= 1, W >= 1\)"),
        (Conv2d(2, 3, 3), floats(2, 5, 5), r"got \(2, 5, 5\)"),
        (MaxPool2d(3), floats(1, 1, 3, 2), r"MaxPool2d.*\(N, C, H >= 3, W >= 3\)"),
        (BatchNorm(3), floats(4, 2), r"BatchNorm.*\(N, 3\) or \(N, 3, \.\.\.\)"),
        (BatchNorm(3), floats(1, 3), "more than one value per channel"),
        (Embedding(3, 2), floats(4), "expected integer indices, got float32"),
        (Embedding(3, 2), ints(4) - 1, "from 0 to 2, got -1 to -1"),
        (Embedding(3, 2), ints(4) + 3, "from 0 to 2, got 3 to 3"),
        (Flatten(), floats(), r"Flatten.*got \(\)"),
        (Residual(Linear(2, 3)), floats(4, 2), r"Residual.*got \(4, 2\)"),
    ],
)
def test_a_wrong_input_is_refused_with_the_layer_and_both_shapes(module, x, message):
    with pytest.raises(UsageError, match=message):
        module.vjp(x)
    assert all(parameter.outstanding_uses == 0 for parameter in module.parameters())


@pytest.mark.parametrize(
    "build",
    [
        lambda: Linear(0, 3),
        lambda: Conv2d(1, 0, 3),
        lambda: Conv2d(1, 1, 3, stride=0),
        lambda: Conv2d(1, 1, (3, 0)),
        lambda: Conv2d(1, 1, 3, padding=-1),
        lambda: MaxPool2d(0),
        lambda: BatchNorm(0),
        lambda: Embedding(0, 1),
        lambda: Dropout(1.5),
    ],
)
def test_impossible_layers_are_refused(build):
    with pytest.raises(UsageError):
        build()


class Wrapper(Module):
    """Another module's parameters, under their names there."""

    transparent = True

    def __init__(self, module):
        self.module = module

    def vjp(self, x):
        return self.module.vjp(x)


def test_a_transparent_wrapper_leaves_no_trace_in_names():
    tree, wrapped = Tree(), Tree()
    wrapped.first = Wrapper(wrapped.first)
    wrapped.blocks[0] = Wrapper(Wrapper(wrapped.blocks[0]))
    whole = Wrapper(wrapped)
    assert list(whole.state_dict()) == list(tree.state_dict())
    assert [name for name, _ in whole.named_modules()][:4] == ["", "", "first", "first"]
    whole.load_state_dict(tree.state_dict())


def test_modules_are_replaced_wherever_they_stand():
    tree = Tree()
    before = dict(tree.named_parameters())
    asked = []

    def wrap(name, module):
        asked.append(name)
        return Wrapper(module) if isinstance(module, Linear | ReLU) else module

    assert replace_modules(tree, wrap) is tree
    assert asked == ["first", "blocks.0", "blocks.1.0", "blocks.1.1", "heads.a", ""]
    assert isinstance(tree.first, Wrapper)
    assert tree.heads["b"] is tree.first, "what stands in two places is replaced in both"
    assert isinstance(tree.blocks[0], Wrapper)
    assert isinstance(tree.blocks[1], tuple)
    assert isinstance(tree.blocks[1][1], Wrapper)
    assert isinstance(tree.heads["a"], Wrapper)
    assert dict(tree.named_parameters()) == before


def test_the_root_can_be_replaced():
    layer = Linear(2, 2)
    root = replace_modules(layer, lambda name, module: Wrapper(module))
    assert isinstance(root, Wrapper)
    assert root.module is layer


def test_nothing_is_rebuilt_where_nothing_is_replaced():
    tree = Tree()
    blocks, pair = tree.blocks, tree.blocks[1]
    replace_modules(tree, lambda name, module: module)
    assert tree.blocks is blocks
    assert tree.blocks[1] is pair
