"""Sequential as a list, and the collections in which a module may hold its parts."""

import pickle
from collections import UserDict, UserList, deque, namedtuple
from types import MappingProxyType

import numpy as np
import pytest

import ferro
from ferro import UsageError
from ferro_strategies import DDP, FSDP, nn
from ferro_strategies.nn.module import TreeSnapshot

Pair = namedtuple("Pair", "a b")


def layers(count):
    return [nn.Linear(2, 2, rng=seed) for seed in range(count)]


def test_a_sequential_is_used_like_a_list():
    a, b, c, d = layers(4)
    model = nn.Sequential(a, b)
    assert (len(model), model[0], model[-1], list(model)) == (2, a, b, [a, b])
    assert model.append(c).insert(0, d).extend([nn.ReLU()]) is model
    assert [name for name, _ in model.named_parameters()][:2] == ["layers.0.weight", "layers.0.bias"]
    del model[-1]
    model[0] = a
    part = model.eval()[1:]
    assert isinstance(part, nn.Sequential)
    assert not part.training
    assert part.layers == [a, b, c]
    assert bool(nn.Sequential())
    with pytest.raises(IndexError):
        model[7]


@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        (lambda: nn.Sequential([nn.ReLU()]), "one argument each; got a list"),
        (lambda: nn.Sequential(nn.ReLU), r"got the class ReLU; make a module of it: ReLU\(...\)"),
        (lambda: nn.Sequential().append(np.tanh), "got a ufunc"),
        (lambda: nn.Checkpoint(np.tanh), "Checkpoint is made of modules, .*; got a ufunc"),
        (lambda: nn.Residual(nn.ReLU), "Residual is made of modules, .*; got the class ReLU"),
        (lambda: nn.Sequential(nn.ReLU()).extend([nn.ReLU(), None]), "got a NoneType"),
    ],
)
def test_items_that_are_no_modules_are_refused(wrong, message):
    with pytest.raises(UsageError, match=message):
        wrong()


class Held(nn.Module):
    """A chain of two layers in a collection."""

    def __init__(self, collection):
        self.collection = collection

    def vjp(self, x):
        found = self.collection
        return nn.Sequential(*(found.values() if hasattr(found, "values") else found)).vjp(x)


COLLECTIONS = {
    "namedtuple": lambda a, b: Pair(a, b),
    "deque": lambda a, b: deque([a, b]),
    "UserList": lambda a, b: UserList([a, b]),
    "UserDict": lambda a, b: UserDict(a=a, b=b),
    "mapping proxy": lambda a, b: MappingProxyType({"a": a, "b": b}),
    "tuple": lambda a, b: (a, b),
}


@pytest.mark.parametrize("collect", COLLECTIONS.values(), ids=COLLECTIONS)
def test_collections_are_walked_and_their_layers_replaced(collect):
    x = np.ones((3, 2), np.float32)
    expected = nn.Sequential(*layers(2))(x)

    def work(group):
        for wrap in (lambda module, group: module, DDP, FSDP):
            held = Held(collect(*layers(2)))
            kind = type(held.collection)
            model = wrap(held, group)
            assert type(held.collection) is kind
            assert len(list(model.parameters())) == 4
            y, pull = model.vjp(x)
            np.testing.assert_array_equal(y, expected)
            pull(y)

    ferro.simulate(work, 2, timeout_s=20)
    held = Held(collect(*layers(2)))
    snapshot = TreeSnapshot(held)
    nn.replace_modules(held, lambda _, module: nn.Checkpoint(module) if isinstance(module, nn.Linear) else module)
    assert not snapshot.is_current()
    assert not snapshot.changes().removed
    assert [type(item) for _, item in snapshot.changes().added] == [nn.Checkpoint] * 2


@pytest.mark.parametrize("hide", [lambda layer: {layer}, lambda layer: np.array([layer], object)])
def test_parts_without_a_name_are_refused(hide):
    model = nn.Sequential(nn.ReLU(), Held([hide(nn.Linear(2, 2))]))
    with pytest.raises(UsageError, match=r"attribute 'layers\.1\.collection\.0': (a set|an array.*) holds a Linear"):
        list(model.parameters())


def test_a_snapshot_names_what_came_and_went():
    model = nn.Sequential(*layers(2))
    snapshot = TreeSnapshot(model)
    assert snapshot.is_current()
    assert snapshot.changes() == ([], [])
    model.append(model.layers.pop(0))
    assert not snapshot.is_current()
    assert snapshot.changes().describe() == "only the order or the place of some parts changed"
    model.layers[1] = nn.Linear(2, 3)
    model.head = nn.Linear(3, 3, bias=False)
    assert snapshot.changes().describe() == (
        "'layers.1.weight', 'layers.1.bias', 'head.weight' came and 'layers.0.weight', 'layers.0.bias' went"
    )


def test_a_model_can_be_pickled():
    model = nn.Sequential(nn.Linear(2, 3, rng=0), nn.BatchNorm(3), nn.Checkpoint(nn.Dropout(rng=1)), nn.Attention(3, 1))
    y, pull = model[:2].vjp(np.ones((4, 2), np.float32))
    twin = pickle.loads(pickle.dumps(model))
    pull(y)
    for name, array in model.state_dict().items():
        np.testing.assert_array_equal(twin.state_dict()[name], array)


def test_a_model_in_a_strategy_says_how_to_save_it():
    def work(group):
        for wrap, words in [
            (DDP, "group 'world' cannot be pickled, nor"),
            (FSDP, "'weight' is in pieces over the ranks"),
        ]:
            with pytest.raises(UsageError, match=words):
                pickle.dumps(wrap(nn.Linear(2, 2), group))

    ferro.simulate(work, 2, timeout_s=20)
