"""Recorded environments of schedulers: what `ferro.init` and `ferro run` make of them, and what else is around them."""

from __future__ import annotations

import os
import pty
import subprocess
import sys
import zlib
from pathlib import Path

import pytest

from ferro.errors import UsageError
from ferro.launch.options import parse_options
from ferro.runtime.environment import node_defaults, resolve
from ferro.runtime.environment.schedulers import expand_hosts

SLURM_JOB = {
    "SLURM_JOB_ID": "4711", "SLURM_JOB_NODELIST": "gpu-[1-2]x[0-1]", "SLURM_JOB_NUM_NODES": "4", "SLURM_NNODES": "4",
    "SLURM_NTASKS": "8", "SLURM_NTASKS_PER_NODE": "2", "SLURM_TASKS_PER_NODE": "2(x4)", "SLURM_NODEID": "0",
    "SLURM_PROCID": "0", "SLURM_LOCALID": "0", "SLURM_CLUSTER_NAME": "c", "SLURM_SUBMIT_HOST": "login1",
}  # fmt: skip
SLURM_SCRIPT = SLURM_JOB | {"SLURM_STEP_ID": "4294967291"}
SLURM_STEP = SLURM_JOB | {
    "SLURM_STEP_ID": "0", "SLURM_STEP_NODELIST": "gpu-[1-2]x[0-1]", "SLURM_STEP_NUM_NODES": "4",
    "SLURM_STEP_NUM_TASKS": "8", "SLURM_STEP_TASKS_PER_NODE": "2(x4)", "SLURMD_NODENAME": "gpu-2x0",
    "SLURM_NODEID": "2", "SLURM_PROCID": "5", "SLURM_LOCALID": "1", "SLURM_GTIDS": "4,5",
}  # fmt: skip
# the second of two steps in the same allocation, on its last two nodes, one task each
SLURM_SECOND_STEP = SLURM_STEP | {
    "SLURM_STEP_ID": "1", "SLURM_STEP_NODELIST": "gpu-2x[0-1]", "SLURM_STEP_NUM_NODES": "2", "SLURM_NNODES": "2",
    "SLURM_NTASKS": "2", "SLURM_STEP_NUM_TASKS": "2", "SLURM_STEP_TASKS_PER_NODE": "1(x2)", "SLURM_NODEID": "1",
    "SLURM_PROCID": "1", "SLURM_LOCALID": "0", "SLURM_GTIDS": "1",
}  # fmt: skip
SLURM_ONE_NODE = SLURM_STEP | {
    "SLURM_STEP_NODELIST": "gpu-1x0", "SLURM_NNODES": "1", "SLURM_NTASKS": "4", "SLURM_STEP_TASKS_PER_NODE": "4",
    "SLURM_NODEID": "0", "SLURM_PROCID": "3", "SLURM_LOCALID": "3",
}  # fmt: skip
# srun -n 2 : -n 4, the first task of the second component
SLURM_HET = {
    "SLURM_JOB_ID": "124", "SLURM_JOB_ID_HET_GROUP_0": "123", "SLURM_HET_SIZE": "2", "SLURM_STEP_ID": "0",
    "SLURM_JOB_NODELIST_HET_GROUP_0": "cpu07", "SLURM_JOB_NODELIST_HET_GROUP_1": "gpu[01-02]",
    "SLURM_STEP_NODELIST": "cpu07,gpu[01-02]", "SLURM_NNODES": "3", "SLURM_NTASKS": "6", "SLURM_PROCID": "2",
    "SLURM_LOCALID": "0", "SLURM_NODEID": "1", "SLURM_STEP_TASKS_PER_NODE": "2(x2)", "SLURM_GTIDS": "0,1",
}  # fmt: skip
SLURM_PACK = {name.replace("_HET_", "_PACK_"): value for name, value in SLURM_HET.items()} | {
    "SLURM_STEP_NODELIST": "gpu[01-02]"  # that of the component
}
FLUX = {
    "FLUX_JOB_ID": "f2oLkTLb", "FLUX_JOB_SIZE": "8", "FLUX_JOB_NNODES": "2", "FLUX_TASK_RANK": "5",
    "FLUX_TASK_LOCAL_ID": "1", "FLUX_KVS_NAMESPACE": "job-1", "FLUX_URI": "local:///run/flux/local",
}  # fmt: skip
PBS = {
    "PBS_JOBID": "1672.mgt1", "PBS_NODENUM": "1", "PBS_VNODENUM": "3", "PBS_TASKNUM": "4", "PBS_JOBNAME": "train",
    "PBS_ENVIRONMENT": "PBS_BATCH", "PBS_MOMPORT": "15003",
}  # fmt: skip
SKYPILOT = {
    "SKYPILOT_NODE_RANK": "1", "SKYPILOT_NODE_IPS": "10.0.0.4\n10.0.0.5", "SKYPILOT_NUM_NODES": "2",
    "SKYPILOT_TASK_ID": "sky-2026-11-02-09-00-00-000000_c_1", "SKYPILOT_NUM_GPUS_PER_NODE": "0",
}  # fmt: skip
LWS = {"LWS_LEADER_ADDRESS": "train-0.train.default", "LWS_GROUP_SIZE": "3", "LWS_WORKER_INDEX": "2"}
JOBSET = {
    "JOBSET_NAME": "train", "REPLICATED_JOB_NAME": "workers", "JOB_COMPLETION_INDEX": "1", "NNODES": "4",
    "KUBERNETES_SERVICE_HOST": "10.96.0.1",
}  # fmt: skip
# two Jobs of two pods each
JOBSET_OF_JOBS = JOBSET | {"GLOBAL_REPLICAS": "2", "JOB_GLOBAL_INDEX": "1", "JOB_INDEX": "1"}
JOBSET_OF_SINGLE_PODS = {
    "JOBSET_NAME": "train", "REPLICATED_JOB_NAME": "workers", "JOB_COMPLETION_INDEX": "0", "JOB_GLOBAL_INDEX": "3",
    "GLOBAL_REPLICAS": "4",
}  # fmt: skip
MPICH = {"PMI_RANK": "1", "PMI_SIZE": "2", "MPI_LOCALRANKID": "1", "MPI_LOCALNRANKS": "2"}
OPENMPI = {
    "OMPI_COMM_WORLD_RANK": "3", "OMPI_COMM_WORLD_SIZE": "4", "OMPI_COMM_WORLD_LOCAL_RANK": "1",
    "OMPI_COMM_WORLD_LOCAL_SIZE": "2", "PMIX_NAMESPACE": "prterun-n01-77@1",
}  # fmt: skip
TORCHRUN = {
    "RANK": "5", "WORLD_SIZE": "8", "LOCAL_RANK": "1", "LOCAL_WORLD_SIZE": "4", "MASTER_ADDR": "n01",
    "MASTER_PORT": "29500",
}  # fmt: skip
KUBEFLOW = {"PET_NODE_RANK": "1", "PET_NNODES": "2", "PET_NPROC_PER_NODE": "1"}
PET = KUBEFLOW | {"PET_MASTER_ADDR": "trainer-0", "PET_MASTER_PORT": "29400"}

FLUX_NUMBER, SKYPILOT_NUMBER = (zlib.crc32(job.encode()) for job in (FLUX["FLUX_JOB_ID"], SKYPILOT["SKYPILOT_TASK_ID"]))
ALONE = ("single", 0, 1, 0, 1, None)


@pytest.fixture
def nodefile(tmp_path: Path) -> str:
    path = tmp_path / "nodes"
    path.write_text("n03\nn03\nn07\nn07\n")
    return str(path)


@pytest.mark.parametrize(
    ("environ", "expected"),
    [
        (SLURM_STEP, ("slurm", 5, 8, 1, 2, ("gpu-1x0", 20000 + 64 * 4711 % 11987))),
        (SLURM_SECOND_STEP, ("slurm", 1, 2, 0, 1, ("gpu-2x0", 20000 + (64 * 4711 + 1) % 11987))),
        (SLURM_ONE_NODE, ("slurm", 3, 4, 3, 4, None)),
        ({n: v for n, v in SLURM_STEP.items() if n != "SLURM_STEP_NODELIST"},
         ("slurm", 5, 8, 1, 2, ("gpu-1x0", 20000 + 64 * 4711 % 11987))),
        (SLURM_STEP | {"MASTER_PORT": "1234"}, ("slurm", 5, 8, 1, 2, ("gpu-1x0", 1234))),
        (SLURM_STEP | {"MASTER_PORT": "1234", "FERRO_MASTER_PORT": "77"}, ("slurm", 5, 8, 1, 2, ("gpu-1x0", 77))),
        (SLURM_STEP | {"MASTER_ADDR": "ib0"}, ("slurm", 5, 8, 1, 2, ("ib0", 20000 + 64 * 4711 % 11987))),
        (SLURM_STEP | {"MASTER_ADDR": "n9", "MASTER_PORT": "1"}, ("slurm", 5, 8, 1, 2, ("n9", 1))),
        (SLURM_HET, ("slurm", 2, 6, 0, 2, ("cpu07", 20000 + 64 * 123 % 11987))),
        (SLURM_PACK, ("slurm", 2, 6, 0, 2, ("cpu07", 20000 + 64 * 123 % 11987))),
        (SLURM_PACK | {"SLURM_NNODES": "2"}, ("slurm", 2, 6, 0, 2, ("gpu01", 20000 + 64 * 123 % 11987))),
        (FLUX, ("flux", 5, 8, 1, 4, ("f1", 20000 + FLUX_NUMBER % 11987))),
        (FLUX | {"FLUX_JOB_NNODES": "1"}, ("flux", 5, 8, 1, 8, None)),
        (FLUX | {"PMI_RANK": "5", "PMI_SIZE": "8"}, ("mpich", 5, 8, 1, 4, ("f1", 20000 + FLUX_NUMBER % 11987))),
        (PBS | {"PBS_NODEFILE": "nodefile"}, ("pbs", 3, 4, 1, 2, ("n03", 20000 + 64 * 1672 % 11987))),
        (SKYPILOT, ("skypilot", 1, 2, 0, 1, ("10.0.0.4", 20000 + SKYPILOT_NUMBER % 11987))),
        ({n: v for n, v in SKYPILOT.items() if n not in ("SKYPILOT_NUM_NODES", "SKYPILOT_TASK_ID")},
         ("skypilot", 1, 2, 0, 1, ("10.0.0.4", 29400))),
        (SKYPILOT | {"SKYPILOT_NODE_IPS": "10.0.0.4", "SKYPILOT_NUM_NODES": "1", "SKYPILOT_NODE_RANK": "0"},
         ("skypilot", 0, 1, 0, 1, None)),
        (LWS, ("leaderworkerset", 2, 3, 0, 1, ("train-0.train.default", 29400))),
        (JOBSET, ("jobset", 1, 4, 0, 1, ("train-workers-0-0.train", 29400))),
        (JOBSET_OF_JOBS, ("jobset", 3, 4, 0, 1, ("train-workers-0-0.train", 29400))),
        (JOBSET_OF_SINGLE_PODS, ("jobset", 3, 4, 0, 1, ("train-workers-0-0.train", 29400))),
        # one process within an allocation
        (SLURM_JOB, ALONE),
        (SLURM_SCRIPT, ALONE),
        (SLURM_JOB | {"SLURM_STEP_ID": "4294967290", "SLURM_PTY_PORT": "34889"}, ALONE),
        (PBS | {"PBS_NODENUM": "0", "PBS_VNODENUM": "0", "PBS_TASKNUM": "1", "PBS_NODEFILE": "nodefile"}, ALONE),
        ({n: v for n, v in FLUX.items() if n != "FLUX_TASK_RANK" and n != "FLUX_TASK_LOCAL_ID"}, ALONE),
        # launchers of ranks inside: they count by themselves
        (SLURM_SCRIPT | MPICH, ("mpich", 1, 2, 1, 2, None)),
        (SLURM_SCRIPT | OPENMPI, ("openmpi", 3, 4, 1, 2, ("gpu-1x0", 20000 + 64 * 4711 % 11987))),
        (SLURM_SECOND_STEP | OPENMPI, ("openmpi", 3, 4, 1, 2, ("gpu-1x0", 20000 + 64 * 4711 % 11987))),
        (SLURM_SECOND_STEP | TORCHRUN, ("torchrun", 5, 8, 1, 4, ("n01", 29500))),
        (SLURM_STEP | {"PMI_RANK": "5", "PMI_SIZE": "8"},
         ("mpich", 5, 8, 1, 2, ("gpu-1x0", 20000 + 64 * 4711 % 11987))),
        (PBS | MPICH | {"PBS_NODEFILE": "nodefile"}, ("mpich", 1, 2, 1, 2, None)),
        (PBS | OPENMPI | {"PBS_NODEFILE": "nodefile"},
         ("openmpi", 3, 4, 1, 2, ("n03", 20000 + 64 * 1672 % 11987))),
        (PBS | OPENMPI | {"PBS_NODEFILE": "elsewhere"}, ("openmpi", 3, 4, 1, 2, None)),
        (FLUX | MPICH, ("mpich", 1, 2, 1, 2, None)),
        (SKYPILOT | TORCHRUN, ("torchrun", 5, 8, 1, 4, ("n01", 29500))),
        (LWS | TORCHRUN, ("torchrun", 5, 8, 1, 4, ("n01", 29500))),
        (JOBSET | TORCHRUN, ("torchrun", 5, 8, 1, 4, ("n01", 29500))),
        (PET | TORCHRUN, ("torchrun", 5, 8, 1, 4, ("n01", 29500))),
        (PET | {"JOB_COMPLETION_INDEX": "1"}, ("kubeflow", 1, 2, 0, 1, ("trainer-0", 29400))),
        (JOBSET | MPICH, ("mpich", 1, 2, 1, 2, None)),
        # RANK and WORLD_SIZE by hand, from the scheduler's numbers or for several processes on each node
        (SLURM_STEP | {"RANK": "5", "WORLD_SIZE": "8"},
         ("slurm", 5, 8, 1, 2, ("gpu-1x0", 20000 + 64 * 4711 % 11987))),
        (SLURM_SECOND_STEP | {"RANK": "3", "WORLD_SIZE": "4", "MASTER_ADDR": "n1", "MASTER_PORT": "5"},
         ("torchrun", 3, 4, 0, 1, ("n1", 5))),
        (PET | {"RANK": "1", "WORLD_SIZE": "2"}, ("kubeflow", 1, 2, 0, 1, ("trainer-0", 29400))),
    ],
)  # fmt: skip
def test_place_and_address(
    environ: dict[str, str], expected: tuple[object, ...], nodefile: str, flux: dict[str, str]
) -> None:
    environ = flux | environ
    if environ.get("PBS_NODEFILE") == "nodefile":
        environ["PBS_NODEFILE"] = nodefile
    info = resolve(environ)
    found = (info.launcher, info.rank, info.world_size, info.local_rank, info.local_world_size, info.master)
    assert found == expected


@pytest.fixture
def flux(tmp_path: Path) -> dict[str, str]:
    """A `flux` that lists two hosts."""
    program = tmp_path / "bin" / "flux"
    program.parent.mkdir()
    program.write_text('#!/bin/sh\ntest "$1 $4" = "hostlist local" && printf "f1\\nf2\\n"\n')
    program.chmod(0o755)
    return {"PATH": f"{program.parent}:{os.environ['PATH']}"}


@pytest.mark.parametrize(
    ("environ", "expected"),
    [
        (SLURM_SECOND_STEP, (2, 1, "gpu-2x0")),
        ({n: v for n, v in SLURM_SECOND_STEP.items() if n != "SLURM_NNODES"}, (2, 1, "gpu-2x0")),
        (SLURM_HET | {"SLURM_NTASKS": "3", "SLURM_PROCID": "1", "SLURM_STEP_TASKS_PER_NODE": "1(x2)",
                      "SLURM_GTIDS": "0"}, (3, 1, "cpu07")),
        (FLUX | {"FLUX_JOB_SIZE": "2", "FLUX_TASK_RANK": "1"}, (2, 1, "f1")),
        (SKYPILOT, (2, 1, "10.0.0.4")),
        (LWS, (3, 2, "train-0.train.default")),
        (JOBSET, (4, 1, "train-workers-0-0.train")),
        (PET | SKYPILOT, (2, 1, "trainer-0")),
        # several launchers on a node, a batch script, a step of one task: each launcher is alone
        (SLURM_STEP, (None, None, None)),
        (SLURM_STEP | {"SLURM_NTASKS": "4", "SLURM_STEP_TASKS_PER_NODE": "2,1(x2)", "SLURM_NNODES": "3"},
         (None, None, None)),
        (SLURM_SCRIPT, (None, None, None)),
        (SLURM_ONE_NODE | {"SLURM_NTASKS": "1", "SLURM_PROCID": "0", "SLURM_STEP_TASKS_PER_NODE": "1"},
         (None, None, None)),
        (FLUX, (None, None, None)),
        ({}, (None, None, None)),
    ],
)  # fmt: skip
def test_a_launcher_on_each_node(environ: dict[str, str], expected: tuple[object, ...], flux: dict[str, str]) -> None:
    found = node_defaults(flux | environ)
    assert (found.nnodes, found.node_rank, found.endpoint and found.endpoint[0]) == expected


def test_pbsdsh_with_one_task_on_each_node(tmp_path: Path) -> None:
    (tmp_path / "nodes").write_text("n03\nn07\n")
    found = node_defaults(
        {"PBS_JOBID": "5.m", "PBS_NODENUM": "1", "PBS_TASKNUM": "1", "PBS_NODEFILE": str(tmp_path / "nodes")}
    )
    assert found[:2] == (2, 1)
    assert found.endpoint == ("n03", 20000 + 64 * 5)
    assert node_defaults(PBS | {"PBS_NODEFILE": "elsewhere"})[:2] == (None, 3)  # not a job of one node


def test_options_beat_the_scheduler(tmp_path: Path) -> None:
    program = str(tmp_path / "p.py")
    Path(program).touch()
    both = parse_options(["-n", "4", program], SKYPILOT)
    assert (both.nnodes, both.node_rank, both.world_size) == (2, 1, 8)
    alone = parse_options(["--nnodes", "1", program], SKYPILOT)
    assert (alone.nnodes, alone.node_rank) == (1, 0)
    other = parse_options(["--rdzv-endpoint", "h:1", "--node-rank", "0", program], SKYPILOT)
    assert (other.node_rank, other.endpoint) == (0, ("h", 1))
    unnumbered = {name: value for name, value in JOBSET.items() if name != "NNODES"}
    with pytest.raises(UsageError, match=r"this is node 1 by the scheduler, .* give --nnodes"):
        parse_options([program], unnumbered)
    given = parse_options(["--nnodes", "2", program], unnumbered)
    assert (given.nnodes, given.node_rank, given.endpoint) == (2, 1, ("train-workers-0-0.train", 29400))
    assert parse_options(["--nnodes", "1", program], unnumbered).node_rank == 0
    three = parse_options(["--nnodes", "3", "--node-rank", "2", program], SKYPILOT)
    assert (three.nnodes, three.node_rank) == (3, 2)


@pytest.mark.parametrize(
    ("environ", "words"),
    [
        (SLURM_STEP | TORCHRUN | {"RANK": "1"}, ["RANK=1", "SLURM_PROCID=5"]),
        (SLURM_STEP | {"RANK": "3", "WORLD_SIZE": "8"}, ["RANK=3", "SLURM_PROCID=5"]),
        (SLURM_SECOND_STEP | {"RANK": "0", "WORLD_SIZE": "4"}, ["RANK=0", "SLURM_PROCID=1"]),
        (SLURM_STEP | {"SLURM_STEP_NODELIST": "n[1-"}, ["SLURM_STEP_NODELIST='n[1-'", "n[01-03,07]"]),
        (SLURM_STEP | {"SLURM_STEP_NODELIST": "n[a-b]"}, ["SLURM_STEP_NODELIST='n[a-b]'"]),
        (SLURM_STEP | {"MASTER_PORT": "http"}, ["MASTER_PORT='http'"]),
        (LWS | {"LWS_WORKER_INDEX": "x"}, ["LWS_WORKER_INDEX='x'"]),
        (LWS | {"LWS_WORKER_INDEX": "3"}, ["LWS_WORKER_INDEX=3", "LWS_GROUP_SIZE=3"]),
        ({"LWS_WORKER_INDEX": "0"}, ["LWS_GROUP_SIZE is not set", "LWS_WORKER_INDEX is"]),
        ({n: v for n, v in JOBSET.items() if n != "NNODES"}, ["NNODES is not set", "JOB_COMPLETION_INDEX is"]),
        (PBS, ["PBS_NP is not set", "PBS_VNODENUM is"]),
    ],
)  # fmt: skip
def test_contradictions_are_named(environ: dict[str, str], words: list[str]) -> None:
    with pytest.raises(UsageError) as caught:
        resolve(environ)
    for word in words:
        assert word in str(caught.value)


@pytest.mark.parametrize(
    ("text", "hosts"),
    [
        ("n01", ["n01"]),
        ("n[01-03,07],gpu-[1-2]x[0-1]", ["n01", "n02", "n03", "n07", "gpu-1x0", "gpu-1x1", "gpu-2x0", "gpu-2x1"]),
        ("n[8-11]", ["n8", "n9", "n10", "n11"]),
        ("a,b.example.com,c[1]", ["a", "b.example.com", "c1"]),
        ("r[1-2]n[01-02]-ib", ["r1n01-ib", "r1n02-ib", "r2n01-ib", "r2n02-ib"]),
        ("", []),
    ],
)
def test_lists_of_hosts(text: str, hosts: list[str]) -> None:
    assert expand_hosts(text, "X") == hosts


@pytest.mark.parametrize("text", ["n[", "n]", "n[]", "n[1-]", "n[3-1]", "n[1,x]", "n[[1-2]]", "n[1-999999999]"])
def test_what_is_no_list_of_hosts_is_named(text: str) -> None:
    with pytest.raises(UsageError, match=r"X='n.*n\[01-03,07\]"):
        expand_hosts(text, "X")


def test_jobs_and_steps_that_share_a_node_have_ports_of_their_own() -> None:
    ports = set()
    for job in range(4_000_000, 4_000_100):
        for step in range(8):
            master = resolve(SLURM_STEP | {"SLURM_JOB_ID": str(job), "SLURM_STEP_ID": str(step)}).master
            assert master is not None
            assert 20000 <= master[1] < 32000
            ports.add(master[1])
    assert len(ports) == 800


def test_all_ranks_of_a_job_agree_on_its_address_and_name() -> None:
    others = SLURM_HET | {"SLURM_JOB_ID": "123", "SLURM_PROCID": "0", "SLURM_NODEID": "0", "SLURM_GTIDS": "0,1"}
    first, second = resolve(others), resolve(SLURM_HET)
    assert (first.master, first.job) == (second.master, second.job)
    task = resolve(SLURM_STEP)
    assert resolve(SLURM_STEP | {"SLURM_PROCID": "0", "SLURM_NODEID": "0", "SLURM_LOCALID": "0"}).job == task.job


def test_a_shell_that_srun_started_is_alone_and_its_own_srun_is_not(tmp_path: Path) -> None:
    """`srun --pty bash`: commands in it are no task, yet their environment is that of one."""
    program = "from ferro.runtime.environment import resolve; print('world of', resolve().world_size)"
    ferro = f'{sys.executable} -c "{program}"'
    # The shell with job control is the task itself; `srun` there starts others, without a terminal.
    (tmp_path / "commands").write_text(f"{ferro}\nSLURM_TASK_PID=1 SLURM_STEP_ID=1 {ferro} < /dev/null\nexit\n")
    shell = f"export SLURM_TASK_PID=$$; set -m; . {tmp_path / 'commands'}"
    reader, terminal = pty.openpty()
    environ = {n: v for n, v in os.environ.items() if not n.startswith(("RANK", "WORLD", "PMI", "FERRO"))}
    environ |= SLURM_ONE_NODE | {"SLURM_PTY_PORT": "34889"}
    with subprocess.Popen(
        ["bash", "-c", shell], stdin=terminal, stdout=subprocess.PIPE, stderr=subprocess.PIPE, env=environ, text=True,
        start_new_session=True,
    ) as bash:  # fmt: skip
        output, errors = bash.communicate(timeout=60)
    os.close(terminal)
    os.close(reader)
    assert output.split("\n")[:2] == ["world of 1", "world of 4"], errors
