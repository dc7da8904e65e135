"""ferro: distributed training for NumPy and CuPy programs.

import ferro
group = ferro.init()                # the launcher's environment says which rank this is; alone, a world of one
total = group.all_reduce(x)         # a new array, the sum over all ranks
"""

from ferro import arrays, backends, collectives, strategies
from ferro.backend import Backend, Completion
from ferro.collectives.schedule import CollectiveInfo
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
    ThreadLimitError,
    UnsupportedError,
    UsageError,
)
from ferro.group.process_group import ProcessGroup
from ferro.group.work import Work
from ferro.hookspecs import BackendConfig, BackendInfo, CommandInfo, StrategyInfo, hookimpl
from ferro.launch.cluster import Cluster, cluster, spawn
from ferro.observers import Event, Metrics, Observer
from ferro.runtime.lifecycle import init, shutdown
from ferro.simulated.simulate import simulate
from ferro.types import Availability, Device, ReduceOp

__all__ = [
    "AuthenticationError", "Availability", "Backend", "BackendConfig", "BackendError", "BackendInfo",
    "BackendUnavailable", "Cluster", "CollectiveInfo", "CollectiveMismatch", "CollectiveTimeout", "CommandInfo",
    "Completion", "Device", "Event", "FerroError", "GroupClosed", "Metrics", "Observer", "PeerLost", "PluginError",
    "ProcessGroup", "ReduceOp", "RendezvousError", "StrategyInfo", "ThreadLimitError", "UnsupportedError", "UsageError",
    "Work", "arrays", "backends", "cluster", "collectives", "hookimpl", "init", "shutdown", "simulate", "spawn",
    "strategies",
]  # fmt: skip
