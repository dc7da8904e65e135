"""The hook specs: how a plugin offers backends, algorithms, strategies, observers and commands to ferro.

A plugin is a distribution with one entry point in group "ferro", which names a light module of hook implementations:

    [project.entry-points.ferro]
    pipes = "ferro_pipes.plugin"

    # ferro_pipes/plugin.py
    import ferro

    FERRO_API_VERSION = 1  # optional: the `API_VERSION` of ferro that this plugin was written for, or with its
                           # `API_REVISION` as well: (1, 1)

    @ferro.hookimpl
    def ferro_backends():
        return [ferro.BackendInfo(name="pipes", …)]

A hook answers "what do you offer?" and returns frozen descriptions; no hook stands on the path of a collective.
Importing the module and calling its hooks must be quick, and must not import a native library, open a socket, start
MPI, touch a device or call `ferro.init`: the functions in the descriptions do that when they are chosen.

All ranks of a job need the same plugins in the same versions, but for plugins that offer commands only; ranks compare
them when they meet. A plugin is broken if its module fails to import, states another `FERRO_API_VERSION`, implements a
hook that is not below, or if its hook raises or returns something else than the spec says. What is asked for by name
and is offered by a sound plugin can be had beside a broken one, with a RuntimeWarning that names the broken one's
distribution. What could be the broken plugin's, such as a name that no other offers, and the choice of a default
backend, raises a `PluginError` that names it.

A plugin that states a newer `API_REVISION` than this ferro has is loaded: its hooks, and the fields of its
descriptions, that this ferro does not know are ignored, with a RuntimeWarning. Write such a plugin so that it is right
without them.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, TypeAlias

import pluggy

from ferro.collectives.choice import Choice
from ferro.collectives.schedule import CollectiveInfo
from ferro.observers import Observer
from ferro.types import Availability, BootstrapBroadcast, Device

if TYPE_CHECKING:
    from ferro.backend import Backend
    from ferro.rendezvous.store.interface import Store

# The version of the contract between plugins and ferro: the hooks, the descriptions, and `ferro.Backend`. It grows when
# something is removed or changes its meaning. A plugin whose module states another FERRO_API_VERSION is not loaded.
# The revision grows when a hook or a field is added.
API_VERSION = 1
API_REVISION = 0

hookspec = pluggy.HookspecMarker("ferro")
hookimpl = pluggy.HookimplMarker("ferro")

# (module, group, **options) -> module; each strategy has options of its own.
Strategy: TypeAlias = Callable[..., Any]


@dataclass(frozen=True, slots=True, kw_only=True)
class BackendConfig:
    """The arguments of `BackendInfo.create`: this rank's place in a new world, and how to reach the other ranks.

    Attributes:
        rank: this process's rank.
        world_size: number of ranks.
        store: key-value store that all ranks share before they are connected; keys are this group's own.
        group_name: name of the group, for messages.
        secret: the job's secret, by which both ends of every connection authenticate.
        addresses: by rank, each rank's own address on its connection to the store.
        store_host: address of the store as this rank reached it. A rank whose own address is loopback runs on the
            store's host, and the others reach that rank there.
        timeout_s: seconds that connecting may take.
        choice: which algorithm serves which call; also says whether reductions must be deterministic.
        host_id: the user's name for this rank's host (FERRO_HOST_ID), or "". Ranks with different names share no
            memory.
        local_rank: number of this process among those of the job on its host.
        launcher: the launcher that started this process, as in `BackendInfo.default_under`.
        requested: the backend as the user named it, such as "gloo" or "cpu:gloo,cuda:nccl".
        lost: returns the ranks whose process died or left by an exception, as the job's store has noticed. It is a
            round trip to the store and never raises: for slow paths of backends whose library notices no death.
        options: the user's `backend_options`. A backend raises UsageError for one that it does not know.
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
    """A communication backend, as a plugin offers it.

    Attributes:
        name: users' name for it, unique among all plugins.
        summary: one line for `ferro backends`.
        probe: says whether it can be used on this machine. It is quick, never raises, and imports nothing native. It
            is called on a thread of its own; a backend whose probe takes longer than seconds counts as unusable.
        create: connects this rank, on every rank, and returns its backend; it does the heavy imports. It raises
            `BackendUnavailable` when the backend cannot be used here, `RendezvousError` when a rank is missing.
        devices: the devices of the arrays that it takes, at least one.
        default_under: launchers ("ferro", "torchrun", "openmpi", "mpich", "slurm", "single", …) under which
            `ferro.init()` takes this backend; "*" for every launcher that no other backend claims.
        composes: True for a backend that is made of other backends; it serves names that are maps, such as
            "cpu:gloo,cuda:nccl" (`BackendConfig.requested`).
        launcher: given a number of ranks, returns the command that starts so many processes for this backend, such as
            ("mpiexec", "-n", "4"). None when plain processes will do. Tools that start ranks themselves use it:
            `ferro_testing`, `ferro conformance`, `ferro bench`.
        bootstrap_broadcast: for a library whose ranks are connected from the start: given (rank, world_size, message,
            deadline) with rank 0's message, None elsewhere, returns rank 0's message on all ranks. By it ranks on
            several hosts find the store when their launcher tells them no address.
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
    """A parallel strategy, as a plugin offers it.

    Attributes:
        name: users' name for it, unique among all plugins.
        summary: one line for people.
        load: imports and returns the strategy, a callable (module, group, **options) -> module.
        show: the command `ferro show NAME …`: given the arguments after the name, prints a picture of what the strategy
            would do and returns the exit status; it may raise UsageError. None when there is nothing to see.
    """

    name: str
    summary: str
    load: Callable[[], Strategy]
    show: Callable[[Sequence[str]], int] | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class CommandInfo:
    """A command of the `ferro` program, as a plugin offers it: `ferro NAME …`.

    Attributes:
        name: the word after `ferro`, unique among all plugins. "show-x" is what `ferro show x` runs.
        summary: one line for `ferro --help`.
        load: imports and returns the command, a callable that is given the arguments after the name and returns the
            exit status. It may raise UsageError, which ends the program with status 2.
    """

    name: str
    summary: str
    load: Callable[[], Callable[[Sequence[str]], int]]


@hookspec
def ferro_backends() -> Sequence[BackendInfo]:
    """Offer communication backends.

    `ferro.init` and `ferro.backends` call it once per process, on every rank, before any connection exists. Return one
    description per backend, or () to offer none on this machine. Do not import the native library: `create` does so
    when its backend is chosen. If this raises, a `ferro.init` that names another plugin's backend warns and goes on;
    every other one stops with a PluginError that names your distribution, and the other ranks are told.
    `ferro.backends.available()` lists the error beside the other backends.
    """
    return ()


@hookspec
def ferro_collectives() -> Sequence[CollectiveInfo]:
    """Offer algorithms for collectives.

    ferro calls it once per process, on every rank that asks for an algorithm by name
    (`ferro.init(algorithms={"all_reduce": "mine"})`). Return one description per collective and algorithm, the same
    on all ranks. Do not build schedules: `CollectiveInfo.build` does so for each group, as a pure function. If this
    raises, a `ferro.init` that names another plugin's algorithm warns and goes on; one that names an algorithm which
    nobody else offers stops with a PluginError that names your distribution, and the other ranks are told.
    """
    return ()


@hookspec
def ferro_strategies() -> Sequence[StrategyInfo]:
    """Offer parallel strategies.

    `ferro.strategies` calls it once per process, when a strategy is asked for by name or listed; ranks do not wait for
    each other there. Return one description per strategy. Do not import the strategy: `load` does so when it is asked
    for. If this raises, `ferro.strategies.get` warns, or raises a PluginError that names your distribution where no
    other plugin offers what is asked for; `ferro.strategies.available()` leaves your strategies out.
    """
    return ()


@hookspec
def ferro_observers() -> Sequence[Observer]:
    """Offer observers, which are told of the start and the end of each operation.

    Each `ferro.init` calls it on every rank, before ranks meet. Return new observers, or () when there is nothing to
    observe: only without any observer is the path of a collective as short as it can be. Ranks may return different
    observers, and an observer must not communicate with other ranks. If this raises, `ferro.init` stops with a
    PluginError that names your distribution, and the other ranks are told. If an observer raises later, ferro warns
    and the operation goes on.
    """
    return ()


@hookspec
def ferro_commands() -> Sequence[CommandInfo]:
    """Offer commands of the `ferro` program.

    The program calls it once; ranks never do. Return one description per command. Do not import the command: `load`
    does so when it is run. If this raises, `ferro --help` and an unknown command name your distribution, and all other
    commands work; a name that two plugins claim is an error when that command is run.
    """
    return ()
