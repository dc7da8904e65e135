"""Tell a rank from a helper program that it started, which has inherited the variables that make a rank.

A rank that has joined marks its environment. For the time before it joins, this process's ancestors are looked at, on
Linux: a program in Python with NumPy that the same launcher's variables started is the rank itself, and other programs,
such as a shell or `uv run`, merely start the rank.
"""

from __future__ import annotations

import os
import sys
from contextlib import suppress

from ferro.errors import UsageError
from ferro.runtime.environment.launch_info import LaunchInfo

_MARK = "FERRO_RANK_PROCESS"  # the process that is a rank, and which rank of which job
_OF_LAUNCHERS = ("RANK", "WORLD_SIZE", "MASTER_", "FERRO_STORE", "OMPI_COMM_", "PMI", "SLURM_", "PET_")
_MAX_ANCESTORS = 64  # a bound for a /proc that changes while it is read


def check_not_inherited(info: LaunchInfo) -> None:
    """Raise UsageError where another living process is the rank that this process would be."""
    if info.world_size == 1:
        return
    pid, _, rank = os.environ.get(_MARK, "").partition(" ")
    owner = int(pid) if rank == _identity(info) and int(pid) != os.getpid() and _is_alive(int(pid)) else None
    multiprocessing = sys.modules.get("multiprocessing.process")
    if owner is None and (multiprocessing is None or multiprocessing.parent_process() is None):
        owner = _ancestor_of_same_rank()  # a child of multiprocessing runs the program's own code
    if owner is not None:
        raise UsageError(
            f"this process (pid {os.getpid()}) has inherited the variables of {info.describe()} from process {owner}, "
            "which is that rank and started this one. For a world of its own call ferro.init(rank=0, world_size=1) "
            f"here, or start it without the variables RANK and WORLD_SIZE (or the launcher's own) and {_MARK}. If this "
            "process shall be the rank, replace the other by it (os.execv)."
        )


def mark_rank(info: LaunchInfo) -> None:
    """Mark this process, in the environment of programs that it starts, as the rank; see `unmark_rank`."""
    if info.world_size > 1:
        os.environ[_MARK] = f"{os.getpid()} {_identity(info)}"


def unmark_rank() -> None:
    os.environ.pop(_MARK, None)


def _identity(info: LaunchInfo) -> str:
    return f"{info.rank}/{info.world_size} {info.store or info.master or info.job}"


def _is_alive(pid: int) -> bool:
    with suppress(PermissionError):
        try:
            os.kill(pid, 0)
        except ProcessLookupError:
            return False
    return True


def _ancestor_of_same_rank() -> int | None:
    """Find the nearest ancestor with the same launcher's variables that is a program in Python with NumPy."""
    entries = {f"{name}={value}".encode() for name, value in os.environ.items() if name.startswith(_OF_LAUNCHERS)}
    pid = os.getppid()
    for _ in range(_MAX_ANCESTORS):
        try:
            if not entries or not entries <= set(_read(pid, "environ").split(b"\0")):
                return None
            # A process that was forked has the same vector: the ancestor's own program chose it as the rank.
            if b"_multiarray_umath" in _read(pid, "maps") and _read(pid, "auxv") != _read(os.getpid(), "auxv"):
                return pid
            pid = int(_read(pid, "stat").rpartition(b")")[2].split()[1])
        except (OSError, ValueError):
            return None
    return None


def _read(pid: int, name: str) -> bytes:
    with open(f"/proc/{pid}/{name}", "rb") as file:
        return file.read()
