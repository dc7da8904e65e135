"""Parallel strategies, with the module contract, layers and optimizers that they work on."""

from . import data, hooks, nn, optim, pipeline, tensor_parallel, training
from .context_parallel import ContextParallel
from .ddp import DDP
from .dtensor import DistributedGenerator, DTensor, Partial, Replicate, Shard, distribute
from .expert_parallel import ExpertParallel, MoE
from .fsdp import FSDP, FlatShard, MixedPrecision, ShardingStrategy
from .generators import RankGenerators, seed_all
from .global_loss import GlobalLoss, global_mean
from .mesh import DeviceMesh
from .nn import deferred
from .pipeline import Pipeline, split_model
from .sampler import ShardedSampler
from .sync_batchnorm import SyncBatchNorm, SyncBatchNorm1d, SyncBatchNorm2d, SyncBatchNorm3d, convert_sync_batchnorm

__all__ = [
    "DDP",
    "FSDP",
    "ContextParallel",
    "DTensor",
    "DeviceMesh",
    "DistributedGenerator",
    "ExpertParallel",
    "FlatShard",
    "GlobalLoss",
    "MixedPrecision",
    "MoE",
    "Partial",
    "Pipeline",
    "RankGenerators",
    "Replicate",
    "Shard",
    "ShardedSampler",
    "ShardingStrategy",
    "SyncBatchNorm",
    "SyncBatchNorm1d",
    "SyncBatchNorm2d",
    "SyncBatchNorm3d",
    "convert_sync_batchnorm",
    "data",
    "deferred",
    "distribute",
    "global_mean",
    "hooks",
    "nn",
    "optim",
    "pipeline",
    "seed_all",
    "split_model",
    "tensor_parallel",
    "training",
]
