"""Trees of arrays: their functions, and modules that take and return them."""

from collections import OrderedDict, namedtuple

import numpy as np
import pytest

from ferro import UsageError
from ferro_strategies import nn
from ferro_strategies.nn import trees

Pair = namedtuple("Pair", "a b")
A, B = np.ones((2, 3)), np.zeros(4)


@pytest.mark.parametrize(
    "tree", [A, (A, B), [A, (B, None)], {"x": A, "y": [B]}, Pair(A, {"z": B}), OrderedDict(k=A), (), (A,)]
)
def test_a_tree_is_built_again_from_its_leaves(tree):
    whole = trees.structure(tree)
    again = whole.unflatten(trees.leaves(tree))
    assert type(again) is type(tree)
    assert trees.structure(again) == whole
    assert all(x is y for x, y in zip(trees.leaves(again), trees.leaves(tree), strict=True))
    assert trees.leaves(trees.map_leaves(id, tree)) == [None if x is None else id(x) for x in trees.leaves(tree)]


def test_gradients_match_by_key_and_none_stands_for_a_whole_tree():
    def both(x, grad):
        return x.shape, None if grad is None else grad.shape

    assert trees.map_leaves(both, {"x": A, "y": B}, {"y": B, "x": A}) == {"x": ((2, 3),) * 2, "y": ((4,),) * 2}
    assert trees.map_leaves(both, (A, [B, B]), (A, None)) == (((2, 3),) * 2, [((4,), None)] * 2)
    assert not trees.has_gradient((None, [None]))
    for wrong in [(A,), A, {0: A, 1: B}, (A, [B, B])]:
        with pytest.raises(UsageError, match="expected"):
            trees.map_leaves(both, (A, B), wrong)


def test_trees_are_described():
    assert trees.describe(Pair(A, {"m": None})) == "Pair(a=float64 (2, 3), b={'m': None})"
    assert str(trees.shapes_of((A, [B, 3]))) == "((2, 3), [(4,), None])"
    assert str(trees.structure((A, [B]))) == "(array, [array])"


class TwoTowers(nn.Module):
    """Two linear layers, of which each takes its own array."""

    def __init__(self):
        self.layers = [nn.Linear(3, 2, dtype=np.float64, rng=0), nn.Linear(4, 2, dtype=np.float64, rng=1)]

    def vjp(self, x):
        (a, pull_a), (b, pull_b) = (layer.vjp(each) for layer, each in zip(self.layers, x, strict=True))
        return (a, b), lambda grads: (pull_a(grads[0]), pull_b(grads[1]))


class Masked(nn.Module):
    """Multiply by a mask, which is passed on without a gradient."""

    def vjp(self, x):
        values, mask = x["values"], x["mask"]
        return {"values": values * mask, "mask": mask}, lambda grads: {"values": grads["values"] * mask, "mask": None}


class Scaled(nn.Module):
    """Scale each array of a dict but the mask."""

    def __init__(self):
        self.scale = nn.Parameter(np.full(1, 3.0))

    def vjp(self, x):
        scale = self.scale.use()

        def pullback(grads):
            scale.add_grad(np.sum(grads["values"] * x["values"], keepdims=True).reshape(1))
            return {"values": grads["values"] * scale.data, "mask": None}

        return {**x, "values": x["values"] * scale.data}, pullback


class Each(nn.Module):
    """Square one array and pass on the other."""

    def vjp(self, x):
        return (x[0] ** 2, x[1]), lambda grads: (2 * x[0] * grads[0], grads[1])


X = (np.arange(6.0).reshape(2, 3), np.arange(8.0).reshape(2, 4))
MASKED = {"values": np.arange(6.0), "mask": np.arange(6) % 2 == 0}


@pytest.mark.parametrize(
    ("module", "x"),
    [
        (TwoTowers(), X),
        (nn.Sequential(TwoTowers()), X),
        (nn.Checkpoint(TwoTowers()), X),
        (nn.Sequential(Scaled(), nn.Checkpoint(Masked()), Scaled()), MASKED),
        (nn.Residual(Each()), X),
    ],
)
def test_modules_pass_trees_through_with_right_gradients(module, x):
    nn.check_gradients(module, x)


@pytest.mark.parametrize("wrap", [nn.Sequential, nn.Checkpoint])
def test_gradients_of_trees_are_checked_leaf_by_leaf_and_a_right_one_may_follow(wrap):
    module = wrap(TwoTowers())
    (a, b), pull = module.vjp(X)
    for wrong, words in [
        (a, r"a tree of arrays of shapes \(\(2, 2\), \(2, 2\)\).*it got float64 \(2, 2\)"),
        ((a, b.T[:1]), r"for leaf 1, of shape \(2, 2\), it got an array of shape \(1, 2\)"),
        ((a, 0.5), "for leaf 1, of shape .*, it got a float"),
        ((None, None), "it got no gradient at any leaf"),
    ]:
        with pytest.raises(UsageError, match=words):
            pull(wrong)
    assert all(parameter.grad is None and parameter.outstanding_uses for parameter in module.parameters())
    pull([a, b])
    assert all(parameter.grad is not None for parameter in module.parameters())


class WrongPullback(nn.Module):
    def vjp(self, x):
        return x, lambda grad: grad[:1]


def test_a_part_whose_pullback_returns_another_shape_is_named():
    for module, words in [
        (nn.Sequential(nn.Linear(3, 3), WrongPullback()), r"WrongPullback: its pullback must return .* shape \(2, 3\)"),
        (nn.Residual(WrongPullback()), "WrongPullback: its pullback must return"),
    ]:
        y, pull = module.vjp(np.ones((2, 3), np.float32))
        with pytest.raises(UsageError, match=words + r".*it returned an array of shape \(1, 3\)"):
            pull(y)
