"""Random models, wrapped by DDP and FSDP at random, trained in random ways, against one process.

FERRO_FUZZ_RUNS sets the number of trainings; each has a seed of its own, which is the test's last number.
"""

import os
from contextlib import ExitStack, nullcontext

import numpy as np
import pytest

import ferro
from ferro_strategies import DDP, FSDP, DeviceMesh, deferred
from ferro_strategies.nn import (
    GELU,
    Attention,
    Checkpoint,
    Embedding,
    LayerNorm,
    Linear,
    Module,
    Residual,
    Sequential,
    Unembedding,
    cross_entropy,
    trees,
)
from ferro_strategies.optim import SGD, AdamW, clip_grad_norm

RUNS = int(os.environ.get("FERRO_FUZZ_RUNS", "16"))
STEPS, ROWS, LENGTH = 3, 3, 4
F = np.float64
OPTIMIZERS = [
    lambda parameters: SGD(parameters, 0.05),
    lambda parameters: SGD(parameters, 0.02, momentum=0.9, nesterov=True, weight_decay=0.1),
    lambda parameters: AdamW(parameters, 0.03),
]


class Pairs(Module):
    """Takes an array and gives the same array, by way of a tree of two halves through another module."""

    def __init__(self, inner):
        self.inner = inner

    def vjp(self, x):
        middle = x.shape[0] // 2
        pulls = []
        parts = {"first": x[:middle], "rest": (x[middle:], None)}

        def run(part):
            y, pull = self.inner.vjp(part)
            pulls.append(pull)
            return y

        y = np.concatenate([each for each in trees.leaves(trees.map_leaves(run, parts)) if each is not None])

        def pullback(grad_y):
            grads = [pull(grad) for pull, grad in zip(pulls, (grad_y[:middle], grad_y[middle:]), strict=True)]
            return np.concatenate(grads)

        return y, pullback


def block(kind, width, number, rng):
    linear = Linear(width, width, bool(rng.integers(2)), dtype=F, rng=number + 1)
    match kind:
        case 0:
            return linear
        case 1:
            return Residual(Sequential(LayerNorm(width, dtype=F), linear, GELU()))
        case 2:
            return Checkpoint(Residual(Sequential(linear, GELU(), Linear(width, width, dtype=F, rng=99))))
        case 3:
            return Sequential(linear, Sequential(LayerNorm(width, dtype=F), Linear(width, width, dtype=F, rng=77)))
        case 4:
            return Residual(Attention(width, 1, dtype=F, rng=number))
        case 5:
            return Pairs(linear)
        case _:
            return Sequential(LayerNorm(width, dtype=F))


def build(seed):
    """Make a model of words: an embedding, some blocks of which some are used twice, and a head that may be tied."""
    rng = np.random.default_rng((1, seed))
    width, words = int(rng.integers(2, 7)), int(rng.integers(3, 9))
    table = Embedding(words, width, dtype=F, rng=0)
    parts, tied = [table], False
    for number in range(int(rng.integers(1, 5))):
        again = len(parts) > 1 and rng.integers(6) == 0
        tied |= bool(again)
        parts.append(parts[-1] if again else block(int(rng.integers(7)), width, number, rng))
    ties_head = bool(rng.integers(2))
    parts.append(Unembedding(table) if ties_head else Linear(width, words, dtype=F, rng=50))
    frozen = [bool(rng.integers(6) == 0) for _ in range(99)]
    net = Sequential(*parts)
    for parameter, freezes in zip([*net.parameters()][1:], frozen, strict=False):
        parameter.requires_grad = not freezes
    return net, words, tied or ties_head


class Plan:
    """What a training does, the same on all ranks and in one process."""

    def __init__(self, seed, ranks):
        rng = np.random.default_rng((2, seed))
        self.seed = seed
        self.quiet = [[bool(rng.integers(2)) for _ in range(rng.integers(1, 4))] for _ in range(STEPS)]
        self.make = OPTIMIZERS[rng.integers(3)]
        self.evaluates, self.reloads, self.in_flight, self.joins, self.by_all = (
            bool(rng.integers(3) == 0) for _ in range(5)
        )
        self.optimizer_first = bool(rng.integers(3) == 0)
        self.counts = [int(rng.integers(0, STEPS + 1)) if self.joins else STEPS for _ in range(ranks)]
        self.counts[rng.integers(ranks)] = STEPS
        self.by_all &= self.joins

    def batch(self, words, rank, step, number):
        rng = np.random.default_rng((3, self.seed, rank, step, number))
        return rng.integers(0, words, (ROWS, LENGTH)), rng.integers(0, words, (ROWS, LENGTH))

    def global_batch(self, words, step, number):
        active = [rank for rank, count in enumerate(self.counts) if step < count]
        batches = [self.batch(words, rank, step, number) for rank in active]
        weight = len(active) / len(self.counts) if self.by_all else 1.0
        return *(np.concatenate(arrays) for arrays in zip(*batches, strict=True)), weight


def make_step(model, plan, step, optimizer, batch):
    pulls = []
    for number, quiet in enumerate(plan.quiet[step]):
        x, target, weight = batch(step, number)
        last = number == len(plan.quiet[step]) - 1
        with ExitStack() as stack:
            for part in model.modules():
                if quiet and not last and isinstance(part, DDP | FSDP):
                    stack.enter_context(part.no_sync())
            y, pull = model.vjp(x)
        grad = cross_entropy(y, target)[1] * weight
        if plan.in_flight:
            pulls.append((pull, grad))
        else:
            pull(grad)
        del pull
        if plan.evaluates:
            model.eval()(x)
            model.train()
    while pulls:
        pull, grad = pulls.pop(0)
        pull(grad)
        del pull
    clips = getattr(model, "clip_grad_norm", None)
    norm = clips(0.5) if clips else clip_grad_norm(model.parameters(), 0.5)
    optimizer.step()
    optimizer.zero_grad()
    return norm


def reload(model, plan, optimizer):
    states = model.state_dict(), model.full_optimizer_state_dict(optimizer)
    model.load_state_dict(states[0])
    optimizer = plan.make(list(model.parameters()))
    model.load_full_optimizer_state_dict(optimizer, states[1])
    return optimizer


def train_alone(plan):
    model, words, _ = build(plan.seed)
    optimizer = plan.make(list(model.parameters()))
    norms = [
        make_step(model, plan, step, optimizer, lambda step, number: plan.global_batch(words, step, number))
        for step in range(STEPS)
    ]
    return model.state_dict(), norms


def wrap(seed, net, group, tied):
    rng = np.random.default_rng((4, seed))
    kind = int(rng.integers(8))
    prefetch = bool(rng.integers(2))
    units = [
        None,
        lambda name, module: isinstance(module, Linear),
        lambda name, module: False,
        lambda name, module: isinstance(module, Sequential | Attention | LayerNorm),
    ][rng.integers(4)]
    sizes = {"bucket_bytes": int(rng.integers(1, 500)), "first_bucket_bytes": int(rng.integers(1, 300))}
    if kind < 2:
        return DDP(net, group, find_unused=bool(rng.integers(2)), **sizes)
    if kind == 2 and group.world_size == 4:
        mesh = DeviceMesh((2, 2), ("replicas", "shards"), group)
        return FSDP(
            net, mesh["shards"], sharding="hybrid_shard", replicas=mesh["replicas"], units=units, prefetch=prefetch
        )
    if kind == 3 and not tied:
        first, rest = Sequential(net.layers[0]), Sequential(*net.layers[1:])
        has_trained = any(parameter.requires_grad for parameter in rest.parameters())
        parts = [DDP(first, group, **sizes), FSDP(rest, group) if not has_trained else DDP(rest, group, **sizes)]
        return Sequential(*(parts if rng.integers(2) else [FSDP(first, group), FSDP(rest, group, prefetch=prefetch)]))
    sharding = ["full_shard", "shard_grad_op", "shard_optimizer", "no_shard"][rng.integers(4)]
    return FSDP(net, group, sharding=sharding, units=units, prefetch=prefetch)


def train_wrapped(plan, group):
    with deferred() if plan.seed % 3 == 0 else nullcontext():
        net, words, tied = build(plan.seed)
    optimizer = plan.make(list(net.parameters())) if plan.optimizer_first else None
    model = wrap(plan.seed, net, group, tied)
    optimizer = optimizer or plan.make(list(model.parameters()))
    joins = plan.joins and isinstance(model, DDP | FSDP)
    norms = []

    def batch(step, number):
        if joins or not plan.joins:
            return *plan.batch(words, group.rank, step, number), 1.0
        # The parts of a model cannot be joined together: all ranks compute on the whole batch.
        return plan.global_batch(words, step, number)

    with model.join(optimizer, divide_by_initial_world_size=plan.by_all) if joins else nullcontext():
        for step in range(plan.counts[group.rank] if joins else STEPS):
            norms.append(make_step(model, plan, step, optimizer, batch))
            if plan.reloads and not plan.joins and step == 1:
                optimizer = reload(model, plan, optimizer)
    state = model.state_dict()
    if not isinstance(model, DDP | FSDP):  # its parts have names of their own
        state = {trained_name(net, name): value for name, value in state.items()}
    return state, norms


def trained_name(net, name):
    """Name a parameter of Sequential(first, rest) as in the one Sequential of all layers."""
    _, part, _, number, rest = name.split(".", 4)
    return f"layers.{int(part) + int(number)}.{rest}"


@pytest.mark.parametrize("seed", range(RUNS))
def test_a_random_training_equals_one_process(seed):
    ranks = (1, 2, 3, 4)[seed % 4]
    plan = Plan(seed, ranks)
    expected, norms = train_alone(plan)
    for state, found in ferro.simulate(lambda group: train_wrapped(plan, group), ranks, timeout_s=20, run_timeout_s=60):
        assert set(state) == set(expected)
        for name, value in expected.items():
            np.testing.assert_allclose(state[name], value, rtol=0, atol=1e-7, err_msg=name)
        np.testing.assert_allclose(found, norms[: len(found)])
