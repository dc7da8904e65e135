"""Parallel strategies, with the module contract, layers and optimizers that they work on."""

from . import data, hooks, nn, optim, pipeline, tensor_parallel, training
from .ddp import DDP
from .dtensor import DTensor, Partial, Replicate, Shard, distribute
from .fsdp import FSDP, FlatShard, MixedPrecision, ShardingStrategy
from .generators import RankGenerators, seed_all
from .mesh import DeviceMesh
from .pipeline import Pipeline
from .sampler import ShardedSampler
from .sync_batchnorm import SyncBatchNorm, SyncBatchNorm1d, SyncBatchNorm2d, SyncBatchNorm3d, convert_sync_batchnorm

__all__ = [
    "DDP",
    "FSDP",
    "DTensor",
    "DeviceMesh",
    "FlatShard",
    "MixedPrecision",
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
    "distribute",
    "hooks",
    "nn",
    "optim",
    "pipeline",
    "seed_all",
    "tensor_parallel",
    "training",
]
