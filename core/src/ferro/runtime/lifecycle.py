"""init and shutdown: join a job as the launcher's environment says, and leave it."""

from __future__ import annotations

import atexit
import os
import sys
import threading
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING

from ferro.errors import UsageError
from ferro.group.process_group import ProcessGroup
from ferro.observers import Observer
from ferro.simulated.simulate import group_of_this_thread

if TYPE_CHECKING:
    from ferro.runtime.world import World

TIMEOUT_S = 60.0
_FAILED_S = 2.0  # how long this rank hosts the store for the others after a failure

_lock = threading.Lock()
_world: World | None = None
_arguments: tuple[object, ...] = ()  # those that the world was made with


def init(
    backend: str | None = None,
    *,
    rank: int | None = None,
    world_size: int | None = None,
    rendezvous: str | None = None,
    timeout_s: float | None = None,
    deterministic: bool = False,
    algorithms: Mapping[str, str] | None = None,
    observers: Sequence[Observer] = (),
    backend_options: Mapping[str, object] | None = None,
) -> ProcessGroup:
    """Join the job, and return the group of all its ranks. Every rank calls it.

    Rank and world size come from the variables of the launcher or scheduler (`ferro run`, torchrun, mpiexec, Slurm,
    Flux, PBS, SkyPilot, Kubernetes); without one this is a world of one. Arguments beat the environment.

    Args:
        backend: name of the backend, or a map such as "cpu:gloo,cuda:nccl"; the launcher's default when None.
        rank: this process's rank.
        world_size: number of ranks.
        rendezvous: "host:port" where rank 0 is to host the store.
        timeout_s: deadline of joining, and of each operation that gives none, in seconds; FERRO_TIMEOUT_S or 60 when
            None.
        deterministic: reduce in order of rank, whatever the size or transport, so that results are the same bits on
            any machine; the same on all ranks.
        algorithms: collective -> name of the algorithm to use; the same on all ranks.
        observers: told of each operation, besides those that plugins offer.
        backend_options: the backend's own options.

    Returns:
        The world group. Closing it, leaving its `with` block or `ferro.shutdown()` ends it. While it is open and
        good, a further call with the same arguments returns it again, as for a cell of a notebook that is run again.

    Raises:
        UsageError: arguments or environment make no sense, or the group of an earlier call is still open, and has
            failed or was made with other arguments.
        RendezvousError: the ranks did not find each other or do not fit together; the message names the ranks.
        BackendUnavailable: the backend cannot be used here; the hint says what to do.
        PluginError: a plugin is broken.
    """
    global _world, _arguments
    # Imported here, since the network interfaces and the search for plugins would slow down `import ferro`.
    from ferro.runtime.environment import options, resolve
    from ferro.runtime.environment.inherited import check_not_inherited, mark_rank
    from ferro.runtime.world import World

    simulated = group_of_this_thread()
    if simulated is not None:
        if rank not in (None, simulated.rank) or world_size not in (None, simulated.world_size):
            place = f"rank {simulated.rank} of {simulated.world_size}"
            raise UsageError(f"this is {place} of ferro.simulate: leave rank= and world_size= out")
        return simulated
    mappings = (dict(algorithms or {}), dict(backend_options or {}))
    arguments = (backend, rank, world_size, rendezvous, timeout_s, deterministic, *mappings, *observers)
    with _lock:
        if _world is not None and not _world.closed:
            good = _world.group.state == "open"
            if good and arguments == _arguments:
                return _world.group
            raise UsageError(
                f"ferro.init() was called before in this process{' with other arguments' if good else ''}, and its "
                f"group {'is still open' if good else 'has failed'}: use that, or call ferro.shutdown() first"
            )
        info = resolve(rank=rank, world_size=world_size, rendezvous=rendezvous)
        check_not_inherited(info)
        settings = options()
        seconds = timeout_s if timeout_s is not None else settings.timeout_s or TIMEOUT_S
        if not 0 < seconds <= threading.TIMEOUT_MAX:
            raise UsageError(f"timeout_s must be a positive number of seconds, not {timeout_s!r}")
        world = World(info, settings, backend, seconds)
        try:
            world.join(deterministic, algorithms or {}, backend_options or {}, observers)
        except BaseException:
            world.close(_FAILED_S, orderly=False)
            raise
        _world, _arguments = world, arguments
        mark_rank(info)
    atexit.unregister(_at_exit)
    atexit.register(_at_exit)
    return world.group


def shutdown() -> None:
    """Close the world group, if there is one. Idempotent; every rank calls it at its end."""
    if _world is not None and not _world.closed:
        _world.group.close()


def abandon() -> None:
    """Leave the world group at once, if there is one: ranks that wait for this one lose it."""
    if _world is not None and not _world.closed:
        _world.group.abandon()


def _forget_world() -> None:
    """Forget the world in a forked child: its connections are the parent's."""
    global _world, _lock
    _world = None
    _lock = threading.Lock()  # another thread of the parent may hold the old one


if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_forget_world)


def _at_exit() -> None:
    """Leave at the end of the interpreter; after an uncaught exception wait for no other rank."""
    if _ended_by_exception():
        abandon()
    else:
        shutdown()


def _ended_by_exception() -> bool:
    """Say whether an exception ended the program.

    `sys.last_value` alone does not tell: interactive sessions and pytest set it for errors after which they go on.
    """
    error = getattr(sys, "last_value", None)
    if error is None or error.__traceback__ is None or sys.flags.interactive or hasattr(sys, "ps1"):
        return False
    outermost = error.__traceback__.tb_frame
    typed = outermost.f_code.co_filename in ("<stdin>", "<input>", "<console>")
    program = outermost.f_globals.get("__name__") in ("__main__", "runpy")
    return program and outermost.f_code.co_name in ("<module>", "_run_module_as_main") and not typed
