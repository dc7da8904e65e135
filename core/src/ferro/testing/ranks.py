"""run_ranks: a function on every rank of a job of real processes, with a deadline for all."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any, TypeAlias

from ferro.errors import UsageError
from ferro.testing.outcome import Outcome, RanksFailed

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
) -> list[Any]:
    """Run `function(group, *args)` on `world_size` processes; return the results by rank.

    Each process loads the file that defines `function`, joins the others by
    `ferro.init(backend, **init_options)` and calls it. Arguments and results travel by
    `ferro.codec`: numbers, strings, bytes, lists, dicts and NumPy arrays, never pickled.

    Args:
        function: defined at the top level of a file.
        world_size: number of processes.
        backend: name of an installed backend.
        args: given to every rank.
        timeout_s: deadline of the whole run, and of each collective that gives none, in seconds.
        init_options: more arguments of `ferro.init`.
        env: variables to set for the processes, besides this process's own: the same for all, or
            what a function returns for each rank.

    Raises:
        RanksFailed: a rank failed or the deadline passed; all processes have ended.
        UsageError: the function cannot be loaded by file and name, an argument cannot be encoded.
    """
    outcomes = _run(function, world_size, backend, args, timeout_s, init_options, env, strict=True)
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
) -> list[Outcome]:
    """Return what became of each rank, for tests in which some are meant to fail or be killed.

    As `run_ranks`, but a rank that fails ends no other: all have until the deadline.
    """
    return _run(function, world_size, backend, args, timeout_s, init_options, env, strict=False)


def _run(
    function: Callable[..., object],
    world_size: int,
    backend: str,
    args: Sequence[object],
    timeout_s: float,
    init_options: Mapping[str, object] | None,
    env: Variables | None,
    *,
    strict: bool,
) -> list[Outcome]:
    # Not above: `import ferro` imports this file, and should not pay for starting processes.
    from ferro.testing.functions import place_of
    from ferro.testing.processes import Job

    if world_size < 1:
        raise UsageError(f"world_size must be at least 1, not {world_size}")
    if not timeout_s > 0:
        raise UsageError(f"timeout_s must be positive, not {timeout_s!r}")
    task = {
        "function": place_of(function),
        "backend": backend,
        "args": list(args),
        "init_options": dict(init_options or {}),
    }
    variables = [dict((env(rank) if callable(env) else env) or {}) for rank in range(world_size)]
    with Job(task, variables, timeout_s) as job:
        return job.outcomes(stop_on_failure=strict)
