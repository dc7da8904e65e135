"""Fully sharded data parallel training: every rank stores one shard of the model."""

from .config import MixedPrecision, ShardingStrategy
from .module import FSDP
from .sharded_parameter import FlatShard

__all__ = ["FSDP", "FlatShard", "MixedPrecision", "ShardingStrategy"]
