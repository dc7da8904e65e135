"""DTensor: arrays spread over a mesh of ranks, used as one array."""

from .distribute import distribute
from .placement import Partial, Placement, Replicate, Shard
from .planner import Plan, plan
from .tensor import DTensor

__all__ = [
    "DTensor",
    "Partial",
    "Placement",
    "Plan",
    "Replicate",
    "Shard",
    "distribute",
    "plan",
]
