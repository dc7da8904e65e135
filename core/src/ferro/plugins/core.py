"""Core's own plugin: the simulated backend, the built-in algorithms, the trace, the commands.

It is registered through the same hooks as everyone's, and as light: each part is imported when it is asked for.
"""

import importlib
from collections.abc import Callable, Sequence
from functools import partial

from ferro.backend import Backend
from ferro.collectives.schedule import CollectiveInfo
from ferro.errors import BackendUnavailable
from ferro.hookspecs import BackendConfig, BackendInfo, CommandInfo, hookimpl
from ferro.observers import Observer
from ferro.types import Availability


def _probe_simulated() -> Availability:
    return Availability(ok=True, reason="ranks are threads of one process")


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
    summary = "ranks are threads of one process; for tests, faults and scale"
    return (BackendInfo(name="simulated", summary=summary, probe=_probe_simulated, create=_create_simulated),)


@hookimpl
def ferro_collectives() -> Sequence[CollectiveInfo]:
    """Offer ring, tree and direct algorithms."""
    from ferro.collectives.builtin import BUILTIN

    return BUILTIN


@hookimpl
def ferro_observers() -> Sequence[Observer]:
    """Offer a trace where `ferro run --trace` asked for one."""
    from ferro.launch.trace import Trace
    from ferro.runtime.environment import options

    directory = options().trace
    return () if directory is None else (Trace(directory),)


def _load_command(module: str, name: str) -> Callable[[Sequence[str]], int]:
    command: Callable[[Sequence[str]], int] = getattr(importlib.import_module(module), name)
    return command


@hookimpl
def ferro_commands() -> Sequence[CommandInfo]:
    """Offer the commands that need no other distribution."""
    commands = (
        ("run", "run a program as several ranks", "ferro.launch", "main"),
        (
            "backends",
            "show which backends are installed, and whether they can be used",
            "ferro.cli.listings",
            "show_backends",
        ),
        ("plugins", "show every installed plugin, with its hooks and versions", "ferro.cli.listings", "show_plugins"),
    )
    return [
        CommandInfo(name=name, summary=summary, load=partial(_load_command, module, function))
        for name, summary, module, function in commands
    ]
