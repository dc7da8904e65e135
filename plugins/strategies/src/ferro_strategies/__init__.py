"""Parallel strategies, with the module contract, layers and optimizers that they work on."""

from . import hooks, nn, optim
from .ddp import DDP
from .hybrid import HybridBackend
from .sampler import ShardedSampler

__all__ = ["DDP", "HybridBackend", "ShardedSampler", "hooks", "nn", "optim"]
