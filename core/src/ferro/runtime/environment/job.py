"""A name for the job that no other job on this host has at the same time."""

from __future__ import annotations

import os
from collections.abc import Iterator, Mapping
from pathlib import Path

from ferro.runtime.environment.address import Address, format_address
from ferro.runtime.environment.families import Claim

# Variables that name the job, tried in this order.
_JOB_VARIABLES = {
    "openmpi": ("PMIX_NAMESPACE", "OMPI_MCA_ess_base_jobid", "OMPI_MCA_orte_ess_jobid"),
    "mpich": ("PMI_JOBID",),
}

_MAX_ANCESTORS = 64  # a bound for a /proc that changes while it is read


def name_job(env: Mapping[str, str], claim: Claim, store: Address | None, master: Address | None) -> str:
    """A text that sets this job apart from others on the host; see `LaunchInfo.job`."""
    launcher = claim.launcher
    if launcher == "single":
        return f"single:{_started(os.getpid())}"
    if store is not None:
        return f"{launcher}:{format_address(store)}:{env.get('FERRO_RESTART', '0')}"
    if launcher == "slurm":
        return f"slurm:{env.get('SLURM_JOB_ID', '')}.{env['SLURM_STEP_ID']}"
    for name in _JOB_VARIABLES.get(launcher, ()):
        if name in env:
            return f"{launcher}:{env[name]}"
    if master is not None and launcher not in _JOB_VARIABLES:
        run = env.get("TORCHELASTIC_RUN_ID", "")
        attempt = env.get("TORCHELASTIC_RESTART_COUNT", "0")
        return f"{launcher}:{run}:{format_address(master)}:{attempt}"
    return f"{launcher}:{_launching_process(claim.rank.source)}"


def _launching_process(variable: str) -> str:
    """The nearest ancestor that was itself started without `variable`: it gave it to the ranks.

    Hydra's proxy is one for all ranks on a host. A wrapper between it and Python (a shell,
    `uv run`) has the variable already, so it is passed over. Where the caller gave the rank,
    no process has such a variable, and the parent is taken.
    """
    nearest = os.getppid()
    for pid in _ancestors():
        nearest = pid
        try:
            given = Path(f"/proc/{pid}/environ").read_bytes()
        except OSError:
            break
        if not any(entry.startswith(f"{variable}=".encode()) for entry in given.split(b"\0")):
            break
    return _started(nearest)


def _ancestors() -> Iterator[int]:
    """Process ids from the parent upwards, as far as /proc shows them."""
    pid = os.getppid()
    for _ in range(_MAX_ANCESTORS):
        if pid <= 1:
            return
        yield pid
        fields = _stat(pid)
        if not fields:
            return
        pid = int(fields[1])


def _started(pid: int) -> str:
    """A process by id and, as ids are used again, by start time where /proc tells it."""
    fields = _stat(pid)
    return f"{pid}.{fields[19]}" if fields else str(pid)


def _stat(pid: int) -> list[str]:
    """The fields of /proc/<pid>/stat from the third on; empty where there is none."""
    try:
        text = Path(f"/proc/{pid}/stat").read_text(errors="replace")
    except OSError:
        return []
    # The second field is the program's name in parentheses: spaces and parentheses included.
    return text.rpartition(")")[2].split()
