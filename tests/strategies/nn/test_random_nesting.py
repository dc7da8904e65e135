"""Random trees of modules with strategies at random places, against the same tree without strategies."""

import os
import pickle
from collections import deque

import numpy as np
import pytest

import ferro
from ferro_strategies import DDP, FSDP, deferred, nn, optim

RUNS = int(os.environ.get("FERRO_FUZZ_RUNS", "6"))
SIZE = 3


class Collected(nn.Module):
    """A chain of the modules of a collection, and a scale of its own."""

    def __init__(self, collection):
        self.collection = collection
        self.scale = nn.Parameter(np.full(SIZE, 1.5))
        self.seen = nn.Buffer(np.zeros(1))

    def vjp(self, x):
        parts = self.collection.values() if isinstance(self.collection, dict) else self.collection
        y, pull = nn.Sequential(*parts).vjp(x)
        scale = self.scale.use()
        self.seen.data += self.training

        def pullback(grad):
            scale.add_grad((grad * y).sum(axis=0))
            return pull(grad * scale.data)

        return y * scale.data, pullback


def tree(random, depth, wrap, rng):
    """Build a random tree; `wrap` puts strategies around parts of it."""
    if depth == 0 or random.random() < 0.2:
        leaf = [
            lambda: nn.Linear(SIZE, SIZE, dtype=np.float64, rng=rng),
            lambda: nn.LayerNorm(SIZE, dtype=np.float64),
            lambda: nn.Dropout(0.5, rng=int(random.integers(9))),
        ][random.integers(3)]()
        return wrap(leaf, random.random()) if isinstance(leaf, nn.Linear) else leaf
    children = [tree(random, depth - 1, wrap, rng) for _ in range(random.integers(1, 4))]
    kind = random.integers(6)
    if kind == 0:
        children.append(children[0])  # shared
    module = [
        lambda: nn.Sequential(*children),
        lambda: nn.Residual(nn.Sequential(*children)),
        lambda: nn.Checkpoint(nn.Sequential(*children)),
        lambda: Collected(tuple(children)),
        lambda: Collected(deque(children)),
        lambda: Collected({f"k{index}": child for index, child in enumerate(children)}),
    ][kind]()
    return wrap(module, random.random())


def strategies(group):
    """Return a function that wraps parts in DDP or FSDP, unless a part of them is wrapped or has nothing to train."""

    def wrap(module, drawn):
        inside = any(isinstance(part, DDP | FSDP) for part in module.modules())
        if group is None or inside or next(module.parameters(), None) is None or drawn < 0.4:
            return module
        return DDP(module, group, broadcast_buffers=False) if drawn < 0.6 else FSDP(module, group)

    return wrap


def build(seed, group, *, late=False):
    random, rng = np.random.default_rng(seed), np.random.default_rng(seed + 1)
    if not late:
        return nn.Sequential(nn.Linear(SIZE, SIZE, dtype=np.float64, rng=rng), tree(random, 3, strategies(group), rng))
    with deferred():
        model = nn.Sequential(nn.Linear(SIZE, SIZE, dtype=np.float64, rng=rng), tree(random, 3, strategies(group), rng))
    return model.materialize()


def train(model, optimizer, x, steps):
    """Train on rows that all ranks have, so that parts outside strategies get the same gradients on all of them."""
    for _ in range(steps):
        y, pullback = model.vjp(x)
        pullback(np.ones_like(y))
        optimizer.step()
        model.zero_grad()


def numbers(model, optimizer):
    return model.state_dict(), model.full_optimizer_state_dict(optimizer), model.generator_state_dict()


def same(found, wanted, exact):
    assert found[0].keys() == wanted[0].keys()
    assert found[1].keys() == wanted[1].keys()
    assert found[2] == wanted[2]
    for part in (0, 1):
        for name, array in wanted[part].items():
            np.testing.assert_allclose(found[part][name], array, rtol=0 if exact else 1e-9, atol=0 if exact else 1e-9)


@pytest.mark.parametrize("seed", range(RUNS))
def test_a_random_tree_with_strategies_saves_loads_and_trains_as_without(seed):
    x = np.random.default_rng(seed).standard_normal((4, SIZE))
    make = [lambda m: optim.SGD(m.parameters(), 0.01, momentum=0.9), lambda m: optim.AdamW(m.parameters(), 0.01)][
        seed % 2
    ]
    plain = build(seed, None)
    if next(plain[1].parameters(), None) is None:
        return
    alone, generators = make(plain), plain.generator_state_dict()
    train(plain, alone, x, 2)
    wanted = numbers(plain, alone)
    copied = pickle.loads(pickle.dumps(plain)).state_dict()
    assert all((copied[name] == array).all() for name, array in wanted[0].items())

    def work(group):
        model = build(seed, group, late=True)
        model.load_generator_state_dict(generators)  # DDP and FSDP let generators part by rank
        optimizer = make(model)
        train(model, optimizer, x, 2)
        same(numbers(model, optimizer), wanted, exact=False)
        again = build(seed, group).eval()
        assert not any(part.training for part in again.modules())
        another = make(again.train())
        again.load_state_dict(wanted[0])
        again.load_full_optimizer_state_dict(another, wanted[1])
        again.load_generator_state_dict(wanted[2])
        same(numbers(again, another), wanted, exact=True)
        train(again, another, x, 1)
        return numbers(again, another)

    found = ferro.simulate(work, 2, timeout_s=20)
    train(plain, alone, x, 1)
    for each in found:
        same(each, numbers(plain, alone), exact=False)
