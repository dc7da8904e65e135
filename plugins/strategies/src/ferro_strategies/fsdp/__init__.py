"""Fully sharded data parallel training: every rank has a piece of the model."""

from .module import FSDP
from .precision import MixedPrecision
from .sharding import ShardingStrategy
from .state import FlatShard

__all__ = ["FSDP", "FlatShard", "MixedPrecision", "ShardingStrategy"]
