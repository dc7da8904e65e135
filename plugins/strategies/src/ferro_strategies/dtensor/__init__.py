"""DTensor: arrays that are spread over a mesh of ranks and used as one array."""

from .distribute import distribute
from .placement import Partial, Placement, Replicate, Shard
from .random_arrays import DistributedGenerator
from .redistribute_plan import RedistributePlan, plan_redistribute
from .tensor import DTensor

__all__ = [
    "DTensor",
    "DistributedGenerator",
    "Partial",
    "Placement",
    "RedistributePlan",
    "Replicate",
    "Shard",
    "distribute",
    "plan_redistribute",
]
