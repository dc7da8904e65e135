"""The environment of the ranks that `ferro run` starts."""

from __future__ import annotations

import os
from collections.abc import Mapping

from ferro.runtime.environment.address import format_address
from ferro.runtime.environment.families import FAMILIES
from ferro.runtime.environment.info import LaunchInfo

# What tells a process its place under another launcher: the ranks of `ferro run` do not get it.
_FOREIGN_PREFIXES = ("OMPI_COMM_WORLD_", "PET_", "PMI_", "PMIX_", "TORCHELASTIC_")
_FOREIGN = frozenset(
    {name for family in FAMILIES for name in (family.rank, family.local_rank)}
    | {"FERRO_MASTER_PORT", "HYDI_CONTROL_FD", "MPI_LOCALNRANKS"}
    | {"GROUP_RANK", "GROUP_WORLD_SIZE", "ROLE_NAME", "ROLE_RANK", "ROLE_WORLD_SIZE"}
)


def child_environment(
    info: LaunchInfo,
    *,
    restart: int = 0,
    trace: str | None = None,
    timeout_s: float | None = None,
    base: Mapping[str, str] | None = None,
) -> dict[str, str]:
    """The environment of a rank that `ferro run` starts, such that `resolve` gives `info` back.

    Other launchers' rank variables are dropped, so that `ferro run` works within a Slurm
    allocation or under mpiexec. OMP_NUM_THREADS shares the cores among the local ranks unless
    the user set it.

    Args:
        info: the rank's place; `store`, `master` and `secret` are passed on where present.
        restart: attempts before this one.
        trace: directory for trace parts.
        timeout_s: becomes the ranks' FERRO_TIMEOUT_S.
        base: the environment to start from; the process's own by default.
    """
    env = {
        name: value
        for name, value in (os.environ if base is None else base).items()
        if name not in _FOREIGN and not name.startswith(_FOREIGN_PREFIXES)
    }
    env.setdefault("OMP_NUM_THREADS", str(max(1, usable_cores() // info.local_world_size)))
    env |= {
        "RANK": str(info.rank),
        "WORLD_SIZE": str(info.world_size),
        "LOCAL_RANK": str(info.local_rank),
        "LOCAL_WORLD_SIZE": str(info.local_world_size),
        "FERRO_RESTART": str(restart),
        "PYTHONUNBUFFERED": "1",
    }
    if info.master is not None:
        env |= {"MASTER_ADDR": info.master[0], "MASTER_PORT": str(info.master[1])}
    if info.store is not None:
        env["FERRO_STORE"] = format_address(info.store)
    if info.secret is not None:
        env["FERRO_SECRET"] = info.secret.hex()
    if trace is not None:
        env["FERRO_TRACE"] = trace
    if timeout_s is not None:
        env["FERRO_TIMEOUT_S"] = repr(timeout_s)
    return env


def usable_cores() -> int:
    """CPU cores that this process may run on."""
    if hasattr(os, "sched_getaffinity"):
        return len(os.sched_getaffinity(0))
    return os.cpu_count() or 1
