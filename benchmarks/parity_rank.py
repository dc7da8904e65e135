"""One rank of the parity table: trains small models under every strategy.

`parity.py` starts it. Each strategy returns the last step's loss over the whole batch, and this
rank's parameters (and running statistics): whole arrays, named as in the model of one process.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial

import ml_dtypes
import numpy as np
from parity_models import (
    CONVOLUTIONAL,
    LR,
    MAX_NORM,
    MOMENTUM,
    PERCEPTRON,
    STEPS,
    TRANSFORMER,
    LossAndState,
    LossFunction,
    Model,
    State,
    floating,
    train,
    train_in_one_process,
    train_matrices_as_dtensors,
    train_matrices_in_one_process,
)

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

COMBINED_RANKS = 8
_MICROBATCHES = 5


def ddp(group: ferro.ProcessGroup, dtype: str) -> LossAndState:
    module = DDP(PERCEPTRON.build(dtype), group)
    return train(module, PERCEPTRON, dtype, group), module.state_dict()


def fsdp(sharding: str, group: ferro.ProcessGroup, dtype: str) -> LossAndState:
    """Train shards; with bfloat16 only the computation is in it, and master shards in float32."""
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


def sync_batchnorm(group: ferro.ProcessGroup, dtype: str) -> LossAndState:
    converted = convert_sync_batchnorm(CONVOLUTIONAL.build(dtype), group)
    module = DDP(converted, group, broadcast_buffers=False)
    return train(module, CONVOLUTIONAL, dtype, group), floating(module.state_dict())


def tensor_parallel(sequence_parallel: bool, group: ferro.ProcessGroup, dtype: str) -> LossAndState:
    module = _parallelize(TRANSFORMER.build(dtype), group, sequence_parallel)
    loss_function = partial(tp.vocab_parallel_cross_entropy, group=group)
    loss = train(module, TRANSFORMER, dtype, loss_function=loss_function)
    return loss, tp.full_state_dict(module)


def _parallelize(module: nn.Module, group: ferro.ProcessGroup, sequence_parallel: bool) -> nn.Module:
    kinds = {
        "layers.0": tp.ParallelEmbedding,
        "layers.[13].module.layers.1": tp.ParallelAttention,
        "layers.[24].module.layers.1": tp.ColumnParallelLinear,
        "layers.[24].module.layers.3": tp.RowParallelLinear,
        "layers.5.layers.1": tp.ColumnParallelLinear,
    }
    plan = {name: partial(kind.from_serial, sequence_parallel=sequence_parallel) for name, kind in kinds.items()}
    if sequence_parallel:
        norm = tp.SequenceParallelLayerNorm.from_serial
        plan |= {"layers.[1234].module.layers.0": norm, "layers.5.layers.0": norm}
    return tp.parallelize(module, group, plan)


def pipeline(schedule: str, group: ferro.ProcessGroup, dtype: str) -> LossAndState:
    """Train stages: two on each rank if the schedule is interleaved."""
    ranks = group.world_size
    stages = 2 * ranks if schedule == "interleaved_1f1b" else ranks
    layers = PERCEPTRON.layers(dtype)
    parts = np.array_split(np.arange(len(layers)), stages)[group.rank :: ranks]
    own_stages = [nn.Sequential(*(layers[index] for index in part)) for part in parts]
    piped = Pipeline(own_stages, group, schedule=schedule, microbatches=_MICROBATCHES)
    loss = _train_pipeline(piped, PERCEPTRON, dtype, nn.cross_entropy)
    state: State = {}
    for stage, part in zip(own_stages, parts, strict=True):
        state |= _renumber(stage.state_dict(), int(part[0]))
    return loss, state


def combined(sharded: bool, group: ferro.ProcessGroup, dtype: str) -> LossAndState:
    """Train tensor-parallel stages, replicated or sharded, on a mesh of 2 x 2 x 2 ranks."""
    mesh = DeviceMesh((2, 2, 2), ("dp", "pp", "tp"), group)
    module = _parallelize(TRANSFORMER.build(dtype), mesh["tp"], sequence_parallel=sharded)
    assert isinstance(module, nn.Sequential), "parallelize replaces layers inside the Sequential"
    part = np.array_split(np.arange(len(module.layers)), 2)[mesh["pp"].rank]
    layers = nn.Sequential(*(module.layers[index] for index in part))
    stage = FSDP(layers, mesh["dp"]) if sharded else DDP(layers, mesh["dp"])
    piped = Pipeline([stage], mesh["pp"], microbatches=4)
    loss_function = partial(tp.vocab_parallel_cross_entropy, group=mesh["tp"])
    loss = _train_pipeline(piped, TRANSFORMER, dtype, loss_function, mesh["dp"])
    whole = tp.full_state_dict(stage, stage.state_dict())
    return loss, _renumber(whole, int(part[0]))


def _train_pipeline(
    piped: Pipeline, model: Model, dtype: str, loss_function: LossFunction, replicas: ferro.ProcessGroup | None = None
) -> float:
    rank, ranks = (replicas.rank, replicas.world_size) if replicas else (0, 1)
    optimizer = SGD(piped.parameters(), lr=LR, momentum=MOMENTUM)
    loss = 0.0
    for step in range(STEPS):
        x, labels = model.batch(step, dtype)
        loss = piped.step(x[rank::ranks], labels[rank::ranks], loss_function)
        piped.clip_grad_norm(MAX_NORM)
        optimizer.step()
        optimizer.zero_grad()
    return loss if replicas is None else float(replicas.all_reduce(loss, "mean"))


def _renumber(state: State, first: int) -> State:
    """Name a stage's arrays as in the whole model, where the stage begins at layer `first`."""
    renumbered = {}
    for name, array in state.items():
        layers, number, rest = name.split(".", 2)
        renumbered[f"{layers}.{int(number) + first}.{rest}"] = array
    return renumbered


# -- the table of strategies -----------------------------------------------------------------------


@dataclass(frozen=True, slots=True, kw_only=True)
class Strategy:
    """A way to train, with the same training in one process.

    Attributes:
        run: trains on this rank, in a dtype.
        in_one_process: does the same training in one process.
        dtypes: dtypes in which both are compared.
    """

    run: Callable[[ferro.ProcessGroup, str], LossAndState]
    in_one_process: Callable[[str], LossAndState]
    dtypes: tuple[str, ...] = ("float32", "float64")


_perceptron = partial(train_in_one_process, PERCEPTRON)
_transformer = partial(train_in_one_process, TRANSFORMER)


def _fsdp_in_one_process(sharding: str, dtype: str) -> LossAndState:
    """Train in one process; bfloat16 needs FSDP's mixed precision, on one simulated rank."""
    if dtype != "bfloat16":
        return train_in_one_process(PERCEPTRON, dtype)
    [result] = ferro.simulate(lambda group: fsdp(sharding, group, dtype), 1)
    return result


STRATEGIES: dict[str, Strategy] = {
    "ddp": Strategy(run=ddp, in_one_process=_perceptron),
    **{
        f"fsdp {sharding}": Strategy(
            run=partial(fsdp, sharding),
            in_one_process=partial(_fsdp_in_one_process, sharding),
            dtypes=("bfloat16", "float32", "float64"),
        )
        for sharding in ShardingStrategy
    },
    **{
        f"pipeline {name}": Strategy(run=partial(pipeline, name), in_one_process=_perceptron)
        for name in ("gpipe", "1f1b", "interleaved_1f1b", "zb_h1")
    },
    "tensor_parallel": Strategy(run=partial(tensor_parallel, False), in_one_process=_transformer),
    "sequence_parallel": Strategy(run=partial(tensor_parallel, True), in_one_process=_transformer),
    "sync_batchnorm": Strategy(run=sync_batchnorm, in_one_process=partial(train_in_one_process, CONVOLUTIONAL)),
    "dtensor": Strategy(run=train_matrices_as_dtensors, in_one_process=train_matrices_in_one_process),
}
COMBINED: dict[str, Strategy] = {
    "ddp x tp x pp": Strategy(run=partial(combined, False), in_one_process=_transformer),
    "fsdp x sp x pp": Strategy(run=partial(combined, True), in_one_process=_transformer),
}


def strategies(ranks: int) -> dict[str, Strategy]:
    """Return the strategies that are compared on this number of ranks, by name."""
    return COMBINED if ranks == COMBINED_RANKS else STRATEGIES


def train_all(group: ferro.ProcessGroup) -> dict[str, dict[str, list[object]]]:
    """Train under every strategy; return losses and arrays by strategy and dtype."""
    return {
        name: {dtype: list(strategy.run(group, dtype)) for dtype in strategy.dtypes}
        for name, strategy in strategies(group.world_size).items()
    }
