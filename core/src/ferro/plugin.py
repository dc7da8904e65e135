"""Core's own plugin: the simulated backend, the built-in algorithms, the trace.

Registered through the same hooks as everyone's.
"""

from collections.abc import Sequence

from ferro.collectives.choose import BUILTIN, CollectiveInfo
from ferro.environment import options
from ferro.hookspecs import BackendInfo, hookimpl
from ferro.observers import Observer
from ferro.simulated.backend import SIMULATED
from ferro.trace import Trace


@hookimpl
def ferro_backends() -> Sequence[BackendInfo]:
    """Offer ranks as threads of one process."""
    return (SIMULATED,)


@hookimpl
def ferro_collectives() -> Sequence[CollectiveInfo]:
    """Offer ring, tree and direct algorithms."""
    return BUILTIN


@hookimpl
def ferro_observers() -> Sequence[Observer]:
    """Offer a trace where `ferro run --trace` asked for one."""
    directory = options().trace
    return () if directory is None else (Trace(directory),)
