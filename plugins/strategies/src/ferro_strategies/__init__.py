"""Parallel strategies, with the module contract, layers and optimizers that they work on."""

from . import hooks, nn, optim, pipeline, tensor_parallel
from .ddp import DDP
from .dtensor import DistributedGenerator, DTensor, Partial, Replicate, Shard, distribute
from .fsdp import FSDP, FlatShard, MixedPrecision, ShardingStrategy
from .mesh import DeviceMesh
from .pipeline import Pipeline
from .sampler import ShardedSampler
from .sync_batchnorm import SyncBatchNorm, SyncBatchNorm1d, SyncBatchNorm2d, SyncBatchNorm3d, convert_sync_batchnorm

__all__ = [
    "DDP",
    "FSDP",
    "DTensor",
    "DeviceMesh",
    "DistributedGenerator",
    "FlatShard",
    "MixedPrecision",
    "Partial",
    "Pipeline",
    "Replicate",
    "Shard",
    "ShardedSampler",
    "ShardingStrategy",
    "SyncBatchNorm",
    "SyncBatchNorm1d",
    "SyncBatchNorm2d",
    "SyncBatchNorm3d",
    "convert_sync_batchnorm",
    "distribute",
    "hooks",
    "nn",
    "optim",
    "pipeline",
    "tensor_parallel",
]
