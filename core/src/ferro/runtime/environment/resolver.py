"""Resolver: from the launcher's variables and the caller's arguments to one frozen `LaunchInfo`.

The variables of one launcher are read whole or not at all. A part of them, a value that is no number and two launchers
that disagree are errors, since a guess could start a job of the wrong size, which hangs.

A scheduler that starts one process on each node often starts a launcher there (`srun --ntasks-per-node=1 torchrun …`).
The outer variables then count launchers, not ranks: they are ignored when a launcher before theirs in `LAUNCHERS` knows
its local world size, or its numbers fit to that many nodes.
"""

from __future__ import annotations

import os
from collections.abc import Mapping
from pathlib import Path
from typing import NamedTuple

from ferro.errors import UsageError
from ferro.runtime.environment.launch_info import (
    LAUNCHERS,
    Address,
    LauncherVariables,
    LaunchInfo,
    SourcedInt,
    address_pair,
    format_address,
    integer,
    parse_address,
    read_secret,
)
from ferro.runtime.environment.schedulers import SCHEDULERS, completed, scheduled_address, started_this_process

_MAX_ANCESTORS = 64  # a bound for a /proc that changes while it is read

# The launchers whose numbers are compared with those of a launcher that knows its local world size.
_COMPARED = ("openmpi", "mpich", "slurm")
# Variables that name the job, tried in this order.
_JOB_VARIABLES = {
    "openmpi": ("PMIX_NAMESPACE", "OMPI_MCA_ess_base_jobid", "OMPI_MCA_orte_ess_jobid"),
    "mpich": ("PMI_JOBID",),
}


class Placement(NamedTuple):
    """This process's place as one launcher tells it; arguments beat the launcher's rank and world size."""

    launcher: str
    rank: SourcedInt
    world_size: SourcedInt
    local_rank: SourcedInt | None
    local_world_size: SourcedInt | None
    scheduler: str = ""  # the one that started this process as a task with these numbers


def resolve(
    env: Mapping[str, str] = os.environ,
    *,
    rank: int | None = None,
    world_size: int | None = None,
    rendezvous: str | None = None,
) -> LaunchInfo:
    """Find this process's place in its job, or raise UsageError; the arguments beat the variables."""
    env = completed(env)
    place = _agreed_placement(env, rank, world_size) or _unlaunched(rank, world_size)
    _check_range("rank", place.rank, place.world_size)
    store = None
    if rendezvous is None and "FERRO_STORE" in env:
        store = parse_address(env["FERRO_STORE"], source="FERRO_STORE")
    settled = place.world_size.value == 1 or store is not None
    # Under a scheduler half an address is enough: it knows the host, and the port can be derived.
    half = settled or bool(place.scheduler)
    master, master_source = _master(env, place.launcher, rendezvous, half)
    local_rank, local_size = _local_pair(place, master)
    derived = None
    if master is None and not settled and local_size.value != place.world_size.value:
        derived = scheduled_address(env, place.scheduler)
    if derived is not None:
        master, master_source = derived
    _check_range("local rank", local_rank, local_size)
    numbers = {"rank": place.rank, "world_size": place.world_size}
    numbers |= {"local_rank": local_rank, "local_world_size": local_size}
    sources = {name: number.source for name, number in numbers.items()}
    sources |= {"store": "FERRO_STORE" if store else "", "master": master_source}
    return LaunchInfo(
        **{name: number.value for name, number in numbers.items()},
        launcher=place.launcher,
        job=_job_name(env, place, store, master),
        store=store,
        master=master,
        master_port_taken=master_source == "MASTER_ADDR, MASTER_PORT"
        and env.get("TORCHELASTIC_USE_AGENT_STORE") == "True",
        master_derived=derived is not None,
        secret=read_secret(env),
        provenance=tuple((name, source) for name, source in sources.items() if source),
    )


def _agreed_placement(env: Mapping[str, str], rank: int | None, world_size: int | None) -> Placement | None:
    """Read the first launcher's placement, and check that the others do not contradict it."""
    first: Placement | None = None
    for variables in LAUNCHERS:
        if first is not None and first.local_world_size is not None and variables.launcher not in _COMPARED:
            continue  # the others start nodes' launchers and daemons of mpiexec as they start ranks
        other = _placement(variables, env, rank, world_size)
        if first is None or other is None:
            first = first or other
        elif (first.rank.value, first.world_size.value) == (other.rank.value, other.world_size.value):
            first = _joined(first, other)
        elif _is_inside(first, other):
            if first.local_world_size is None:
                first = first._replace(scheduler=other.scheduler)
        else:
            ours, theirs = next(
                pair
                for pair in ((first.rank, other.rank), (first.world_size, other.world_size))
                if pair[0].value != pair[1].value
            )
            raise UsageError(
                f"two launchers disagree: {ours}, but {theirs}; unset the variables of the one that did not start "
                "this process, or pass rank= and world_size="
            )
    return first


def _joined(inner: Placement, outer: Placement) -> Placement:
    """Complete a placement without local rank by an equal one of the scheduler around it."""
    if inner.local_world_size is not None or outer.local_world_size is None:
        return inner
    if inner.launcher == "torchrun" and outer.launcher not in ("openmpi", "mpich"):
        return outer  # RANK and WORLD_SIZE were set by hand from the scheduler's numbers; the scheduler names the job
    return outer._replace(launcher=inner.launcher, rank=inner.rank, world_size=inner.world_size)


def _is_inside(inner: Placement, outer: Placement) -> bool:
    """Say whether the outer launcher counts nodes, and the inner one the ranks that were started on each."""
    if outer.local_world_size is None or outer.local_world_size.value != 1:
        return False
    each, rest = divmod(inner.world_size.value, max(1, outer.world_size.value))
    fits = each > 0 and rest == 0 and inner.rank.value // each == outer.rank.value
    return fits or inner.local_world_size is not None


def _placement(
    variables: LauncherVariables, env: Mapping[str, str], rank: int | None, world_size: int | None
) -> Placement | None:
    """Read one launcher's placement; None where this launcher did not start this process."""
    if not started_this_process(variables, env):
        return None
    given = {variables.rank: rank, variables.world_size: world_size}
    for name, other in ((variables.rank, variables.world_size), (variables.world_size, variables.rank)):
        if given[name] is None and name not in env:
            there = [n for n in (other, variables.local_rank, variables.local_world_size) if n in env]
            raise UsageError(
                f"{name} is not set, but {' and '.join(there) or 'FERRO_STORE'} "
                f"{'are' if len(there) > 1 else 'is'}: the launcher's variables are incomplete; "
                f"set {name}, unset the others, or pass rank= and world_size="
            )
    ranks = integer(env, variables.rank) if rank is None else SourcedInt(rank, "rank=")
    sizes = integer(env, variables.world_size) if world_size is None else SourcedInt(world_size, "world_size=")
    scheduler = variables.launcher if variables.launcher in SCHEDULERS else ""
    if any(value is not None and env.get(name) != str(value) for name, value in given.items()):
        # The launcher's local rank belongs to its own rank.
        return Placement("arguments", ranks, sizes, None, None, scheduler)
    if variables.per_node:
        source = f"{variables.rank}: one process a node"
        return Placement(variables.launcher, ranks, sizes, SourcedInt(0, source), SourcedInt(1, source), scheduler)
    launcher = "ferro" if variables.launcher == "torchrun" and "FERRO_STORE" in env else variables.launcher
    local_rank = _optional_integer(env, variables.local_rank)
    return Placement(launcher, ranks, sizes, local_rank, _optional_integer(env, variables.local_world_size), scheduler)


def _optional_integer(env: Mapping[str, str], name: str) -> SourcedInt | None:
    return integer(env, name) if name in env else None


def _unlaunched(rank: int | None, world_size: int | None) -> Placement:
    """Take the arguments, or a world of one, where there is no launcher."""
    if rank is None and world_size is None:
        zero, one = (SourcedInt(value, "no launcher: a world of one") for value in (0, 1))
        return Placement("single", zero, one, zero, one)
    if rank is None or world_size is None:
        given, missing = ("rank", "world_size") if world_size is None else ("world_size", "rank")
        raise UsageError(
            f"{given}= is given, but neither {missing}= nor a launcher's variables are there; "
            f"pass {missing}= too, or start the program with `ferro run`"
        )
    return Placement("arguments", SourcedInt(rank, "rank="), SourcedInt(world_size, "world_size="), None, None)


def _local_pair(place: Placement, master: Address | None) -> tuple[SourcedInt, SourcedInt]:
    """Complete the local rank and local world size: assume all ranks on this host, or the fewest possible."""
    host = master[0] if master else "localhost"
    all_here = place.launcher in ("torchrun", "ferro", "arguments") and (
        host in ("localhost", "::1") or host.startswith("127.")
    )
    assumed = f"assumed, as {'all ranks seem to be' if all_here else 'nobody says who is'} here"
    local_rank = place.local_rank or SourcedInt(place.rank.value if all_here else 0, assumed)
    fitting = place.world_size.value if all_here else local_rank.value + 1
    return local_rank, place.local_world_size or SourcedInt(fitting, assumed)


def _master(
    env: Mapping[str, str], launcher: str, rendezvous: str | None, optional: bool
) -> tuple[Address | None, str]:
    """Find where rank 0 hosts the store, and the source of that; half an address is no error if `optional`."""
    if rendezvous is not None:
        return parse_address(rendezvous, source="rendezvous"), "rendezvous="
    pairs = [("MASTER_ADDR", "FERRO_MASTER_PORT" if "FERRO_MASTER_PORT" in env else "MASTER_PORT")]
    if launcher == "kubeflow":
        pairs.append(("PET_MASTER_ADDR", "PET_MASTER_PORT"))
    for pair in pairs:
        there = [name in env for name in pair]
        if all(there) or (any(there) and not optional):
            return address_pair(env, *pair), ", ".join(pair)
    return None, ""


def _check_range(what: str, place: SourcedInt, size: SourcedInt) -> None:
    if size.value < 1:
        raise UsageError(f"{size} is too small: a world has at least one rank; correct it")
    if not 0 <= place.value < size.value:
        raise UsageError(
            f"{place} is out of range: with {size} a {what} goes from 0 to {size.value - 1}; correct the one or the "
            "other"
        )


def _job_name(env: Mapping[str, str], place: Placement, store: Address | None, master: Address | None) -> str:
    """Name the job; see `LaunchInfo.job`."""
    launcher = place.launcher
    if launcher == "single":
        return f"single:{_process_name(os.getpid())}"
    if store is not None:
        return f"{launcher}:{format_address(store)}:{env.get('FERRO_RESTART', '0')}"
    if launcher in SCHEDULERS and (job := SCHEDULERS[launcher].job(env)):
        return f"{launcher}:{job}"
    for name in _JOB_VARIABLES.get(launcher, ()):
        if name in env:
            return f"{launcher}:{env[name]}"
    if master is not None and launcher not in _JOB_VARIABLES:
        run, attempt = env.get("TORCHELASTIC_RUN_ID", ""), env.get("TORCHELASTIC_RESTART_COUNT", "0")
        return f"{launcher}:{run}:{format_address(master)}:{attempt}"
    return f"{launcher}:{_launching_process(place.rank.source)}"


def _launching_process(variable: str) -> str:
    """Name the nearest ancestor that was itself started without `variable`: it gave the variable to the ranks.

    Hydra's proxy is one for all ranks on a host. A wrapper between it and Python (a shell, `uv run`) has the variable
    and is passed over. Where the caller gave the rank, no process has such a variable, and the parent is named.
    """
    pid = os.getppid()
    for _ in range(_MAX_ANCESTORS):
        try:
            environment = Path(f"/proc/{pid}/environ").read_bytes().split(b"\0")
        except OSError:
            break
        fields = _stat(pid)
        given = any(entry.startswith(f"{variable}=".encode()) for entry in environment)
        if not given or not fields or int(fields[1]) <= 1:
            break
        pid = int(fields[1])
    return _process_name(pid)


def _process_name(pid: int) -> str:
    """Name a process by id and, as ids are used again, by start time where /proc tells it."""
    fields = _stat(pid)
    return f"{pid}.{fields[19]}" if fields else str(pid)


def _stat(pid: int) -> list[str]:
    """Read the fields of /proc/<pid>/stat from the third on; empty where there is none."""
    try:
        text = Path(f"/proc/{pid}/stat").read_text(errors="replace")
    except OSError:
        return []
    # The second field is the program's name in parentheses: spaces and parentheses included.
    return text.rpartition(")")[2].split()
