"""The hook specs: what a plugin may offer. The descriptions it returns are here, too.

A plugin is a distribution with one entry point in group "ferro" that names a light module of
hook implementations:

    [project.entry-points.ferro]
    pipes = "ferro_pipes.plugin"

    # ferro_pipes/plugin.py
    @ferro.hookimpl
    def ferro_backends():
        return [ferro.BackendInfo(name="pipes", …)]

Hooks answer "what do you offer?". They are called once per process, return frozen descriptions
and never stand on the path of a collective. Importing the module and calling its hooks must not
import a native library, open a socket, start MPI or touch a device. If either raises, ferro
stops with a PluginError that names the distribution (`available()` still lists the others).
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, TypeAlias

import pluggy

from ferro.backend import Backend
from ferro.collectives.choice import Choice
from ferro.collectives.schedule import CollectiveInfo
from ferro.observers import Observer
from ferro.types import Availability, Device

if TYPE_CHECKING:
    from ferro.rendezvous.store.interface import Store

# The version of what plugins and ferro expect of each other: the hooks, the descriptions, the
# backend contract. A plugin's module may state the version it was written for as FERRO_API_VERSION;
# ferro refuses to load one that states another.
API_VERSION = 1

hookspec = pluggy.HookspecMarker("ferro")
hookimpl = pluggy.HookimplMarker("ferro")

# (module, group, **options) -> module; the options are each strategy's own.
Strategy: TypeAlias = Callable[..., Any]

# (rank, world_size, rank 0's message and elsewhere None, deadline) -> rank 0's message
BootstrapBroadcast: TypeAlias = Callable[[int, int, bytes | None, float], bytes]


@dataclass(frozen=True, slots=True, kw_only=True)
class BackendConfig:
    """What a backend is created with.

    Attributes:
        rank: this process's rank.
        world_size: number of ranks.
        store: all that the ranks share before they are connected; keys are this group's own.
        group_name: name of the group, for messages.
        secret: the job's secret, with which every connection is authenticated.
        addresses: for every rank the address of its own by which it reached the store.
        store_host: address of the store as this rank reached it: where ranks live that reached
            it over loopback.
        timeout_s: seconds that connecting may take.
        choice: which algorithm serves which call.
        host_id: what the user calls this rank's host, "" for nothing: ranks with different ones
            share no memory.
        local_rank: number of this process on its host.
        launcher: what started it; see `BackendInfo.default_under`.
        requested: the backend as the user named it, such as "gloo" or "cpu:gloo,cuda:nccl".
        lost: returns the world ranks whose process ended without closing its group, or that left
            by an exception, as far as the job's store has noticed: for backends whose library never
            notices. It costs a round trip, so it is for slow paths; it never raises.
        options: the backend's own options, by name.
    """

    rank: int
    world_size: int
    store: Store
    group_name: str = "world"
    secret: bytes = field(default=b"", repr=False)
    addresses: tuple[str, ...] = ()
    store_host: str = "127.0.0.1"
    timeout_s: float = 60.0
    choice: Choice = field(default_factory=Choice)
    host_id: str = ""
    local_rank: int = 0
    launcher: str = "single"
    requested: str = ""
    lost: Callable[[], frozenset[int]] = frozenset
    options: Mapping[str, object] = field(default_factory=dict)


@dataclass(frozen=True, slots=True, kw_only=True)
class BackendInfo:
    """A backend on offer.

    Attributes:
        name: what users call it, unique among all plugins.
        summary: one line for people.
        devices: where its buffers may be.
        probe: says whether it can be used here; quick, never raises, imports nothing native.
        create: makes it, with the heavy imports; raises `BackendUnavailable` when it cannot.
        default_under: launchers ("ferro", "torchrun", "openmpi", "mpich", "slurm", "single", …)
            under which it is what `ferro.init()` takes; "*" for every launcher that no other
            backend claims.
        composes: it is made of other backends, and is what a map such as "cpu:gloo,cuda:nccl"
            stands for (`BackendConfig.requested`).
        launcher: given a number of ranks, the command that starts so many processes for it, such
            as ("mpiexec", "-n", "4"); None when it needs nothing but processes. For tools that
            start ranks themselves: `ferro_testing`, `ferro conformance`, `ferro bench`.
        bootstrap_broadcast: for a library whose ranks are connected from the start: given rank,
            world size, rank 0's message (None elsewhere) and a deadline, returns rank 0's message
            on all ranks. By it ranks on several hosts find the store where the launcher gives no
            address.
    """

    name: str
    summary: str
    probe: Callable[[], Availability]
    create: Callable[[BackendConfig], Backend]
    devices: tuple[Device, ...] = (Device.CPU,)
    default_under: tuple[str, ...] = ()
    composes: bool = False
    launcher: Callable[[int], Sequence[str]] | None = None
    bootstrap_broadcast: BootstrapBroadcast | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class StrategyInfo:
    """A parallel strategy on offer.

    Attributes:
        name: what users call it, unique among all plugins.
        summary: one line for people.
        load: imports and returns it, a callable (module, group, **options) -> module.
        show: what `ferro show NAME ...` runs: given the arguments after the name, prints a
            picture of what the strategy would do, and returns the exit status; may raise
            UsageError. None when there is nothing to see.
    """

    name: str
    summary: str
    load: Callable[[], Strategy]
    show: Callable[[Sequence[str]], int] | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class CommandInfo:
    """A command on offer: `ferro NAME …`.

    Attributes:
        name: the word after `ferro`, unique among all plugins.
        summary: one line for people, shown by `ferro --help`.
        load: imports and returns the command. Called with the arguments after its name, the command
            returns the exit status; it may raise UsageError, which ends it with status 2.
    """

    name: str
    summary: str
    load: Callable[[], Callable[[Sequence[str]], int]]


@hookspec
def ferro_backends() -> Sequence[BackendInfo]:
    """Offer communication backends.

    Called once per process, before any connection exists, on every rank. Return one
    description per backend; () to offer none here.
    """
    return ()


@hookspec
def ferro_collectives() -> Sequence[CollectiveInfo]:
    """Offer algorithms for collectives.

    Called once per process, on every rank. A user chooses one by name
    (`ferro.init(algorithms={"all_reduce": "mine"})`), the same on all ranks.
    """
    return ()


@hookspec
def ferro_strategies() -> Sequence[StrategyInfo]:
    """Offer parallel strategies.

    Called once per process, on every rank.
    """
    return ()


@hookspec
def ferro_observers() -> Sequence[Observer]:
    """Offer observers, told of each operation's start and end.

    Called once by `ferro.init`, on every rank. Return () when there is nothing to observe:
    without observers the path of a collective does not change.
    """
    return ()


@hookspec
def ferro_commands() -> Sequence[CommandInfo]:
    """Offer commands of the `ferro` program.

    Called by the program only, never on a rank. A name claimed twice is an error when that command
    is asked for. If this raises, `ferro --help` and an unknown command name your distribution.
    """
    return ()
