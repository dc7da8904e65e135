"""ferro: distributed training for NumPy and CuPy programs.

import ferro
group = ferro.init()
total = group.all_reduce(x)
"""

from ferro import arrays, backends, collectives, strategies, testing
from ferro.backend import Backend, Completion
from ferro.backend_config import BackendConfig
from ferro.collectives.choose import CollectiveInfo
from ferro.errors import (
    AuthenticationError,
    BackendError,
    BackendUnavailable,
    CollectiveMismatch,
    CollectiveTimeout,
    FerroError,
    GroupClosed,
    PeerLost,
    PluginError,
    RendezvousError,
    UnsupportedError,
    UsageError,
)
from ferro.group import ProcessGroup
from ferro.hookspecs import BackendInfo, StrategyInfo, hookimpl
from ferro.metrics import Metrics
from ferro.observers import Event, Observer
from ferro.runtime import init, shutdown
from ferro.simulation import simulate
from ferro.types import Availability, Device, ReduceOp
from ferro.work import Work

__all__ = [
    "AuthenticationError",
    "Availability",
    "Backend",
    "BackendConfig",
    "BackendError",
    "BackendInfo",
    "BackendUnavailable",
    "CollectiveInfo",
    "CollectiveMismatch",
    "CollectiveTimeout",
    "Completion",
    "Device",
    "Event",
    "FerroError",
    "GroupClosed",
    "Metrics",
    "Observer",
    "PeerLost",
    "PluginError",
    "ProcessGroup",
    "ReduceOp",
    "RendezvousError",
    "StrategyInfo",
    "UnsupportedError",
    "UsageError",
    "Work",
    "arrays",
    "backends",
    "collectives",
    "hookimpl",
    "init",
    "shutdown",
    "simulate",
    "strategies",
    "testing",
]
