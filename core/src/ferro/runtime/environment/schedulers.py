"""What schedulers tell besides rank and size: the tasks of this node, rank 0's host, and a job's id, for a port there.

docs/schedulers.md has the variables of each as a table.
"""

from __future__ import annotations

import contextlib
import itertools
import os
import re
import subprocess
import zlib
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import NamedTuple

from ferro.errors import UsageError
from ferro.runtime.environment.launch_info import Address, LauncherVariables, address_pair, integer

_FIRST_RESERVED_SLURM_STEP = 0xFFFFFFF0  # from here on: batch script, interactive shell, extern
_FLUX_S = 10.0
_MAX_HOSTS = 1_000_000
# A job's port lies below those that Linux gives to connections (from 32768 on). The number of ports is a prime, so that
# the ids of jobs that run at the same time, which lie close together, have different ones.
_FIRST_PORT, _PORTS, _STEPS = 20000, 11987, 64
_POD_PORT = 29400

Environment = Mapping[str, str]


def expand_hosts(text: str, source: str) -> list[str]:
    """Expand a list such as "n[01-03,07],gpu-[1-2]x[0-1]" as Slurm means it; an error names the source."""
    hosts: list[str] = []
    for entry in re.findall(r"(?:[^,\[\]]|\[[^\[\]]*\])+|[\[\]]", text):
        pieces = [_numbers(piece, text, source) for piece in re.findall(r"\[[^\[\]]*\]|[^\[\]]+|[\[\]]", entry)]
        hosts += ("".join(parts).strip() for parts in itertools.islice(itertools.product(*pieces), _MAX_HOSTS))
    return hosts


def _numbers(piece: str, text: str, source: str) -> list[str]:
    """Expand one "[01-03,07]"; other text stands for itself."""
    if "[" not in piece and "]" not in piece:
        return [piece]
    matches = [re.fullmatch(r"([0-9]{1,9})(?:-([0-9]{1,9}))?", part) for part in piece[1:-1].split(",")]
    ranges = [(match[1], range(int(match[1]), int(match[2] or match[1]) + 1)) for match in matches if match]
    if len(ranges) < len(matches) or not all(0 < len(numbers) <= _MAX_HOSTS for _, numbers in ranges):
        raise UsageError(f"{source}={text!r} is not a list of hosts such as n[01-03,07]; correct it, or unset it")
    return [str(number).zfill(len(first)) for first, numbers in ranges for number in numbers]


def started_this_process(variables: LauncherVariables, env: Environment) -> bool:
    """Say whether this launcher's variables are those of this process, and not of an allocation or a node around it."""
    if variables.launcher == "kubeflow":
        # With any other count per node, the variables describe the launcher on this node.
        return env.get("PET_NPROC_PER_NODE") == "1" and "PET_NODE_RANK" in env
    if variables.launcher == "slurm":
        return _in_slurm_step(env)
    if variables.launcher == "pbs":
        return "PBS_TASKNUM" in env and not _is_pbs_script(env)
    if variables.launcher == "jobset":
        return "JOBSET_NAME" in env and variables.rank in env
    if variables.launcher in SCHEDULERS:
        return variables.rank in env
    return any(name in env for name in variables[1:5]) or (variables.launcher == "torchrun" and "FERRO_STORE" in env)


def one_task_on_each_node(variables: LauncherVariables, env: Environment) -> bool:
    """Say whether a scheduler of tasks started one on each node, as it does for launchers; or may have."""
    if variables.world_size not in env:
        return True
    if variables.launcher == "slurm" and "SLURM_NNODES" in env:
        return env["SLURM_NNODES"] == env.get(variables.world_size)
    return env.get(variables.local_world_size) == "1"


def _in_slurm_step(env: Environment) -> bool:
    """Say whether srun started this process: what a batch script or a shell starts is no task, whatever it sees."""
    step = env.get("SLURM_STEP_ID", "")
    if not step.isdecimal() or int(step) >= _FIRST_RESERVED_SLURM_STEP or "SLURM_PROCID" not in env:
        return False
    task = env.get("SLURM_TASK_PID", "")
    with contextlib.suppress(OSError):
        # `srun --pty bash`: the shell is the task. It has a terminal, and gives each command a process group of its
        # own. The variable alone tells nothing, since an srun that is called there hands it on to its tasks.
        if "SLURM_PTY_PORT" in env and task.isdecimal() and int(task) != os.getpid() and os.isatty(0):
            return os.getpgid(int(task)) == os.getpgrp()
    return True


def slurm_tasks() -> int:
    """Count the tasks of the Slurm step of which this process is one; 0 where it is none."""
    return (
        integer(os.environ, "SLURM_NTASKS").value if _in_slurm_step(os.environ) and "SLURM_NTASKS" in os.environ else 0
    )


def _slurm_tasks_here(env: Environment) -> str | None:
    """Read the number of the step's tasks on this node; Slurm writes lists such as "2(x3),1", by node."""
    name = "SLURM_STEP_TASKS_PER_NODE"
    if name not in env:
        return env.get("SLURM_NTASKS_PER_NODE")
    matches = [re.fullmatch(r"([0-9]{1,9})(?:\(x([0-9]{1,9})\))?", part) for part in env[name].split(",")]
    counts = [(match[1], int(match[2] or 1)) for match in matches if match]
    if len(counts) < len(matches):
        raise UsageError(f"{name}={env[name]!r} is not a list such as 2(x3),1; unset it")
    if "SLURM_HET_SIZE" in env or "SLURM_PACK_SIZE" in env:
        # The list is that of one component of the heterogeneous job, while nodes are numbered through.
        if "SLURM_GTIDS" in env:
            return str(len(env["SLURM_GTIDS"].split(",")))
        return counts[0][0] if len({tasks for tasks, _ in counts}) == 1 else None
    node = integer(env, "SLURM_NODEID").value if "SLURM_NODEID" in env else 0
    for tasks, nodes in counts:
        if node < nodes:
            return tasks
        node -= nodes
    raise UsageError(f"{name}={env[name]!r} has no entry for SLURM_NODEID={env['SLURM_NODEID']}")


def _slurm_host(env: Environment) -> tuple[str, str]:
    """Find the first node of the step, or of the allocation; "" where a heterogeneous job does not tell."""
    name = next((name for name in ("SLURM_STEP_NODELIST", "SLURM_JOB_NODELIST") if env.get(name)), "")
    nodes = expand_hosts(env.get(name, ""), name)
    for kind in ("HET", "PACK"):
        if f"SLURM_{kind}_SIZE" in env and env.get("SLURM_NNODES") != str(len(nodes)):
            # The list is that of this task's component; a step of all components begins in the first.
            lists = [f"SLURM_JOB_NODELIST_{kind}_GROUP_{i}" for i in range(integer(env, f"SLURM_{kind}_SIZE").value)]
            name, nodes = lists[0], [host for each in lists for host in expand_hosts(env.get(each, ""), each)]
            nodes = nodes if env.get("SLURM_NNODES") == str(len(nodes)) else []
    return (nodes[0], name) if nodes else ("", "")


def _slurm_job(env: Environment) -> str:
    """Name the step; the components of a heterogeneous job have ids of their own, and the first one's in common."""
    shared = (env.get(f"SLURM_JOB_ID_{kind}_GROUP_0") for kind in ("HET", "PACK"))
    return f"{next(filter(None, shared), env.get('SLURM_JOB_ID', ''))}.{env.get('SLURM_STEP_ID', '')}"


def _flux_host(env: Environment) -> tuple[str, str]:
    if "FLUX_JOB_ID" not in env:
        return "", ""
    command = ["flux", "hostlist", "--expand", "--delimiter=\n", "local"]  # the hosts of FLUX_JOB_ID
    with contextlib.suppress(OSError, subprocess.SubprocessError):
        hosts = subprocess.check_output(command, stderr=subprocess.DEVNULL, text=True, timeout=_FLUX_S, env=dict(env))  # noqa: S603
        return _first_line(hosts), "`flux hostlist`"
    return "", ""


def _pbs_hosts(env: Environment) -> list[str]:
    """Read the host of each task from the file that PBS_NODEFILE names; empty where it cannot be read."""
    with contextlib.suppress(OSError, KeyError):
        return Path(env["PBS_NODEFILE"]).read_text().split()
    return []


def _is_pbs_script(env: Environment) -> bool:
    """Say whether this is the batch script or its shell, which is task 1 of the first node; pbsdsh starts others."""
    return (env.get("PBS_TASKNUM", "1"), env.get("PBS_NODENUM", "0"), env.get("PBS_VNODENUM", "0")) == ("1", "0", "0")


def _pod_host(env: Environment) -> tuple[str, str]:
    """Name the first pod of a JobSet, which has a host name below the JobSet's own service."""
    name, job = env.get("JOBSET_NAME"), env.get("REPLICATED_JOB_NAME")
    return (f"{name}-{job}-0-0.{name}" if name and job else "", "JOBSET_NAME, REPLICATED_JOB_NAME")


def _first_line(text: str) -> str:
    return next(iter(text.split()), "")


class Scheduler(NamedTuple):
    """How one scheduler tells where rank 0 is, and what distinguishes its jobs."""

    host: Callable[[Environment], tuple[str, str]]  # rank 0's host and the variables that tell it, or ("", "")
    job: Callable[[Environment], str]


def _first_of(name: str) -> Callable[[Environment], tuple[str, str]]:
    return lambda env: (_first_line(env.get(name, "")), name)


SCHEDULERS = {
    "flux": Scheduler(_flux_host, lambda env: env.get("FLUX_JOB_ID", "")),  # runs inside others
    "slurm": Scheduler(_slurm_host, _slurm_job),
    "pbs": Scheduler(
        lambda env: (next(iter(_pbs_hosts(env)), ""), "PBS_NODEFILE"), lambda env: env.get("PBS_JOBID", "")
    ),
    "skypilot": Scheduler(_first_of("SKYPILOT_NODE_IPS"), lambda env: env.get("SKYPILOT_TASK_ID", "")),
    "leaderworkerset": Scheduler(_first_of("LWS_LEADER_ADDRESS"), lambda _: ""),
    "jobset": Scheduler(_pod_host, lambda _: ""),
}


def scheduled_address(env: Environment, started_by: str) -> tuple[Address, str] | None:
    """Derive where rank 0 can host a store, and the source of that.

    The scheduler that started this process as a task tells it, or else one around a launcher such as mpiexec, whose
    rank 0 is on the first node. MASTER_ADDR or MASTER_PORT, where only one of them is set, beats its half.
    """
    if started_by != "slurm":  # daemons of mpiexec are steps of their own, on some of the nodes
        env = {name: value for name, value in env.items() if not name.startswith("SLURM_STEP_")}
    for name in sorted(SCHEDULERS, key=lambda name: name != started_by):
        host, source = SCHEDULERS[name].host(env)
        host, source = (env["MASTER_ADDR"], "MASTER_ADDR") if env.get("MASTER_ADDR") else (host, source)
        if host:
            chosen = next((port for port in ("FERRO_MASTER_PORT", "MASTER_PORT") if port in env), None)
            if chosen is not None:
                return address_pair({**env, "MASTER_ADDR": host}, "MASTER_ADDR", chosen), f"{source}, {chosen}"
            return (host, _port(SCHEDULERS[name].job(env))), source
    return None


def _port(job: str) -> int:
    """Choose a port by the id of the job and of its step, so that two jobs on one node have different ones."""
    if not job:
        return _POD_PORT
    match = re.match(r"([0-9]+)(?:\.([0-9]+)\Z)?", job)
    number = _STEPS * int(match[1]) + int(match[2] or 0) if match else zlib.crc32(job.encode())
    return _FIRST_PORT + number % _PORTS


def completed(env: Environment) -> Environment:
    """Add the numbers that a scheduler does not put in a variable of its own; their names say where they come from."""
    found: dict[str, str] = {}
    if _in_slurm_step(env) and (tasks := _slurm_tasks_here(env)):
        found["SLURM_STEP_TASKS_PER_NODE"] = tasks
    if "FLUX_JOB_SIZE" in env and env.get("FLUX_JOB_NNODES", "").isdecimal():
        each, rest = divmod(integer(env, "FLUX_JOB_SIZE").value, max(1, int(env["FLUX_JOB_NNODES"])))
        if not rest:  # Flux spreads the tasks evenly
            found["FLUX_JOB_SIZE / FLUX_JOB_NNODES"] = str(each)
    task = env.get("PBS_VNODENUM", env.get("PBS_NODENUM", ""))
    if task.isdecimal() and not _is_pbs_script(env):
        found["PBS_VNODENUM"] = task
        if hosts := _pbs_hosts(env):
            found["PBS_NP"] = str(len(hosts))
            here = (hosts[int(task) :] or [""])[0]
            found["earlier tasks of this host"] = str(hosts[: int(task)].count(here))
            found["tasks of this host"] = str(max(1, hosts.count(here)))
    if env.get("SKYPILOT_NODE_IPS"):
        found["SKYPILOT_NUM_NODES"] = env.get("SKYPILOT_NUM_NODES") or str(len(env["SKYPILOT_NODE_IPS"].split()))
    if "JOBSET_NAME" in env and "JOB_COMPLETION_INDEX" in env and (jobs := env.get("GLOBAL_REPLICAS", "1")) != "1":
        pods = found["NNODES"] = env.get("NNODES", jobs)  # one pod in each Job, unless the user says how many there are
        each = int(pods) // int(jobs) if pods.isdecimal() and jobs.isdecimal() and int(jobs) else 1
        first = each * integer(env, "JOB_GLOBAL_INDEX").value if "JOB_GLOBAL_INDEX" in env else 0
        found["JOB_COMPLETION_INDEX"] = str(first + integer(env, "JOB_COMPLETION_INDEX").value)
    return {**env, **found}
