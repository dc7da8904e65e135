"""The families of variables by which launchers tell a process its rank.

Each family is read whole or not at all: half a family, a value that is no number and two
families that disagree are errors, since guessing would start a job of the wrong size that hangs.

    family            rank, world size              launcher
    ferro, torchrun   RANK, WORLD_SIZE              "ferro" when FERRO_STORE is set
    Open MPI          OMPI_COMM_WORLD_RANK, _SIZE   "openmpi"
    MPICH, PMI        PMI_RANK, PMI_SIZE            "mpich"
    Slurm             SLURM_PROCID, SLURM_NTASKS    "slurm", only within a step that srun started
    Kubeflow          PET_NODE_RANK, PET_NNODES     "kubeflow", only with one process per node

A Slurm step or a Kubeflow node with one process each often starts a launcher of its own there
(`srun --ntasks-per-node=1 torchrun …`). Its variables then count launchers, not ranks: they are
left aside when a family before it in the table knows its local world size.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass

from ferro.errors import UsageError
from ferro.runtime.environment.number import Found, integer

_FIRST_RESERVED_SLURM_STEP = 0xFFFFFFF0  # from here on: batch script, interactive shell, extern


@dataclass(frozen=True, slots=True)
class Family:
    """The variables of one launcher."""

    launcher: str
    rank: str
    world_size: str
    local_rank: str
    local_world_size: str


@dataclass(frozen=True, slots=True)
class Claim:
    """What one family says; `rank` and `world_size` are the arguments' where those are given."""

    launcher: str
    rank: Found
    world_size: Found
    local_rank: Found | None
    local_world_size: Found | None

    def counts_nodes(self) -> bool:
        """Whether this launcher started one process per node, maybe a launcher itself."""
        size = self.local_world_size
        return self.launcher in ("slurm", "kubeflow") and size is not None and size.value == 1


_RANKS = Family("torchrun", "RANK", "WORLD_SIZE", "LOCAL_RANK", "LOCAL_WORLD_SIZE")
_OPENMPI = Family(
    "openmpi",
    "OMPI_COMM_WORLD_RANK",
    "OMPI_COMM_WORLD_SIZE",
    "OMPI_COMM_WORLD_LOCAL_RANK",
    "OMPI_COMM_WORLD_LOCAL_SIZE",
)
_MPICH = Family("mpich", "PMI_RANK", "PMI_SIZE", "MPI_LOCALRANKID", "MPI_LOCALNRANKS")
_SLURM = Family("slurm", "SLURM_PROCID", "SLURM_NTASKS", "SLURM_LOCALID", "SLURM_STEP_TASKS_PER_NODE")
_KUBEFLOW = Family("kubeflow", "PET_NODE_RANK", "PET_NNODES", "", "PET_NPROC_PER_NODE")
FAMILIES = (_RANKS, _OPENMPI, _MPICH, _SLURM, _KUBEFLOW)


def agreed_claim(env: Mapping[str, str], rank: int | None, world_size: int | None) -> Claim | None:
    """The first family's claim, after checking that the others do not contradict it."""
    claims = [claim for family in FAMILIES if (claim := _read(family, env, rank, world_size))]
    if not claims:
        return None
    first = claims[0]
    for other in claims[1:]:
        if other.counts_nodes() and first.local_world_size is not None:
            continue
        for ours, theirs in ((first.rank, other.rank), (first.world_size, other.world_size)):
            if ours.value != theirs.value:
                raise UsageError(
                    f"two launchers disagree: {ours.source}={ours.value}, but "
                    f"{theirs.source}={theirs.value}; unset the variables of the one that did "
                    "not start this process, or pass rank= and world_size="
                )
    return first


def _read(family: Family, env: Mapping[str, str], rank: int | None, world_size: int | None) -> Claim | None:
    """One family's claim, or None where this launcher did not start this process."""
    if not _speaks(family, env):
        return None
    given = {family.rank: rank, family.world_size: world_size}
    for name, other in ((family.rank, family.world_size), (family.world_size, family.rank)):
        if given[name] is None and name not in env:
            there = [n for n in (other, family.local_rank, family.local_world_size) if n in env]
            raise UsageError(
                f"{name} is not set, but {' and '.join(there) or 'FERRO_STORE'} "
                f"{'are' if len(there) > 1 else 'is'}: the launcher's variables are incomplete; "
                f"set {name}, unset the others, or pass rank= and world_size="
            )
    overridden = any(v is not None and env.get(n) != str(v) for n, v in given.items())
    launcher = family.launcher
    if overridden:
        launcher = "arguments"
    elif family is _RANKS and "FERRO_STORE" in env:
        launcher = "ferro"
    # A local rank belongs to the rank beside it: of no use once that was replaced.
    local_rank, local_size = (None, None) if overridden else _local_pair(family, env)
    return Claim(
        launcher,
        integer(env, family.rank) if rank is None else Found(rank, "rank="),
        integer(env, family.world_size) if world_size is None else Found(world_size, "world_size="),
        local_rank,
        local_size,
    )


def _speaks(family: Family, env: Mapping[str, str]) -> bool:
    """Whether a family's variables are about this process."""
    if family is _KUBEFLOW:
        # For any other count per node they are about the launcher on this node.
        return env.get("PET_NPROC_PER_NODE") == "1" and "PET_NODE_RANK" in env
    if family is _SLURM:
        # A batch script or a shell within an allocation sees the allocation's numbers, yet is
        # one process: only what srun started belongs to a step with an ordinary number.
        step = env.get("SLURM_STEP_ID", "")
        in_step = step.isdecimal() and int(step) < _FIRST_RESERVED_SLURM_STEP
        return in_step and "SLURM_PROCID" in env
    names = [family.rank, family.world_size, family.local_rank, family.local_world_size]
    if family is _RANKS:
        names.append("FERRO_STORE")
    return any(name in env for name in names)


def _local_pair(family: Family, env: Mapping[str, str]) -> tuple[Found | None, Found | None]:
    """Local rank and local world size, each where the family gives it."""
    if family is _KUBEFLOW:
        return Found(0, "PET_NPROC_PER_NODE"), Found(1, "PET_NPROC_PER_NODE")
    local_rank = integer(env, family.local_rank) if family.local_rank in env else None
    if family is _SLURM:
        return local_rank, _slurm_tasks_here(env)
    has_size = family.local_world_size in env
    return local_rank, integer(env, family.local_world_size) if has_size else None


def _slurm_tasks_here(env: Mapping[str, str]) -> Found | None:
    """Tasks of the step on this node; Slurm writes lists such as "2(x3),1", by node."""
    name = "SLURM_STEP_TASKS_PER_NODE"
    if name not in env:
        name = "SLURM_NTASKS_PER_NODE"
        return integer(env, name) if name in env else None
    counts: list[tuple[int, int]] = []
    for part in env[name].split(","):
        match = re.fullmatch(r"([0-9]+)(?:\(x([0-9]+)\))?", part)
        if match is None:
            raise UsageError(f"{name}={env[name]!r} is not a list such as 2(x3),1; unset it")
        counts.append((int(match[1]), int(match[2] or 1)))
    node = integer(env, "SLURM_NODEID").value if "SLURM_NODEID" in env else 0
    for tasks, nodes in counts:
        if node < nodes:
            return Found(tasks, name)
        node -= nodes
    raise UsageError(f"{name}={env[name]!r} has no entry for SLURM_NODEID={env['SLURM_NODEID']}")
