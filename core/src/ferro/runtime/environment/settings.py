"""The user's settings, a scheduler's of a node, and the environment of the ranks that `ferro run` starts."""

from __future__ import annotations

import math
import os
from collections.abc import Mapping
from typing import NamedTuple

from ferro.errors import UsageError
from ferro.runtime.environment.cores import usable_cores
from ferro.runtime.environment.launch_info import LAUNCHERS, Address, LaunchInfo, address_pair, format_address, integer
from ferro.runtime.environment.schedulers import (
    SCHEDULERS,
    completed,
    one_task_on_each_node,
    scheduled_address,
    started_this_process,
)

# The ranks of `ferro run` do not get the variables by which another launcher tells a process its place.
_FOREIGN_PREFIXES = ("OMPI_COMM_WORLD_", "PET_", "PMI_", "PMIX_", "TORCHELASTIC_")
_FOREIGN = frozenset(
    # A number of the node is left to the program: it fits to the ranks there.
    {name for variables in LAUNCHERS if not variables.per_node for name in (variables.rank, variables.local_rank)}
    | {"PBS_TASKNUM", "FERRO_MASTER_PORT", "FERRO_RANK_PROCESS", "HYDI_CONTROL_FD", "MPI_LOCALNRANKS"}
    | {"GROUP_RANK", "GROUP_WORLD_SIZE", "ROLE_NAME", "ROLE_RANK", "ROLE_WORLD_SIZE"}
)


class Options(NamedTuple):
    """The variables by which a user sets ferro."""

    trace: str | None  # FERRO_TRACE: directory for this job's per-rank trace parts
    gpu_fallback: bool  # FERRO_ENABLE_GPU_FALLBACK, exactly "1": a CPU backend may copy GPU arrays through the host
    timeout_s: float | None  # FERRO_TIMEOUT_S: seconds that a collective may take
    host_id: str  # FERRO_HOST_ID: the user's name for this process's host, or ""
    trace_hooks: bool  # FERRO_TRACE_HOOKS, exactly "1": print each call of a plugin's hook


class NodeDefaults(NamedTuple):
    """What Kubeflow or a scheduler tells this node's launcher; None where it does not."""

    nnodes: int | None
    node_rank: int | None
    nproc_per_node: int | None
    endpoint: Address | None


def options(env: Mapping[str, str] = os.environ) -> Options:
    """Read the user's settings."""
    timeout_s = None
    if text := env.get("FERRO_TIMEOUT_S"):
        try:
            timeout_s = float(text)
        except ValueError:
            timeout_s = math.nan
        if not (0 < timeout_s < math.inf):
            raise UsageError(
                f"FERRO_TIMEOUT_S={text!r} is not a positive number of seconds; set one such as 60, or unset it"
            )
    return Options(
        trace=env.get("FERRO_TRACE") or None,
        gpu_fallback=env.get("FERRO_ENABLE_GPU_FALLBACK") == "1",
        timeout_s=timeout_s,
        host_id=env.get("FERRO_HOST_ID", ""),
        trace_hooks=env.get("FERRO_TRACE_HOOKS") == "1",
    )


def variable(name: str) -> str | None:
    """Read one variable of a plugin or its library; an argument or a backend's option should beat it."""
    return os.environ.get(name)


def node_defaults(environ: Mapping[str, str] | None = None) -> NodeDefaults:
    """Read what a launcher of launchers tells this node, as defaults for `ferro run`.

    That is Kubeflow, or a scheduler that started one process on each of several nodes.
    """
    env = completed(os.environ if environ is None else environ)

    def number(name: str) -> int | None:
        return integer(env, name).value if name in env else None

    # With one of these words Kubeflow leaves the number to the launcher.
    automatic = env.get("PET_NPROC_PER_NODE") in ("auto", "cpu", "gpu")
    pair = ("PET_MASTER_ADDR", "PET_MASTER_PORT")
    endpoint = address_pair(env, *pair) if any(name in env for name in pair) else None
    nproc = None if automatic else number("PET_NPROC_PER_NODE")
    found = NodeDefaults(number("PET_NNODES"), number("PET_NODE_RANK"), nproc, endpoint)
    if found != NodeDefaults(None, None, None, None):
        return found
    for variables in LAUNCHERS:
        if variables.launcher in SCHEDULERS and started_this_process(variables, env):
            nnodes, node_rank = number(variables.world_size), number(variables.rank)
            if nnodes != 1 and (variables.per_node or one_task_on_each_node(variables, env)):
                address = scheduled_address(env, variables.launcher)
                return NodeDefaults(nnodes, node_rank, None, address and address[0])
    return found


def replace_environment(variables: Mapping[str, str]) -> None:
    """Give this process the variables of another, which it stands for from now on."""
    os.environ.clear()
    os.environ.update(variables)


def child_environment(
    info: LaunchInfo,
    *,
    restart: int = 0,
    trace: str | None = None,
    timeout_s: float | None = None,
    base: Mapping[str, str] | None = None,
) -> dict[str, str]:
    """Make the environment of a rank that `ferro run` starts, from which `resolve` reads `info`.

    The rank variables of other launchers in `base` (this process's environment by default) are dropped, so that
    `ferro run` works within a Slurm allocation or under mpiexec. OMP_NUM_THREADS shares the cores among the local ranks
    unless the user set it. `restart` is the number of attempts before this one.
    """
    base = os.environ if base is None else base
    env = {
        name: value for name, value in base.items() if name not in _FOREIGN and not name.startswith(_FOREIGN_PREFIXES)
    }
    env.setdefault("OMP_NUM_THREADS", str(max(1, usable_cores() // info.local_world_size)))
    passed = {
        "RANK": info.rank,
        "WORLD_SIZE": info.world_size,
        "LOCAL_RANK": info.local_rank,
        "LOCAL_WORLD_SIZE": info.local_world_size,
        "FERRO_RESTART": restart,
        "FERRO_NESTED": integer(base, "FERRO_NESTED").value + 1 if "FERRO_NESTED" in base else 1,
        "PYTHONUNBUFFERED": 1,
        "MASTER_ADDR": info.master and info.master[0],
        "MASTER_PORT": info.master and info.master[1],
        "FERRO_STORE": info.store and format_address(info.store),
        "FERRO_SECRET": None if info.secret is None else info.secret.hex(),
        "FERRO_TRACE": trace,
        "FERRO_TIMEOUT_S": timeout_s,
    }
    return env | {name: str(value) for name, value in passed.items() if value is not None}
