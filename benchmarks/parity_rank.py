"""One rank of the parity table: small models, trained under every strategy.

`parity.py` starts it. Each way to train returns the last step's loss over the whole batch, and
this rank's parameters (and running statistics), whole and by their names in the model that one
process trains.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial

import ml_dtypes
import numpy as np
from parity_models import (
    IMAGES,
    LR,
    MAX_NORM,
    MOMENTUM,
    PERCEPTRON,
    STEPS,
    TRANSFORMER,
    Found,
    Loss,
    Model,
    State,
    alone,
    floating,
    train,
)
from parity_products import dtensor, products_alone

import ferro
from ferro_strategies import (
    DDP,
    FSDP,
    DeviceMesh,
    MixedPrecision,
    Pipeline,
    ShardingStrategy,
    convert_sync_batchnorm,
    nn,
)
from ferro_strategies import tensor_parallel as tp
from ferro_strategies.optim import SGD

TOGETHER_RANKS = 8
_MICROBATCHES = 5


def ddp(group: ferro.ProcessGroup, dtype: str) -> Found:
    """Train replicas."""
    module = DDP(PERCEPTRON.build(dtype), group)
    return train(module, PERCEPTRON, dtype, group), module.state_dict()


def fsdp(sharding: str, group: ferro.ProcessGroup, dtype: str) -> Found:
    """Train shards; bfloat16 is that of the computation, of float32 master shards."""
    options: dict[str, object] = {}
    master, shards = dtype, group
    if sharding == ShardingStrategy.HYBRID_SHARD:
        replicas = 2 if group.world_size % 2 == 0 else 1
        mesh = DeviceMesh((replicas, group.world_size // replicas), ("replicas", "shards"), group)
        options, shards = {"replicas": mesh["replicas"]}, mesh["shards"]
    if dtype == "bfloat16":
        master = "float32"
        options["mixed_precision"] = MixedPrecision(
            param_dtype=ml_dtypes.bfloat16, reduce_dtype=np.float32, output_dtype=np.float32
        )
    built = PERCEPTRON.build(master)
    module = FSDP(built, shards, sharding=ShardingStrategy(sharding), **options)
    return train(module, PERCEPTRON, master, group), module.full_state_dict()


def sync_batchnorm(group: ferro.ProcessGroup, dtype: str) -> Found:
    """Train replicas whose BatchNorm layers see the whole batch."""
    converted = convert_sync_batchnorm(IMAGES.build(dtype), group)
    module = DDP(converted, group, broadcast_buffers=False)
    return train(module, IMAGES, dtype, group), floating(module.state_dict())


def tensor_parallel(sequence_parallel: bool, group: ferro.ProcessGroup, dtype: str) -> Found:
    """Train pieces of matrices, and of sequences."""
    module = _pieces(TRANSFORMER.build(dtype), group, sequence_parallel)
    loss_of = partial(tp.vocab_parallel_cross_entropy, group=group)
    loss = train(module, TRANSFORMER, dtype, loss_of=loss_of)
    return loss, tp.full_state_dict(module)


def _pieces(module: nn.Module, group: ferro.ProcessGroup, sequence_parallel: bool) -> nn.Module:
    kinds = {
        "layers.0": tp.ParallelEmbedding,
        "layers.[13].module.layers.1": tp.ParallelAttention,
        "layers.[24].module.layers.1": tp.ColumnParallelLinear,
        "layers.[24].module.layers.3": tp.RowParallelLinear,
        "layers.5.layers.1": tp.ColumnParallelLinear,
    }
    plan = {
        name: partial(kind.from_serial, sequence_parallel=sequence_parallel)
        for name, kind in kinds.items()
    }
    if sequence_parallel:
        norm = tp.SequenceParallelLayerNorm.from_serial
        plan |= {"layers.[1234].module.layers.0": norm, "layers.5.layers.0": norm}
    return tp.parallelize(module, group, plan)


def pipeline(schedule: str, group: ferro.ProcessGroup, dtype: str) -> Found:
    """Train stages, two on each rank where the schedule is for several."""
    ranks = group.world_size
    stages = 2 * ranks if schedule == "interleaved_1f1b" else ranks
    parts = PERCEPTRON.parts(dtype)
    cuts = np.array_split(np.arange(len(parts)), stages)[group.rank :: ranks]
    mine = [nn.Sequential(*(parts[index] for index in cut)) for cut in cuts]
    piped = Pipeline(mine, group, schedule=schedule, microbatches=_MICROBATCHES)
    loss = _train_pipeline(piped, PERCEPTRON, dtype, nn.cross_entropy)
    state: State = {}
    for stage, cut in zip(mine, cuts, strict=True):
        state |= _renumbered(stage.state_dict(), int(cut[0]))
    return loss, state


def together(sharded: bool, group: ferro.ProcessGroup, dtype: str) -> Found:
    """Train on a mesh of 2 x 2 x 2: stages, of pieces, of which there are replicas or shards."""
    mesh = DeviceMesh((2, 2, 2), ("dp", "pp", "tp"), group)
    module = _pieces(TRANSFORMER.build(dtype), mesh["tp"], sequence_parallel=sharded)
    assert isinstance(module, nn.Sequential), "replaced inside"
    cut = np.array_split(np.arange(len(module.layers)), 2)[mesh["pp"].rank]
    part = nn.Sequential(*(module.layers[index] for index in cut))
    stage = FSDP(part, mesh["dp"]) if sharded else DDP(part, mesh["dp"])
    piped = Pipeline([stage], mesh["pp"], microbatches=4)
    loss_of = partial(tp.vocab_parallel_cross_entropy, group=mesh["tp"])
    loss = _train_pipeline(piped, TRANSFORMER, dtype, loss_of, mesh["dp"])
    whole = tp.full_state_dict(stage, stage.state_dict())
    return loss, _renumbered(whole, int(cut[0]))


def _train_pipeline(
    piped: Pipeline,
    model: Model,
    dtype: str,
    loss_of: Loss,
    replicas: ferro.ProcessGroup | None = None,
) -> float:
    rank, ranks = (replicas.rank, replicas.world_size) if replicas else (0, 1)
    optimizer = SGD(piped.parameters(), lr=LR, momentum=MOMENTUM)
    loss = 0.0
    for step in range(STEPS):
        x, labels = model.batch(step, dtype)
        loss = piped.step(x[rank::ranks], labels[rank::ranks], loss_of)
        piped.clip_grad_norm(MAX_NORM)
        optimizer.step()
        optimizer.zero_grad()
    return loss if replicas is None else float(replicas.all_reduce(loss, "mean"))


def _renumbered(state: State, first: int) -> State:
    """Name a stage's arrays as in the whole model, of which its layers are those from `first`."""
    found = {}
    for name, array in state.items():
        layers, number, rest = name.split(".", 2)
        found[f"{layers}.{int(number) + first}.{rest}"] = array
    return found


# -- what is compared ------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True, kw_only=True)
class Strategy:
    """A way to train, and what it must equal.

    Attributes:
        run: trains on this rank, in a dtype.
        alone: the same in one process.
        dtypes: in which it is compared.
    """

    run: Callable[[ferro.ProcessGroup, str], Found]
    alone: Callable[[str], Found]
    dtypes: tuple[str, ...] = ("float32", "float64")


_PERCEPTRON, _TRANSFORMER = partial(alone, PERCEPTRON), partial(alone, TRANSFORMER)


def _fsdp_alone(sharding: str, dtype: str) -> Found:
    """Train in one process, in bfloat16 as FSDP computes in it."""
    if dtype != "bfloat16":
        return alone(PERCEPTRON, dtype)
    [found] = ferro.simulate(lambda group: fsdp(sharding, group, dtype), 1)
    return found


STRATEGIES: dict[str, Strategy] = {
    "ddp": Strategy(run=ddp, alone=_PERCEPTRON),
    **{
        f"fsdp {sharding}": Strategy(
            run=partial(fsdp, sharding),
            alone=partial(_fsdp_alone, sharding),
            dtypes=("bfloat16", "float32", "float64"),
        )
        for sharding in ShardingStrategy
    },
    **{
        f"pipeline {name}": Strategy(run=partial(pipeline, name), alone=_PERCEPTRON)
        for name in ("gpipe", "1f1b", "interleaved_1f1b", "zb_h1")
    },
    "tensor_parallel": Strategy(run=partial(tensor_parallel, False), alone=_TRANSFORMER),
    "sequence_parallel": Strategy(run=partial(tensor_parallel, True), alone=_TRANSFORMER),
    "sync_batchnorm": Strategy(run=sync_batchnorm, alone=partial(alone, IMAGES)),
    "dtensor": Strategy(run=dtensor, alone=products_alone),
}
TOGETHER: dict[str, Strategy] = {
    "ddp x tp x pp": Strategy(run=partial(together, False), alone=_TRANSFORMER),
    "fsdp x sp x pp": Strategy(run=partial(together, True), alone=_TRANSFORMER),
}


def strategies(ranks: int) -> dict[str, Strategy]:
    """Return the ways to train on so many ranks, by name."""
    return TOGETHER if ranks == TOGETHER_RANKS else STRATEGIES


def train_all(group: ferro.ProcessGroup) -> dict[str, dict[str, list[object]]]:
    """Train in every way for so many ranks; return loss and arrays by strategy and dtype."""
    return {
        name: {dtype: list(strategy.run(group, dtype)) for dtype in strategy.dtypes}
        for name, strategy in strategies(group.world_size).items()
    }
