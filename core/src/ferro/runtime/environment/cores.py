"""The CPU cores that this process may use: by its affinity, and by the CPU quotas of its control groups (cgroups)."""

from __future__ import annotations

import os
from collections.abc import Collection, Iterator, Mapping
from pathlib import Path, PurePosixPath

from ferro.runtime.environment.launch_info import LaunchInfo

# Each of these limits the threads of a library for linear algebra that NumPy may have been built with.
_THREAD_VARIABLES = (
    *("OMP_NUM_THREADS", "OPENBLAS_NUM_THREADS", "MKL_NUM_THREADS"),
    *("BLIS_NUM_THREADS", "GOTO_NUM_THREADS", "VECLIB_MAXIMUM_THREADS"),
)


def usable_cores(*, proc: Path = Path("/proc/self")) -> int:
    """Count the CPU cores that this process may use, at least one.

    Containers limit the processor time of a group of processes by a quota, which the affinity does not show. A quota of
    one and a half cores counts as one, since two busy threads would wait for the next period again and again.
    """
    return max(1, min([_affinity(), *(int(quota) for quota in _quotas(proc))]))


def usable_cores_together(core_ids: Collection[int], *, proc: Path = Path("/proc/self")) -> int:
    """Count the CPU cores that several processes may use together, at least one.

    Launchers bind each rank to a core of its own: then a rank may use one core, and all ranks together several.

    Args:
        core_ids: the cores that one or more of the processes may use by their affinity.
    """
    return max(1, min([len(set(core_ids)), *(int(quota) for quota in _quotas(proc))]))


def _affinity() -> int:
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def thread_advice(info: LaunchInfo, env: Mapping[str, str] = os.environ) -> str:
    """Advise a host's first rank, in a sentence or "", where its ranks would compute with more threads than cores.

    `ferro run` divides the cores; under other launchers it is too late for that, as NumPy has its threads by now.
    """
    threads, cores = _affinity(), usable_cores()  # libraries know nothing of quotas
    if cores == threads:  # without a quota each rank may be bound to cores of its own
        cores = os.cpu_count() or 1
    crowded = info.local_world_size > 1 and threads > 1 and threads * info.local_world_size > cores
    if info.local_rank or info.launcher == "ferro" or not crowded or any(name in env for name in _THREAD_VARIABLES):
        return ""
    return (
        f"{info.local_world_size} ranks on this host compute with up to {threads} threads each, on {cores} cores; "
        f"start them with OMP_NUM_THREADS={max(1, cores // info.local_world_size)}, as `ferro run` does"
    )


def _quotas(proc: Path) -> Iterator[float]:
    """Read the quotas, in cores, of this process's cgroup and of all that it is nested in, as far as they are seen."""
    for group, mount in _cpu_groups(proc):
        for directory in (group, *group.parents):
            if (quota := _quota(directory)) is not None:
                yield quota
            if directory == mount:
                break


def _quota(directory: Path) -> float | None:
    """Read one cgroup's quota of either version; None where there is none, or the group is out of sight."""
    try:
        if (version_2 := directory / "cpu.max").exists():
            quota, period = version_2.read_text().split()
        else:
            quota, period = ((directory / f"cpu.cfs_{name}_us").read_text().strip() for name in ("quota", "period"))
        return int(quota) / int(period) if quota.isdecimal() and int(period) > 0 else None  # "max" or -1: no limit
    except (OSError, ValueError):
        return None


def _cpu_groups(proc: Path) -> Iterator[tuple[Path, Path]]:
    """Find this process's cgroups that can limit its processor time, each with its mount point."""
    try:
        groups = [line.split(":", 2) for line in (proc / "cgroup").read_text().splitlines()]
        mounts = [line.split(" - ", 1) for line in (proc / "mountinfo").read_text().splitlines()]
        for (_, _, _, root, mount, *_), (kind, *_, options) in ((a.split(), b.split()) for a, b in mounts):
            controller = {"cgroup2": "", "cgroup": "cpu"}.get(kind)
            if controller is None or (controller and controller not in options.split(",")):
                continue
            for _, controllers, name in groups:
                if controller in controllers.split(","):
                    path = PurePosixPath(name)
                    # In a container without a namespace for cgroups the mount shows a part of the tree only.
                    inside = path.relative_to(root) if path.is_relative_to(root) else PurePosixPath()
                    yield Path(mount) / (PurePosixPath() if ".." in inside.parts else inside), Path(mount)
    except (OSError, ValueError):
        return
