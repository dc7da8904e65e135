"""Tensor and sequence parallel layers: each matrix, and each sequence, sharded over ranks."""

from .attention import ParallelAttention
from .column import ColumnParallelLinear
from .embedding import ParallelEmbedding
from .generators import draw_alike, draw_per_rank
from .layernorm import SequenceParallelLayerNorm
from .loss import vocab_parallel_cross_entropy
from .parallelize import parallelize
from .regions import CopyIn, GatherIn, GatherOut, ReduceOut, ScatterOut, SplitIn
from .row import RowParallelLinear
from .state import full_state_dict, load_full_state_dict, local_state_dict
from .sum_gradients import SumGradients
from .unembedding import ParallelUnembedding

__all__ = [
    "ColumnParallelLinear",
    "CopyIn",
    "GatherIn",
    "GatherOut",
    "ParallelAttention",
    "ParallelEmbedding",
    "ParallelUnembedding",
    "ReduceOut",
    "RowParallelLinear",
    "ScatterOut",
    "SequenceParallelLayerNorm",
    "SplitIn",
    "SumGradients",
    "draw_alike",
    "draw_per_rank",
    "full_state_dict",
    "load_full_state_dict",
    "local_state_dict",
    "parallelize",
    "vocab_parallel_cross_entropy",
]
