"""run_ranks: run a function on every rank of a job of real processes, within one deadline."""

from __future__ import annotations

import sys
from collections.abc import Callable, Mapping, Sequence
from typing import Any, TypeAlias

from ferro import backends
from ferro.errors import BackendUnavailable, PluginError, UsageError
from ferro_testing.functions import locate
from ferro_testing.outcome import Outcome, RanksFailed
from ferro_testing.processes import run_launcher, run_processes

# Variables to set for the processes, or a function from the rank to them.
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
    `ferro.group.codec`: numbers, strings, bytes, lists, dicts and NumPy arrays, never pickled.

    Args:
        function: defined at the top level of a file.
        world_size: number of processes.
        backend: name of an installed backend.
        args: given to every rank.
        timeout_s: deadline of the whole run, and of each collective that gives none, in seconds.
        init_options: more arguments of `ferro.init`.
        env: variables to set for the processes, besides this process's own: a mapping for all, or
            a function of the rank.
        launcher: the command that starts so many ranks, up to the program, such as ("mpiexec",
            "-n", "4"), under which they find each other. By default the backend's own
            (`BackendInfo.launcher`), if it needs one.
        python: the interpreter of the ranks; this process's own when None.

    Raises:
        RanksFailed: a rank failed or the deadline passed; all processes have ended.
        UsageError: the function cannot be loaded by file and name, an argument cannot be encoded,
            or variables are to differ by rank under a launcher, which gives all the same.
    """
    outcomes = _run(function, world_size, backend, args, timeout_s, init_options, env, launcher, python, stop=True)
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
    """Run the ranks and return their outcomes, for tests in which some are meant to fail or be killed.

    As `run_ranks`, but a rank that fails ends no other rank before the deadline.
    """
    return _run(function, world_size, backend, args, timeout_s, init_options, env, launcher, python, stop=False)


def _run(
    function: Callable[..., object],
    world_size: int,
    backend: str,
    args: Sequence[object],
    timeout_s: float,
    init_options: Mapping[str, object] | None,
    env: Variables | None,
    launcher: Sequence[str] | None,
    python: str | None,
    *,
    stop: bool,
) -> list[Outcome]:
    """Run the ranks, under a launcher where one is given or the backend needs one."""
    if world_size < 1:
        raise UsageError(f"world_size must be at least 1, not {world_size}")
    if not timeout_s > 0:
        raise UsageError(f"timeout_s must be positive, not {timeout_s!r}")
    task: dict[str, object] = {"function": locate(function), "backend": backend}
    task |= {"args": list(args), "init_options": dict(init_options or {})}
    python = python or sys.executable
    command = launcher or _launcher_of(backend, world_size)
    if command is None:
        variables = [dict((env(rank) if callable(env) else env) or {}) for rank in range(world_size)]
        return run_processes(task, variables, timeout_s=timeout_s, python=python, stop_on_failure=stop)
    if callable(env):
        raise UsageError(f"run_ranks: {command[0]} gives all ranks the same variables: env must be a mapping")
    return run_launcher(task, world_size, command, env or {}, timeout_s=timeout_s, python=python, stop_on_failure=stop)


def _launcher_of(backend: str, world_size: int) -> Sequence[str] | None:
    """Look up the command that starts ranks of a backend; the ranks report a backend that is unusable."""
    try:
        launcher = backends.get(backend).launcher
    except (BackendUnavailable, PluginError):
        return None
    return None if launcher is None else launcher(world_size)
