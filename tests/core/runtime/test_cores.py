"""The cores that a process may use: its affinity, and the CPU quotas of its cgroups, in files as Linux writes them."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from ferro.runtime.environment import resolve, thread_advice, usable_cores, usable_cores_together

AFFINITY = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
VERSION_1 = "32 31 0:29 {root} {mount} rw,relatime shared:9 - cgroup cgroup rw,cpu,cpuacct\n"
VERSION_2 = "41 31 0:38 {root} {mount} rw,relatime - cgroup2 cgroup2 rw\n"


@pytest.fixture(autouse=True)
def many_cores(monkeypatch: pytest.MonkeyPatch) -> None:
    """Let the quotas decide, whatever machine this is."""
    monkeypatch.setattr(os, "sched_getaffinity", lambda _: set(range(16)), raising=False)


def cores(tmp_path: Path, mounts: str, groups: str, files: dict[str, str], root: str = "/") -> int:
    for name, content in files.items():
        path = tmp_path / "fs" / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(content + "\n")
    (tmp_path / "cgroup").write_text(groups)
    (tmp_path / "mountinfo").write_text(mounts.format(root=root, mount=tmp_path / "fs"))
    return usable_cores(proc=tmp_path)


@pytest.mark.parametrize(
    ("groups", "files", "expected"),
    [
        ("0::/\n", {"cpu.max": "max 100000"}, 16),
        ("0::/\n", {"cpu.max": "200000 100000"}, 2),
        ("0::/\n", {"cpu.max": "150000 100000"}, 1),
        ("0::/\n", {"cpu.max": "20000 100000"}, 1),
        # the strictest of the own group and of those around it
        ("0::/pod/run\n", {"pod/run/cpu.max": "max 100000", "pod/cpu.max": "300000 100000"}, 3),
        ("0::/pod/run\n", {"pod/run/cpu.max": "800000 100000", "pod/cpu.max": "400000 50000", "cpu.max": "max 1"}, 8),
        ("0::/pod\n", {"cpu.max": "max 100000", "other/cpu.max": "100000 100000"}, 16),
        # a process of which the group is outside of what is mounted here
        ("0::/../elsewhere\n", {"cpu.max": "500000 100000"}, 5),
        ("0::/pod\n", {"cpu.max": "no number"}, 16),
        ("0::/pod\n", {}, 16),
    ],
)
def test_version_2(tmp_path: Path, groups: str, files: dict[str, str], expected: int) -> None:
    assert cores(tmp_path, VERSION_2, groups, files) == expected


@pytest.mark.parametrize(
    ("groups", "root", "files", "expected"),
    [
        ("3:memory:/m\n1:cpu,cpuacct:/\n0::/\n", "/", {"cpu.cfs_quota_us": "-1", "cpu.cfs_period_us": "100000"}, 16),
        ("1:cpu,cpuacct:/a\n", "/", {"a/cpu.cfs_quota_us": "200000", "a/cpu.cfs_period_us": "100000"}, 2),
        ("1:cpu,cpuacct:/a/b\n", "/", {"a/cpu.cfs_quota_us": "350000", "a/cpu.cfs_period_us": "50000"}, 7),
        # a container whose part of the tree is mounted, and that sees the host's names
        ("1:cpu,cpuacct:/docker/c1\n", "/docker/c1", {"cpu.cfs_quota_us": "4", "cpu.cfs_period_us": "1"}, 4),
        ("1:memory:/a\n", "/", {"a/cpu.cfs_quota_us": "2", "a/cpu.cfs_period_us": "1"}, 16),
    ],
)
def test_version_1(tmp_path: Path, groups: str, root: str, files: dict[str, str], expected: int) -> None:
    assert cores(tmp_path, VERSION_1, groups, files, root) == expected


def test_both_versions_are_mounted(tmp_path: Path) -> None:
    files = {"cpu.max": "600000 100000", "a/cpu.cfs_quota_us": "2", "a/cpu.cfs_period_us": "1"}
    assert cores(tmp_path, VERSION_1 + VERSION_2, "1:cpu,cpuacct:/a\n0::/\n", files) == 2


def test_without_cgroups_the_affinity_counts(tmp_path: Path) -> None:
    assert usable_cores(proc=tmp_path) == 16


def test_this_process() -> None:
    assert 1 <= usable_cores() <= max(AFFINITY, 16)


MPICH = {"PMI_RANK": "0", "PMI_SIZE": "4", "MPI_LOCALRANKID": "0", "MPI_LOCALNRANKS": "4"}
FERRO = {"RANK": "0", "WORLD_SIZE": "4", "LOCAL_RANK": "0", "LOCAL_WORLD_SIZE": "4", "FERRO_STORE": "h:1"}


@pytest.mark.parametrize(
    ("environ", "cores", "advised"),
    [
        (MPICH, 16, True),
        (MPICH, 64, False),  # each rank is bound to cores of its own
        (MPICH | {"OMP_NUM_THREADS": "16"}, 16, False),
        (MPICH | {"OPENBLAS_NUM_THREADS": "1"}, 16, False),
        (MPICH | {"PMI_RANK": "1", "MPI_LOCALRANKID": "1"}, 16, False),
        (FERRO, 16, False),
        ({}, 16, False),
    ],
)
def test_advice_on_threads_under_other_launchers(
    environ: dict[str, str], cores: int, advised: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(os, "cpu_count", lambda: cores)
    monkeypatch.setattr("ferro.runtime.environment.cores._quotas", lambda _: [])
    advice = thread_advice(resolve(environ), environ)
    assert ("4 ranks on this host" in advice) == advised
    assert ("OMP_NUM_THREADS=4" in advice) == advised


def test_processes_with_a_core_each_have_all_of_them_together(tmp_path):
    assert usable_cores_together([0, 3, 3, 5], proc=tmp_path) == 3
    assert usable_cores_together([], proc=tmp_path) == 1
