"""Core's own plugin: the simulated backend, the built-in algorithms, the trace, the commands.

It is registered through the same hooks as every plugin; each part is imported when it is asked for.
"""

from collections.abc import Sequence
from functools import partial
from pkgutil import resolve_name

from ferro.backend import Backend
from ferro.collectives.schedule import CollectiveInfo
from ferro.errors import BackendUnavailable
from ferro.hookspecs import BackendConfig, BackendInfo, CommandInfo, hookimpl
from ferro.observers import Observer
from ferro.runtime.environment import options
from ferro.types import Availability


def _create_simulated(config: BackendConfig) -> Backend:
    from ferro.simulated import SimulatedBackend

    if config.world_size > 1:
        raise BackendUnavailable(
            "simulated",
            f"its ranks are threads of one process, and this is one of {config.world_size}",
            "Use ferro.simulate(fn, world_size), or a backend between processes.",
        )
    return SimulatedBackend.create_group(1, choice=config.choice)[0]


@hookimpl
def ferro_backends() -> Sequence[BackendInfo]:
    """Offer ranks as threads of one process."""
    threads = "ranks are threads of one process"
    summary, probe = f"{threads}; for tests, faults and scale", partial(Availability, ok=True, reason=threads)
    return (BackendInfo(name="simulated", summary=summary, probe=probe, create=_create_simulated),)


@hookimpl
def ferro_collectives() -> Sequence[CollectiveInfo]:
    """Offer ring, tree and direct algorithms."""
    from ferro.collectives.builtin import BUILTIN

    return BUILTIN


@hookimpl
def ferro_observers() -> Sequence[Observer]:
    """Offer a trace where `ferro run --trace` asked for one."""
    directory = options().trace
    if directory is None:
        return ()
    from ferro.launch.trace import Trace

    return (Trace(directory),)


@hookimpl
def ferro_commands() -> Sequence[CommandInfo]:
    """Offer the commands that need no other distribution."""
    run = "run a program as several ranks"
    backends = "show which backends are installed, and whether they can be used"
    plugins = "show every installed plugin, with its hooks and versions"
    return [
        CommandInfo(name="run", summary=run, load=partial(resolve_name, "ferro.launch.job:main")),
        CommandInfo(name="backends", summary=backends, load=partial(resolve_name, "ferro.cli.listings:show_backends")),
        CommandInfo(name="plugins", summary=plugins, load=partial(resolve_name, "ferro.cli.listings:show_plugins")),
    ]
