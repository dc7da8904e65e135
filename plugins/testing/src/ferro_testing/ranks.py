"""run_ranks: a function on every rank of a job of real processes, with a deadline for all."""

from __future__ import annotations

import sys
from collections.abc import Callable, Mapping, Sequence
from typing import TYPE_CHECKING, Any, TypeAlias

from ferro.errors import BackendUnavailable, PluginError, UsageError
from ferro_testing.outcome import Outcome, RanksFailed

if TYPE_CHECKING:
    from ferro_testing.launched import LaunchedJob
    from ferro_testing.processes import Job

# Variables to set for the processes; given by rank where they differ.
Variables: TypeAlias = "Mapping[str, str] | Callable[[int], Mapping[str, str]]"


def run_ranks(
    function: Callable[..., object],
    world_size: int,
    *,
    backend: str,
    args: Sequence[object] = (),
    timeout_s: float = 60.0,
    init_options: Mapping[str, object] | None = None,
    env: Variables | None = None,
    launcher: Sequence[str] | None = None,
    python: str | None = None,
) -> list[Any]:
    """Run `function(group, *args)` on `world_size` processes; return the results by rank.

    Each process loads the file that defines `function`, joins the others by
    `ferro.init(backend, **init_options)` and calls it. Arguments and results travel by
    `ferro.rendezvous.codec`: numbers, strings, bytes, lists, dicts and NumPy arrays, never pickled.

    Args:
        function: defined at the top level of a file.
        world_size: number of processes.
        backend: name of an installed backend.
        args: given to every rank.
        timeout_s: deadline of the whole run, and of each collective that gives none, in seconds.
        init_options: more arguments of `ferro.init`.
        env: variables to set for the processes, besides this process's own: the same for all, or
            what a function returns for each rank.
        launcher: the command that starts so many ranks, up to the program, such as ("mpiexec",
            "-n", "4"): they find each other as they do under it. By default what the backend needs
            (`BackendInfo.launcher`), if anything.
        python: the interpreter of the ranks; this process's own when None.

    Raises:
        RanksFailed: a rank failed or the deadline passed; all processes have ended.
        UsageError: the function cannot be loaded by file and name, an argument cannot be encoded,
            or variables are to differ by rank under a launcher, which gives all the same.
    """
    task = _task(function, world_size, backend, args, timeout_s, init_options)
    with _job(task, world_size, timeout_s, env, launcher, python) as job:
        outcomes = job.outcomes(stop_on_failure=True)
    if not all(outcome.ok for outcome in outcomes):
        raise RanksFailed(f"{function.__name__} on {world_size} ranks of {backend}", outcomes)
    return [outcome.result for outcome in outcomes]


def run_ranks_outcomes(
    function: Callable[..., object],
    world_size: int,
    *,
    backend: str,
    args: Sequence[object] = (),
    timeout_s: float = 60.0,
    init_options: Mapping[str, object] | None = None,
    env: Variables | None = None,
    launcher: Sequence[str] | None = None,
    python: str | None = None,
) -> list[Outcome]:
    """Return what became of each rank, for tests in which some are meant to fail or be killed.

    As `run_ranks`, but a rank that fails ends no other: all have until the deadline.
    """
    task = _task(function, world_size, backend, args, timeout_s, init_options)
    with _job(task, world_size, timeout_s, env, launcher, python) as job:
        return job.outcomes(stop_on_failure=False)


def _task(
    function: Callable[..., object],
    world_size: int,
    backend: str,
    args: Sequence[object],
    timeout_s: float,
    init_options: Mapping[str, object] | None,
) -> dict[str, object]:
    """Return what each rank is to do, once the arguments have been checked."""
    # Not above: `import ferro` imports this file, and should not pay for starting processes.
    from ferro_testing.functions import place_of

    if world_size < 1:
        raise UsageError(f"world_size must be at least 1, not {world_size}")
    if not timeout_s > 0:
        raise UsageError(f"timeout_s must be positive, not {timeout_s!r}")
    return {
        "function": place_of(function),
        "backend": backend,
        "args": list(args),
        "init_options": dict(init_options or {}),
    }


def _job(
    task: Mapping[str, object],
    world_size: int,
    timeout_s: float,
    env: Variables | None,
    launcher: Sequence[str] | None,
    python: str | None,
) -> Job | LaunchedJob:
    """Start the ranks, under a launcher where one is given or the backend needs one."""
    from ferro_testing.launched import LaunchedJob
    from ferro_testing.processes import Job

    python = python or sys.executable
    command = launcher or _launcher_of(str(task["backend"]), world_size)
    if command is None:
        variables = [dict((env(rank) if callable(env) else env) or {}) for rank in range(world_size)]
        return Job(task, variables, timeout_s, python)
    if callable(env):
        raise UsageError(f"run_ranks: {command[0]} gives all ranks the same variables: env must be a mapping")
    return LaunchedJob(task, world_size, command, python, env or {}, timeout_s)


def _launcher_of(backend: str, world_size: int) -> Sequence[str] | None:
    """Return the command that starts ranks of a backend; a rank tells better what is wrong."""
    from ferro import backends

    try:
        launcher = backends.get(backend).launcher
    except (BackendUnavailable, PluginError):
        return None
    return None if launcher is None else launcher(world_size)
