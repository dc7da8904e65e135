"""Mixture of experts, in one process (MoE) and with the experts divided over the ranks (ExpertParallel)."""

from .module import ExpertParallel
from .moe import MoE, RouterStatistics
from .parallel_moe import ParallelMoE
from .routing import Routing, top_k_routing

__all__ = ["ExpertParallel", "MoE", "ParallelMoE", "RouterStatistics", "Routing", "top_k_routing"]
