"""Helpers of training loops: metrics of all ranks, stopping together, logging and progress of one rank."""

from .early_stopping import EarlyStopping, StopSignals, agree_stop
from .metrics import AveragedMetrics
from .progress import Progress
from .rank_logging import rank_handler
from .replica_assertion import assert_replicas_equal

__all__ = [
    "AveragedMetrics",
    "EarlyStopping",
    "Progress",
    "StopSignals",
    "agree_stop",
    "assert_replicas_equal",
    "rank_handler",
]
