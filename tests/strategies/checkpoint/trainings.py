"""One model under every strategy."""

from functools import partial

import numpy as np

from ferro_strategies import (
    DDP,
    FSDP,
    ContextParallel,
    DeviceMesh,
    ExpertParallel,
    MixedPrecision,
    MoE,
    Pipeline,
    ShardingStrategy,
    nn,
    split_model,
)
from ferro_strategies import tensor_parallel as tp
from ferro_strategies.optim import AdamW

WORDS, DIM = 7, 6
BATCHES = np.random.default_rng(0).integers(0, WORDS, (6, 4, 5))
TP_PLAN = {
    "layers.0": tp.ParallelEmbedding.from_serial,
    "layers.1.module.layers.1": tp.ParallelAttention.from_serial,
    "layers.2.module.layers.1": tp.ColumnParallelLinear.from_serial,
    "layers.2.module.layers.4": tp.RowParallelLinear.from_serial,
    "layers.4": tp.ParallelUnembedding.from_serial,
}


def make_net(seed=0, dtype=np.float32):
    """Layers of uneven sizes, with a tied table, experts, and two generators."""
    table = nn.Embedding(WORDS, DIM, dtype=dtype, rng=seed)
    attention = nn.Attention(DIM, 3, dropout=0.1, dtype=dtype, rng=seed + 1)
    if attention.dropout is not None:
        attention.dropout.rng = np.random.default_rng(seed + 9)
    perceptron = [
        nn.LayerNorm(DIM, dtype=dtype),
        nn.Linear(DIM, 9, dtype=dtype, rng=seed + 2),
        nn.ReLU(),
        nn.Dropout(0.2, rng=seed + 8),
        nn.Linear(9, DIM, dtype=dtype, rng=seed + 3),
    ]
    return nn.Sequential(
        table,
        nn.Residual(nn.Sequential(nn.LayerNorm(DIM, dtype=dtype), attention)),
        nn.Residual(nn.Sequential(*perceptron)),
        nn.Residual(MoE(DIM, 5, 5, dtype=dtype, rng=seed + 4)),
        nn.Unembedding(table),
    )


class Training:
    """A model, its optimizer, and the steps that train them.

    Attributes:
        batch_of: this rank's number among those that have other batches, and how many there are.
    """

    def __init__(self, model, batch_of=(0, 1), loss=nn.cross_entropy):
        self.model, self.batch_of, self.loss = model, batch_of, loss
        self.optimizer = AdamW(model.parameters(), lr=0.01)

    def run(self, steps, first=0):
        rank, ranks = self.batch_of
        for batch in BATCHES[first : first + steps]:
            x = batch[rank::ranks]
            if isinstance(self.model, Pipeline):
                self.model.step(x, x, self.loss)
            else:
                scores, pullback = self.model.vjp(x)
                pullback(self.loss(scores, x)[1])
            self.optimizer.step()
            self.optimizer.zero_grad()
        return self


def serial(group, seed):
    return Training(make_net(seed))


def ddp(group, seed):
    return Training(DDP(make_net(seed), group), (group.rank, group.world_size))


def fsdp(group, seed, **options):
    return Training(FSDP(make_net(seed), group, **options), (group.rank, group.world_size))


def hybrid(group, seed):
    mesh = DeviceMesh((2, group.world_size // 2), ("replicas", "shards"), group)
    model = FSDP(make_net(seed), mesh["shards"], sharding="hybrid_shard", replicas=mesh["replicas"])
    return Training(model, (group.rank, group.world_size))


def tensor(group, seed):
    return Training(tp.parallelize(make_net(seed), group, TP_PLAN), loss=_parallel_loss(group))


def over_tensor(wrap, group, seed):
    mesh = DeviceMesh((group.world_size // 2, 2), ("dp", "tp"), group)
    model = wrap(tp.parallelize(make_net(seed), mesh["tp"], TP_PLAN), mesh["dp"])
    return Training(model, (mesh["dp"].rank, mesh["dp"].world_size), _parallel_loss(mesh["tp"]))


def expert(group, seed):
    return Training(ExpertParallel(make_net(seed), group), (group.rank, group.world_size))


def context(group, seed):
    return Training(ContextParallel(_without_dropout(make_net(seed)), group))


def pipeline(group, seed, per_rank=1, wrap=None):
    dp = 1
    mesh = None
    stage_group = group
    if wrap is not None:
        mesh = DeviceMesh((2, group.world_size // 2), ("dp", "pp"), group)
        stage_group, dp = mesh["pp"], 2
    split = split_model(make_net(seed), stage_group, stages_per_rank=per_rank)
    stages = split.stages if wrap is None else [wrap(stage, mesh["dp"]) for stage in split.stages]
    schedule = "1f1b" if per_rank == 1 else "interleaved_1f1b"
    model = Pipeline(stages, stage_group, schedule=schedule, microbatches=2, ties=split.ties)
    return Training(model, (mesh["dp"].rank if mesh else 0, dp))


def _parallel_loss(group):
    return partial(tp.vocab_parallel_cross_entropy, group=group)


def _without_dropout(net):
    net.layers[1].module.layers[1].dropout = None
    return net


def _tables(_name, module):
    return isinstance(module, nn.Embedding | nn.Unembedding)


# name: (ranks, function of group and seed)
STRATEGIES = {
    "serial": (1, serial),
    "ddp": (2, ddp),
    "fsdp": (3, fsdp),
    "fsdp one": (1, fsdp),
    "fsdp grad op": (2, partial(fsdp, sharding=ShardingStrategy.SHARD_GRAD_OP)),
    "fsdp optimizer": (3, partial(fsdp, sharding=ShardingStrategy.SHARD_OPTIMIZER)),
    "fsdp no shard": (2, partial(fsdp, sharding=ShardingStrategy.NO_SHARD)),
    "fsdp mixed": (2, partial(fsdp, mixed_precision=MixedPrecision(param_dtype=np.float16))),
    "hybrid": (4, hybrid),
    "tensor": (2, tensor),
    "tensor 3": (3, tensor),
    "fsdp over tensor": (4, partial(over_tensor, FSDP)),
    "ddp over tensor": (4, partial(over_tensor, DDP)),
    "expert": (2, expert),
    "context": (2, context),
    "pipeline": (2, pipeline),
    "pipeline interleaved": (2, partial(pipeline, per_rank=2)),
    "pipeline ddp": (4, partial(pipeline, wrap=DDP)),
    "pipeline fsdp": (4, partial(pipeline, wrap=partial(FSDP, units=_tables))),
}
