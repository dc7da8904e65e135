"""LaunchInfo: this process's place in its job; the launchers' variables that tell it, and how values are read."""

from __future__ import annotations

import os
import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import NamedTuple

from ferro.errors import UsageError

_MIN_SECRET_BYTES = 16

Address = tuple[str, int]
"""A host (name or IP address, IPv6 without brackets) and a port."""


@dataclass(frozen=True, slots=True, kw_only=True)
class LaunchInfo:
    """This process's place in its job, and how it finds the other processes."""

    rank: int
    world_size: int
    local_rank: int  # among the processes of the job on this host
    local_world_size: int
    # "ferro", a launcher in `LAUNCHERS`, "arguments" (the caller gave rank or world size), or "single" (no launcher)
    launcher: str
    # A name that all ranks of this job on one host share, and no other job there has. Ranks on other hosts have it too,
    # unless the launcher names no job (Hydra's mpiexec; RANK and WORLD_SIZE set by hand without MASTER_ADDR).
    job: str = ""
    store: Address | None = None  # where a store runs already
    master: Address | None = None  # where rank 0 is to host the store
    master_port_taken: bool = False  # torchrun's agent listens on the master's port itself
    master_derived: bool = False  # nobody named the master: it is the first node of the scheduler's list
    secret: bytes | None = field(default=None, repr=False)
    provenance: tuple[tuple[str, str], ...] = ()  # (attribute, variable or argument that it came from), for messages

    def describe(self) -> str:
        """Format rank, world size and the local pair, each with its source, for messages."""
        return (
            f"rank {self.rank} of {self.world_size} ({self._source('rank', 'world_size')}), "
            f"local rank {self.local_rank} of {self.local_world_size} "
            f"({self._source('local_rank', 'local_world_size')})"
        )

    def _source(self, *names: str) -> str:
        sources = dict(self.provenance)
        return "from " + ", ".join(dict.fromkeys(sources.get(name, "nowhere") for name in names))


class LauncherVariables(NamedTuple):
    """The names of the variables of one launcher; `schedulers.completed` adds those that it computes."""

    launcher: str
    rank: str
    world_size: str
    local_rank: str = ""
    local_world_size: str = ""
    per_node: bool = False  # the numbers count nodes or pods, each with one process: a rank, or a launcher of its own


_OMPI = "OMPI_COMM_WORLD_"
# A launcher stands before those that may start it. "torchrun" is called "ferro" where FERRO_STORE is set.
LAUNCHERS = (
    LauncherVariables("torchrun", "RANK", "WORLD_SIZE", "LOCAL_RANK", "LOCAL_WORLD_SIZE"),
    LauncherVariables("openmpi", f"{_OMPI}RANK", f"{_OMPI}SIZE", f"{_OMPI}LOCAL_RANK", f"{_OMPI}LOCAL_SIZE"),
    LauncherVariables("mpich", "PMI_RANK", "PMI_SIZE", "MPI_LOCALRANKID", "MPI_LOCALNRANKS"),
    LauncherVariables("slurm", "SLURM_PROCID", "SLURM_NTASKS", "SLURM_LOCALID", "SLURM_STEP_TASKS_PER_NODE"),
    LauncherVariables(
        "flux", "FLUX_TASK_RANK", "FLUX_JOB_SIZE", "FLUX_TASK_LOCAL_ID", "FLUX_JOB_SIZE / FLUX_JOB_NNODES"
    ),
    LauncherVariables("pbs", "PBS_VNODENUM", "PBS_NP", "earlier tasks of this host", "tasks of this host"),
    LauncherVariables("kubeflow", "PET_NODE_RANK", "PET_NNODES", per_node=True),
    LauncherVariables("skypilot", "SKYPILOT_NODE_RANK", "SKYPILOT_NUM_NODES", per_node=True),
    LauncherVariables("leaderworkerset", "LWS_WORKER_INDEX", "LWS_GROUP_SIZE", per_node=True),
    LauncherVariables("jobset", "JOB_COMPLETION_INDEX", "NNODES", per_node=True),
)


class SourcedInt(NamedTuple):
    """A whole number, and the variable or argument that it came from."""

    value: int
    source: str

    def __str__(self) -> str:
        """Format the number as its user wrote it: "RANK=3", "rank=3", or "3 (assumed, …)"."""
        if self.source.startswith("assumed"):
            return f"{self.value} ({self.source})"
        return f"{self.source.removesuffix('=')}={self.value}"


def integer(env: Mapping[str, str], name: str) -> SourcedInt:
    text = env[name]
    if not re.fullmatch(r"-?[0-9]{1,18}", text):
        raise UsageError(f"{name}={text!r} is not a whole number; correct it, or unset it")
    return SourcedInt(int(text), name)


def parse_address(text: str, *, source: str) -> Address:
    """Parse "host:port", or "[::1]:29500" for IPv6; an error names the variable or argument that is the source."""
    match = re.fullmatch(r"(?:\[([^\[\]]+)\]|([^\[\]:\s]+)):([0-9]{1,5})", text)
    if match is None or not 0 < int(match[3]) < 65536:
        raise UsageError(
            f"{source}={text!r} is not an address; write host:port with a port from 1 to 65535, "
            "and an IPv6 address in brackets, as in [::1]:29500"
        )
    return match[1] or match[2], int(match[3])


def format_address(address: Address) -> str:
    """Format an address as `parse_address` reads it."""
    host, port = address
    return f"[{host}]:{port}" if ":" in host else f"{host}:{port}"


def address_pair(env: Mapping[str, str], host: str, port: str) -> Address:
    """Read an address from one variable with the host and one with the port."""
    for name, other in ((host, port), (port, host)):
        if not env.get(name):
            raise UsageError(
                f"{other}={env.get(other, '')!r} is set, but {name} is not; "
                "set both to where rank 0 can be reached, or unset both"
            )
    number = integer(env, port).value
    if not 0 < number < 65536:
        raise UsageError(f"{port}={number} is not a port; set one from 1 to 65535")
    return env[host].strip("[]"), number


def read_secret(env: Mapping[str, str] = os.environ) -> bytes | None:
    """Read the job's secret from FERRO_SECRET; None where it is not set. An error does not show it."""
    text = env.get("FERRO_SECRET")
    if text is None:
        return None
    # bytes.fromhex would allow white space between the digits.
    if not re.fullmatch(rf"(?:[0-9a-fA-F]{{2}}){{{_MIN_SECRET_BYTES},}}", text):
        raise UsageError(
            f"FERRO_SECRET is not at least {2 * _MIN_SECRET_BYTES} hexadecimal digits, two for "
            "each byte; make one with: python -c 'import secrets; print(secrets.token_hex(32))'"
        )
    return bytes.fromhex(text)
