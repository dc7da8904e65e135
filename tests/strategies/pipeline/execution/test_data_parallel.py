"""Pipelines with replicas of their stages, and the length of all gradients together."""

import math

import numpy as np
import pytest

import ferro
from ferro_strategies import DDP
from ferro_strategies.fsdp import FSDP, ShardingStrategy
from ferro_strategies.nn import Linear, Module, Parameter, Sequential, Split, cross_entropy
from ferro_strategies.optim import SGD, clip_grad_norm
from ferro_strategies.pipeline import Pipeline

from .pipeline_models import (
    WORDS,
    alone,
    assert_equal,
    batch,
    gradients,
    make_stages,
    make_tied_stages,
    share,
    simulate,
)


@pytest.mark.parametrize("schedule", ["1f1b", "zb_h1"])
@pytest.mark.parametrize("per_rank", [1, 2])
def test_two_pipelines_of_two_ranks_are_one_process(schedule, per_rank):
    inputs, targets = batch(rows=12)
    started = []

    class Count:
        def started(self, event):
            if event.group.startswith("world.") and event.op == "all_reduce":
                started.append((event.global_rank, event.nbytes))

        def finished(self, event):
            pass

    def run(world):
        pipe = world.split(world.rank // 2)  # ranks 0 1 | 2 3
        replicas = world.split(world.rank % 2)
        stages = [DDP(stage, replicas) for stage in share(make_stages(2 * per_rank), pipe)]
        pipeline = Pipeline(stages, pipe, schedule=schedule, microbatches=3)
        part = slice(world.rank // 2, None, 2)
        started.clear()
        world.barrier()
        loss = pipeline.step(inputs[part], targets[part], cross_entropy)
        return loss, gradients(pipeline)

    results = ferro.simulate(run, 4, timeout_s=10, run_timeout_s=30, observers=[Count()])
    value, grads = alone(make_stages(2 * per_rank), inputs, targets)
    losses = [loss for loss, _ in results]
    assert losses[0] == losses[1]
    assert losses[2] == losses[3]
    np.testing.assert_allclose((losses[0] + losses[2]) / 2, value, rtol=1e-12)
    assert_equal([(value, own) for _, own in results], (value, grads))
    for name, grad in results[0][1].items():
        np.testing.assert_array_equal(grad, results[2][1][name])
    large = [event for event in started if event[1] > 64]
    assert len(large) == 4 * per_rank, "one reduction for each stage, not for each microbatch"


@pytest.mark.parametrize("schedule", ["1f1b", "zb_h1"])
@pytest.mark.parametrize("wrap", [DDP, FSDP])
def test_a_part_of_a_stage_may_have_replicas(schedule, wrap):
    inputs, targets = batch(rows=12)
    value, expected = alone(make_stages(2), inputs, targets)

    def run(world):
        pipe = world.split(world.rank // 2)
        replicas = world.split(world.rank % 2)
        stage = make_stages(2)[pipe.rank]
        if pipe.rank == 0:  # which has several microbatches in flight
            embedding, linear, relu = stage.layers
            stage = Sequential(embedding, wrap(Sequential(linear, relu), replicas))
            embedding.weight.requires_grad = False
        pipeline = Pipeline([stage], pipe, schedule=schedule, microbatches=3)
        part = slice(world.rank // 2, None, 2)
        loss = pipeline.step(inputs[part], targets[part], cross_entropy)
        assert len([*pipeline.named_parameters()]) == [3, 6][pipe.rank]  # each once
        trained = [item for item in stage.parameters() if item.requires_grad]
        return loss, sum(float((item.grad**2).sum()) for item in trained)

    results = simulate(run, 4)
    assert (results[0][0] + results[2][0]) / 2 == pytest.approx(value, rel=1e-12)
    squares = sum(float((expected[f"0.layers.1.{name}"] ** 2).sum()) for name in ("weight", "bias"))
    found = results[0][1] if wrap is DDP else results[0][1] + results[2][1]
    assert found == pytest.approx(squares, rel=1e-11)


@pytest.mark.parametrize("schedule", ["1f1b", "zb_h1"])
@pytest.mark.parametrize("sharding", list(ShardingStrategy)[:4])
def test_stages_may_be_sharded(schedule, sharding):
    batches = [batch(rows=8, seed=seed) for seed in range(2)]
    model = Sequential(*make_stages(4))
    optimizer = SGD(model.parameters(), lr=0.1)
    expected = []
    for x, labels in batches:
        y, pullback = model.vjp(x)
        loss, grad = cross_entropy(y, labels)
        pullback(grad)
        norm = clip_grad_norm(model.parameters(), 0.5)
        expected.append((loss, norm))
        optimizer.step()
        optimizer.zero_grad()
    whole = {name.removeprefix("layers."): value for name, value in model.state_dict().items()}

    def run(world):
        pipe = world.split(world.rank // 2)
        replicas = world.split(world.rank % 2)
        stages = [FSDP(s, replicas, sharding=sharding) for s in share(make_stages(4), pipe)]
        pipeline = Pipeline(stages, pipe, schedule=schedule, microbatches=2)
        optimizer = SGD(pipeline.parameters(), lr=0.1)
        told = []
        for x, labels in batches:
            part = slice(world.rank // 2, None, 2)
            loss = pipeline.step(x[part], labels[part], cross_entropy)
            told.append((loss, pipeline.clip_grad_norm(0.5)))
            optimizer.step()
            pipeline.zero_grad()
        return told, pipeline.state_dict()

    results = simulate(run, 4)
    for step, (loss, norm) in enumerate(expected):
        np.testing.assert_allclose((results[0][0][step][0] + results[2][0][step][0]) / 2, loss, rtol=1e-11)
        for told, _ in results:
            np.testing.assert_allclose(told[step][1], norm, rtol=1e-11)
    for _, state in results:
        for name, value in state.items():
            np.testing.assert_allclose(value, whole[name], rtol=1e-9, atol=1e-12, err_msg=name)


@pytest.mark.parametrize("wrap", [DDP, FSDP])
def test_tied_stages_may_have_replicas(wrap):
    rng = np.random.default_rng(1)
    x, labels = rng.integers(0, WORDS, (2, 7, 4))
    model = Sequential(*make_tied_stages(4, tied=True))
    y, pullback = model.vjp(x[:6])
    pullback(cross_entropy(y, labels[:6])[1])
    optimizer = SGD(model.parameters(), lr=0.1)
    norm = clip_grad_norm(model.parameters(), 0.1)
    optimizer.step()

    def run(world):
        pipe = world.split(world.rank // 2)
        replicas = world.split(world.rank % 2)
        stages = [wrap(s, replicas) for s in share(make_tied_stages(4, tied=False), pipe)]
        ties = [{0: "weight", 3: "layers.0.weight"}]
        pipeline = Pipeline(stages, pipe, microbatches=3, ties=ties)
        optimizer = SGD(pipeline.parameters(), lr=0.1)
        part = slice(world.rank // 2, 6, 2)
        pipeline.step(x[part], labels[part], cross_entropy)
        told = pipeline.clip_grad_norm(0.1)
        optimizer.step()
        return told, pipeline.state_dict()

    whole = {}
    for told, state in simulate(run, 4):
        assert told == pytest.approx(norm, rel=1e-12)
        whole |= state
    table = model.layers[0].weight.data
    np.testing.assert_allclose(whole["0.weight"], table, rtol=1e-11)
    np.testing.assert_array_equal(whole["3.layers.0.weight"], whole["0.weight"])


def test_a_reduction_that_fails_is_told_to_the_other_stages():
    class Lazy(Module):
        """Leaves a parameter out on one of the replicas."""

        def __init__(self, used):
            self.first = Linear(2, 2, dtype=np.float64, rng=0)
            self.other = Linear(2, 2, dtype=np.float64, rng=1)
            self._used = used

        def vjp(self, x):
            return (Sequential(self.first, self.other) if self._used else self.first).vjp(x)

    def run(world):
        pipe = world.split(world.rank // 2)
        replicas = world.split(world.rank % 2)
        stage = Lazy(world.rank != 3) if world.rank % 2 else Linear(2, 2, dtype=np.float64)
        pipeline = Pipeline([DDP(stage, replicas)], pipe, microbatches=2)
        x = np.ones((4, 2))
        with pytest.raises(ferro.FerroError) as caught:
            pipeline.step(x, np.zeros((4, 2), int)[:, 0], cross_entropy)
        with pytest.raises(ferro.UsageError, match=r"an earlier Pipeline\.step failed"):
            pipeline.forward(x)
        return str(caught.value)

    for rank, message in enumerate(simulate(run, 4)):
        assert "parameters have no gradient" in message
        assert ("failed on rank 1, in the reduction of gradients" in message) == (rank % 2 == 0)


@pytest.mark.parametrize("max_norm", [0.01, 100.0])
@pytest.mark.parametrize(("ranks", "per_rank"), [(1, 3), (2, 2), (3, 1)])
def test_gradients_are_clipped_together(max_norm, ranks, per_rank):
    inputs, targets = batch(rows=6)
    stages = make_stages(ranks * per_rank)
    alone(stages, inputs, targets)
    expected = clip_grad_norm(Sequential(*stages).parameters(), max_norm)
    clipped = {f"{n}.{name}": grad for n, stage in enumerate(stages) for name, grad in gradients(stage).items()}

    def run(group):
        pipeline = Pipeline(share(make_stages(ranks * per_rank), group), group, microbatches=2)
        pipeline.step(inputs, targets, cross_entropy)
        return pipeline.clip_grad_norm(max_norm), gradients(pipeline)

    assert_equal(simulate(run, ranks), (expected, clipped), rtol=1e-11)


class Bare(Module):
    """A parameter whose gradient becomes what it is told."""

    def __init__(self, grad):
        self.weight = Parameter(np.zeros(len(grad)))
        self._grad = np.array(grad, float)

    def vjp(self, x):
        use = self.weight.use()

        def pullback(grad):
            use.add_grad(self._grad)
            return grad

        return x, pullback


def ones(y, _):
    return 0.0, np.ones_like(y)


@pytest.mark.parametrize("ranks", [1, 2, 3])
def test_tied_copies_count_once_and_are_scaled_alike(ranks):
    def run(group):
        grads = [[1.0, 0.0], [12.0, 0.0], [2.0, 4.0], *[[0.0]] * 3]
        stages = share([Bare(grad) for grad in grads], group)
        ties = [{0: "weight", 2: "weight"}]
        pipeline = Pipeline(stages, group, microbatches=1, ties=ties)
        pipeline.step(np.ones((1, 1)), np.ones((1, 1)), ones)
        return pipeline.clip_grad_norm(6.5), gradients(pipeline)

    grads = {}
    for norm, own in simulate(run, ranks):
        assert norm == pytest.approx(13.0)  # of (3, 4) and (12, 0)
        grads |= own
    for stage, expected in enumerate([[1.5, 2.0], [6.0, 0.0], [1.5, 2.0]]):
        np.testing.assert_allclose(grads[f"{stage}.weight"], expected)


def test_pieces_on_other_ranks_count():
    """Two pipelines of two stages, whose second stage is split over both."""

    def run(world):
        pipe = world.split(world.rank // 2)
        across = world.split(world.rank % 2)
        stage = Bare([3.0]) if world.rank % 2 == 0 else Bare([4.0, 0.0][world.rank // 2 :][:1] * 2)
        if world.rank % 2:
            stage.weight.splits = (Split(group=across, dim=0),)
        pipeline = Pipeline([stage], pipe, microbatches=1)
        pipeline.step(np.ones((1, 1)), np.ones((1, 1)), ones)
        return pipeline.clip_grad_norm(1e9)

    for norm in simulate(run, 4):
        assert norm == pytest.approx(math.sqrt(9 + 16 + 16))


def test_a_norm_must_be_positive():
    def run(group):
        pipeline = Pipeline([Bare([1.0])], group, microbatches=1)
        optimizer = SGD(pipeline.parameters(), lr=0.1)
        optimizer.zero_grad()
        with pytest.raises(ferro.UsageError, match="max_norm must be above 0"):
            pipeline.clip_grad_norm(0.0)
        assert pipeline.clip_grad_norm(1.0) == 0.0

    simulate(run, 2)
