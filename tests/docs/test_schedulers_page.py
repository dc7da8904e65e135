"""The scripts and manifests of docs/schedulers.md are played as they stand, on two nodes that are this host."""

from __future__ import annotations

import os
import re
import secrets
import socket
import subprocess
import sys
from pathlib import Path

import pytest
import yaml

from ferro.runtime.environment import node_defaults, resolve

PAGE = (Path(__file__).parents[2] / "docs" / "schedulers.md").read_text()
SCRIPTS = re.findall(r"```bash\n(.*?)```", PAGE, re.DOTALL)
MANIFESTS = [yaml.safe_load(text) for text in re.findall(r"```yaml\n(.*?)```", PAGE, re.DOTALL)]
TRAIN = """
import ferro
with ferro.init(timeout_s=50) as group:
    print(f"rank {group.rank} of {group.world_size}, local rank {group.local_rank}: {int(group.all_reduce(1))}")
"""
# What srun and pbsdsh do, for the nodes that the test names: a process for each task, with the task's variables.
SRUN = """
import os, subprocess, sys
each, nodes = int(os.environ["SLURM_NTASKS_PER_NODE"]), int(os.environ["SLURM_NNODES"])
step = {"SLURM_STEP_ID": "0", "SLURM_NTASKS": str(each * nodes), "SLURM_STEP_NODELIST": "127.0.0.[1-2]",
        "SLURM_STEP_TASKS_PER_NODE": f"{each}(x{nodes})"}
command = sys.argv[1:]
while command[0].startswith("-"):
    del command[0]
tasks = [subprocess.Popen(command, env=os.environ | step | {
    "SLURM_PROCID": str(rank), "SLURM_LOCALID": str(rank % each), "SLURM_NODEID": str(rank // each),
    "FERRO_HOST_ID": f"node {rank // each}"}) for rank in range(each * nodes)]
sys.exit(max([task.wait() for task in tasks]))
"""
PBSDSH = """
import os, subprocess, sys
passed = {name: os.environ[name] for name in ("PATH", "HOME", "PBS_JOBID")}
tasks = [subprocess.Popen(["bash", "-c", sys.argv[4]], env=passed | {
    "PBS_NODENUM": str(node), "PBS_TASKNUM": str(2 - node), "FERRO_HOST_ID": f"node {node}"}) for node in range(2)]
sys.exit(max([task.wait() for task in tasks]))
"""


@pytest.fixture
def place(tmp_path):
    """A directory with the program, programs that play schedulers, and the environment of a job."""
    (tmp_path / "train.py").write_text(TRAIN)
    programs = tmp_path / "bin"
    programs.mkdir()
    for name, text in (("srun", SRUN), ("pbsdsh", PBSDSH)):
        (programs / name).write_text(f"#!{sys.executable}\n{text}")
        (programs / name).chmod(0o755)
    foreign = ("RANK", "WORLD", "LOCAL", "MASTER", "FERRO", "OMPI", "PMI", "SLURM", "PET", "OMP")
    kept = {name: value for name, value in os.environ.items() if not name.startswith(foreign)}
    path = f"{programs}:{Path(sys.executable).parent}:{os.environ['PATH']}"
    return tmp_path, kept | {"PATH": path, "HOME": str(tmp_path), "OPENBLAS_NUM_THREADS": "1"}


def play(text, place, variables):
    folder, env = place
    script = folder / "script.sh"
    script.write_text(text)
    subprocess.run(["bash", "-n", script], check=True, timeout=20)
    ended = subprocess.run(
        ["bash", script], env=env | variables, cwd=folder, capture_output=True, text=True, timeout=100
    )
    assert ended.returncode == 0, ended.stderr
    return ended.stdout


def expect_four_ranks(output):
    for rank in range(4):
        assert f"rank {rank} of 4, local rank {rank % 2}: 4" in output  # lines of two processes may be in one


def script(words):
    [text] = [text for text in SCRIPTS if words in text]
    return text


@pytest.mark.parametrize("words", ["python train.py", "ferro run"])
def test_the_scripts_for_slurm(place, words):
    [text] = [text for text in SCRIPTS if "#SBATCH" in text and f"{words}" in text]
    options = dict(re.findall(r"#SBATCH --([a-z-]+)=(.*)", text))
    job = {
        "SLURM_JOB_ID": str(os.getpid()),  # another port in each process that runs tests
        "SLURM_JOB_NODELIST": "127.0.0.[1-2]",
        "SLURM_NNODES": options["nodes"],
        "SLURM_NTASKS_PER_NODE": options["ntasks-per-node"],
        "SLURM_CPUS_PER_TASK": options["cpus-per-task"],
        "SLURM_STEP_ID": "4294967291",
        "SLURM_PROCID": "0",
        "SLURM_NODEID": "0",
    }
    expect_four_ranks(play(text, place, job))


def test_the_script_for_pbs(place):
    folder, _ = place
    (folder / "given").write_text("127.0.0.1\n127.0.0.2\n")
    job = {"PBS_JOBID": f"{os.getpid()}.m", "PBS_O_WORKDIR": str(folder), "PBS_NODEFILE": str(folder / "given")}
    text = script("#PBS")
    assert "mpiprocs=1" in text
    expect_four_ranks(play(text, place, job | {"PBS_TASKNUM": "1", "PBS_NODENUM": "0"}))


def environment(container, labels):
    """Return the variables that a manifest gives to each of its pods."""
    found = {}
    for entry in container["env"]:
        origin = entry.get("valueFrom", {})
        if "fieldRef" in origin:
            found[entry["name"]] = labels[
                re.fullmatch(r"metadata.labels\['(.*)'\]", origin["fieldRef"]["fieldPath"])[1]
            ]
        elif "secretKeyRef" in origin:
            found[entry["name"]] = secrets.token_hex(32)
        else:
            found[entry["name"]] = entry["value"]
    return found


def pods_of_jobset(manifest):
    [job] = manifest["spec"]["replicatedJobs"]
    name, spec = manifest["metadata"]["name"], job["template"]["spec"]
    assert spec["completions"] == spec["parallelism"]
    [container] = spec["template"]["spec"]["containers"]
    labels = {"jobset.sigs.k8s.io/jobset-name": name, "jobset.sigs.k8s.io/replicatedjob-name": job["name"]}
    shared = environment(container, labels)
    return container, [shared | {"JOB_COMPLETION_INDEX": str(pod)} for pod in range(spec["completions"])]


def pods_of_leader_worker_set(manifest):
    template = manifest["spec"]["leaderWorkerTemplate"]
    [container] = template["workerTemplate"]["spec"]["containers"]
    name = manifest["metadata"]["name"]
    shared = environment(container, {}) | {"LWS_GROUP_SIZE": str(template["size"])}
    shared |= {"LWS_LEADER_ADDRESS": f"{name}-0.{name}.default"}
    return container, [shared | {"LWS_WORKER_INDEX": str(pod)} for pod in range(template["size"])]


@pytest.mark.parametrize(
    ("kind", "pods_of", "host"),
    [
        ("JobSet", pods_of_jobset, "train-workers-0-0.train"),
        ("LeaderWorkerSet", pods_of_leader_worker_set, "train-0.train.default"),
    ],
)
def test_the_manifests_for_kubernetes(place, kind, pods_of, host):
    [manifest] = [manifest for manifest in MANIFESTS if manifest.get("kind") == kind]
    container, pods = pods_of(manifest)
    for number, pod in enumerate(pods):
        assert resolve(pod).master == (host, 29400)
        assert node_defaults(pod) == (2, number, None, (host, 29400))
    folder, env = place
    with socket.socket() as free:  # this host has no such name, and another test may use the port
        free.bind(("127.0.0.1", 0))
        address = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(free.getsockname()[1])}
    started = [
        subprocess.Popen(
            container["command"],
            cwd=folder,
            env=env | pod | address | {"FERRO_HOST_ID": f"pod {number}", "HOME": str(folder / str(number))},
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )
        for number, pod in enumerate(pods)
    ]
    outputs = [process.communicate(timeout=100) for process in started]
    assert [process.returncode for process in started] == [0, 0], outputs
    expect_four_ranks("".join(re.sub(r"^\[\d\] ", "", output, flags=re.M) for output, _ in outputs))


def test_the_task_for_skypilot():
    [task] = [manifest for manifest in MANIFESTS if "num_nodes" in manifest]
    assert "FERRO_SECRET" in task["envs"]
    assert task["run"].startswith("ferro run -n 2 train.py")
