"""Random trainings by data, tensor and pipeline parallelism together, against one process.

FERRO_FUZZ_RUNS sets the number of trainings; FERRO_FUZZ_FIRST the first seed.
"""

import os
from dataclasses import dataclass
from functools import partial

import numpy as np
import pytest

import ferro
from ferro_strategies import DDP, FSDP, DeviceMesh, Pipeline, nn, optim
from ferro_strategies import tensor_parallel as tp

F = np.float64
STEPS = 2
RUNS, FIRST = int(os.environ.get("FERRO_FUZZ_RUNS", "16")), int(os.environ.get("FERRO_FUZZ_FIRST", "0"))
MESHES = [(1, 2, 2), (2, 2, 1), (2, 1, 2), (2, 2, 2), (1, 3, 1), (1, 3, 2), (3, 1, 2), (1, 1, 3), (2, 3, 1), (2, 1, 1)]


@dataclass(frozen=True)
class Case:
    """One training: sizes of the axes, the model, the batch, and the strategies' options."""

    seed: int
    dp: int
    tp: int
    pp: int
    per_rank: int
    schedule: str
    microbatches: int
    wrap: str
    heads: int
    words: int
    hidden: int
    blocks: int
    length: int
    rows: int
    sequence_parallel: bool
    tied: bool
    checkpoint: bool
    masked: bool
    trees: bool
    gap: bool

    @property
    def stages(self):
        return self.pp * self.per_rank


def make_case(seed):
    """Draw a case; None where there would be more stages than layers."""
    rng = np.random.default_rng((1, seed))
    dp, tp_size, pp = MESHES[rng.integers(len(MESHES))]
    per_rank = 2 if rng.integers(3) == 0 and pp > 1 else 1
    coin = lambda: bool(rng.integers(2))  # noqa: E731
    case = Case(
        seed=seed,
        dp=dp,
        tp=tp_size,
        pp=pp,
        per_rank=per_rank,
        schedule="interleaved_1f1b" if per_rank == 2 else str(rng.choice(["1f1b", "gpipe", "zb_h1"])),
        microbatches=int(rng.integers(1, 5)),
        wrap=str(rng.choice(["ddp", "full_shard", "shard_grad_op", "shard_optimizer", "no_shard"])),
        heads=int(rng.integers(tp_size, 5)),
        words=int(rng.integers(tp_size, 9)),
        hidden=int(rng.integers(tp_size, 9)),
        blocks=int(rng.integers(1, 4)),
        length=int(rng.integers(1, 6)),
        rows=int(rng.integers(1, 4)) * dp,
        sequence_parallel=coin(),
        tied=coin(),
        checkpoint=rng.integers(3) == 0,
        masked=coin(),
        trees=coin() and dp == 1,
        gap=coin(),
    )
    return case if case.stages <= case.blocks + 3 else None


class Beside(nn.Module):
    """Runs a module on the first of two arrays, and hands on the second, a mask."""

    transparent = True

    def __init__(self, module):
        self.module = module

    def vjp(self, x):
        y, pull = self.module.vjp(x[0])
        return (y, x[1]), lambda grad: (pull(grad[0]), None)


def make_layers(case):
    width = 2 * case.heads
    layers = [nn.Embedding(case.words, width, dtype=F, rng=0)]
    for block in range(case.blocks):
        attention = nn.Sequential(
            nn.LayerNorm(width, dtype=F), nn.Attention(width, case.heads, dtype=F, rng=10 + block)
        )
        perceptron = nn.Sequential(
            nn.LayerNorm(width, dtype=F),
            nn.Linear(width, case.hidden, dtype=F, rng=20 + block),
            nn.GELU(),
            nn.Linear(case.hidden, width, dtype=F, rng=30 + block),
        )
        body = nn.Sequential(nn.Residual(attention), nn.Residual(perceptron))
        layers.append(nn.Checkpoint(body) if case.checkpoint else body)
    layers.append(nn.LayerNorm(width, dtype=F))
    layers.append(nn.Unembedding(layers[0]) if case.tied else nn.Linear(width, case.words, dtype=F, rng=5))
    if case.gap:
        layers.insert(2, nn.GELU())  # it may be a stage by itself, without parameters
    return [Beside(layer) for layer in layers] if case.trees else layers


def make_batch(case, step):
    rng = np.random.default_rng((3, case.seed, step))
    inputs, labels = rng.integers(0, case.words, (2, case.rows, case.length))
    if case.masked:
        labels[rng.random(labels.shape) < rng.random((case.rows, 1))] = -100
    return ((inputs, labels >= 0) if case.trees else inputs), labels


def make_loss(case, cross_entropy):
    """The mean over labels that are not masked, which returns a weight only where some are."""

    def loss(y, labels):
        if case.trees:
            y, mask = y
            np.testing.assert_array_equal(mask, labels >= 0)
        keep = labels >= 0
        value, grad = np.nan, np.zeros_like(y)
        if keep.any():
            value, grad[keep] = cross_entropy(y[keep], labels[keep])
        grads = (grad, None) if case.trees else grad
        return (value, grads, keep.sum()) if case.masked else (value, grads)

    return loss


def alone(case):
    """The losses and norms of each step in one process."""
    net, loss = nn.Sequential(*make_layers(case)), make_loss(case, nn.cross_entropy)
    optimizer, told = optim.AdamW(net.parameters(), 0.01), []
    for step in range(STEPS):
        x, labels = make_batch(case, step)
        y, pullback = net.vjp(x)
        value, grad, *weight = loss(y, labels)
        pullback(grad)
        told.append((value if not weight or weight[0] else 0.0, optim.clip_grad_norm(net.parameters(), 0.5)))
        optimizer.step()
        optimizer.zero_grad()
    return told


def parallel_layers(case, group):
    """The layers, cut by tensor parallelism."""
    net, options = nn.Sequential(*make_layers(case)), {"sequence_parallel": case.sequence_parallel}
    plan = {}
    for number, layer in enumerate(net.layers):
        kind = type(layer.module if case.trees else layer)
        name = f"layers.{number}"
        if kind is nn.Embedding:
            plan[name] = partial(tp.ParallelEmbedding.from_serial, **options)
        elif kind in (nn.Sequential, nn.Checkpoint):
            plan[f"{name}.layers.0.module.layers.1"] = partial(tp.ParallelAttention.from_serial, **options)
            plan[f"{name}.layers.1.module.layers.1"] = partial(tp.ColumnParallelLinear.from_serial, **options)
            plan[f"{name}.layers.1.module.layers.3"] = partial(tp.RowParallelLinear.from_serial, **options)
            norms = [f"{name}.layers.{half}.module.layers.0" for half in (0, 1)]
            plan |= dict.fromkeys(norms, tp.SequenceParallelLayerNorm.from_serial) if case.sequence_parallel else {}
        elif kind is nn.LayerNorm and case.sequence_parallel:
            plan[name] = tp.SequenceParallelLayerNorm.from_serial
        elif kind in (nn.Unembedding, nn.Linear):
            parallel = tp.ParallelUnembedding if kind is nn.Unembedding else tp.ColumnParallelLinear
            plan[name] = partial(parallel.from_serial, **options)
    return tp.parallelize(net, group, plan).layers


def wrapped(case, stage, group):
    if case.trees or next(stage.parameters(), None) is None:
        return stage
    if case.wrap == "ddp":
        return DDP(stage, group)
    units = (tp.ParallelEmbedding, tp.ParallelUnembedding, tp.ParallelAttention)
    return FSDP(stage, group, sharding=case.wrap, units=lambda _, module: isinstance(module, units))


def make_pipeline(case, mesh):
    layers = parallel_layers(case, mesh["tp"])
    rng = np.random.default_rng((4, case.seed))
    cuts = sorted(rng.choice(np.arange(1, len(layers)), case.stages - 1, replace=False).tolist())
    ranges = list(zip([0, *cuts], [*cuts, len(layers)], strict=True))
    ties = []
    if case.tied and case.stages > 1:  # each stage gets a copy of its own
        last = layers[-1].module if case.trees else layers[-1]
        weight = nn.Parameter(last.weight.data.copy())
        weight.splits, last.weight = last.weight.splits, weight
        ties = [{0: "layers.0.weight", case.stages - 1: f"layers.{len(layers) - 1 - ranges[-1][0]}.weight"}]
    stages = [
        wrapped(case, nn.Sequential(*layers[start:end]), mesh["dp"])
        for start, end in ranges[mesh["pp"].rank :: case.pp]
    ]
    return Pipeline(stages, mesh["pp"], schedule=case.schedule, microbatches=case.microbatches, ties=ties)


def train(world, case):
    """The losses and norms of each step on one of many ranks."""
    mesh = DeviceMesh((case.dp, case.pp, case.tp), ("dp", "pp", "tp"), world)
    pipeline, told = make_pipeline(case, mesh), []
    loss = make_loss(case, lambda y, labels: tp.vocab_parallel_cross_entropy(y, labels, mesh["tp"]))
    optimizer = optim.AdamW(pipeline.parameters(), 0.01)
    part = slice(mesh["dp"].rank, None, case.dp)
    for step in range(STEPS):
        x, labels = make_batch(case, step)
        x = tuple(array[part] for array in x) if case.trees else x[part]
        value = float(mesh["dp"].all_reduce(pipeline.step(x, labels[part], loss), "mean"))
        norm = pipeline.clip_grad_norm(0.5) if step else optim.clip_grad_norm(pipeline.parameters(), 0.5)
        told.append((value, norm))
        optimizer.step()
        pipeline.zero_grad()
    return told


@pytest.mark.parametrize("seed", range(FIRST, FIRST + RUNS))
def test_random_trainings_are_those_of_one_process(seed):
    case = make_case(seed)
    if case is None:
        return
    expected = alone(case)
    results = ferro.simulate(lambda world: train(world, case), case.dp * case.pp * case.tp, timeout_s=20)
    for told in results:
        np.testing.assert_allclose(told, expected, rtol=1e-8, atol=1e-10, err_msg=str(case))
