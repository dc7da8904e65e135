"""The environment resolver: every launcher's variables, and all that can be wrong in them."""

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from ferro.errors import UsageError
from ferro.runtime.environment import (
    LaunchInfo,
    child_environment,
    format_address,
    node_defaults,
    options,
    parse_address,
    read_secret,
    resolve,
    usable_cores,
)

TORCHRUN = {
    "RANK": "5",
    "WORLD_SIZE": "8",
    "LOCAL_RANK": "1",
    "LOCAL_WORLD_SIZE": "4",
    "MASTER_ADDR": "n01",
    "MASTER_PORT": "29500",
    "TORCHELASTIC_RUN_ID": "run-7",
    "TORCHELASTIC_RESTART_COUNT": "2",
}
FERRO = {"RANK": "1", "WORLD_SIZE": "4", "LOCAL_RANK": "1", "LOCAL_WORLD_SIZE": "4", "FERRO_STORE": "127.0.0.1:4711"}
OPENMPI = {
    "OMPI_COMM_WORLD_RANK": "3",
    "OMPI_COMM_WORLD_SIZE": "8",
    "OMPI_COMM_WORLD_LOCAL_RANK": "1",
    "OMPI_COMM_WORLD_LOCAL_SIZE": "2",
    "PMIX_NAMESPACE": "prterun-n01-77@1",
}
MPICH = {"PMI_RANK": "1", "PMI_SIZE": "2", "MPI_LOCALRANKID": "1", "MPI_LOCALNRANKS": "2"}
SLURM = {
    "SLURM_JOB_ID": "99",
    "SLURM_STEP_ID": "0",
    "SLURM_PROCID": "6",
    "SLURM_NTASKS": "7",
    "SLURM_LOCALID": "0",
    "SLURM_NODEID": "3",
    "SLURM_STEP_TASKS_PER_NODE": "2(x3),1",
}
KUBEFLOW = {
    "PET_NODE_RANK": "2",
    "PET_NNODES": "3",
    "PET_NPROC_PER_NODE": "1",
    "PET_MASTER_ADDR": "trainer-0",
    "PET_MASTER_PORT": "29400",
}


def place(info: LaunchInfo) -> tuple[str, int, int, int, int]:
    return info.launcher, info.rank, info.world_size, info.local_rank, info.local_world_size


@pytest.mark.parametrize(
    ("environ", "expected"),
    [
        ({}, ("single", 0, 1, 0, 1)),
        (TORCHRUN, ("torchrun", 5, 8, 1, 4)),
        (FERRO, ("ferro", 1, 4, 1, 4)),
        (OPENMPI, ("openmpi", 3, 8, 1, 2)),
        (MPICH, ("mpich", 1, 2, 1, 2)),
        (SLURM, ("slurm", 6, 7, 0, 1)),
        (SLURM | {"SLURM_PROCID": "3", "SLURM_LOCALID": "1", "SLURM_NODEID": "1"},
         ("slurm", 3, 7, 1, 2)),
        (KUBEFLOW, ("kubeflow", 2, 3, 0, 1)),
        # nobody says who is here: everyone on this host, unless a master elsewhere is named
        ({"RANK": "1", "WORLD_SIZE": "2"}, ("torchrun", 1, 2, 1, 2)),
        ({"RANK": "1", "WORLD_SIZE": "2", "MASTER_ADDR": "n01", "MASTER_PORT": "1"},
         ("torchrun", 1, 2, 0, 1)),
        ({"RANK": "5", "WORLD_SIZE": "8", "LOCAL_RANK": "1",
          "MASTER_ADDR": "n01", "MASTER_PORT": "1"},
         ("torchrun", 5, 8, 1, 2)),
        # two families that agree
        (MPICH | {"RANK": "1", "WORLD_SIZE": "2"}, ("torchrun", 1, 2, 1, 2)),
        (MPICH | {"SLURM_STEP_ID": "0", "SLURM_PROCID": "1", "SLURM_NTASKS": "2"},
         ("mpich", 1, 2, 1, 2)),
        # one launcher per node, started by another launcher
        (TORCHRUN | {"SLURM_STEP_ID": "0", "SLURM_PROCID": "1", "SLURM_NTASKS": "2",
                     "SLURM_NODEID": "1", "SLURM_STEP_TASKS_PER_NODE": "1(x2)"},
         ("torchrun", 5, 8, 1, 4)),
        (TORCHRUN | KUBEFLOW, ("torchrun", 5, 8, 1, 4)),
        # an allocation, but no step: a batch script, salloc's shell, a plain python
        ({"SLURM_JOB_ID": "99", "SLURM_NTASKS": "4"}, ("single", 0, 1, 0, 1)),
        ({"SLURM_NTASKS": "4", "SLURM_PROCID": "0"}, ("single", 0, 1, 0, 1)),
        ({"SLURM_NTASKS": "4", "SLURM_PROCID": "0", "SLURM_STEP_ID": "4294967290"},
         ("single", 0, 1, 0, 1)),
        # Kubeflow with a launcher on each node says nothing about this process
        (KUBEFLOW | {"PET_NPROC_PER_NODE": "4"}, ("single", 0, 1, 0, 1)),
    ],
)  # fmt: skip
def test_place(environ: dict[str, str], expected: tuple[str, int, int, int, int]) -> None:
    assert place(resolve(environ)) == expected


@pytest.mark.parametrize(
    ("environ", "words"),
    [
        # half a family
        ({"RANK": "0"}, ["WORLD_SIZE is not set", "RANK is"]),
        ({"WORLD_SIZE": "2"}, ["RANK is not set", "WORLD_SIZE is"]),
        ({"LOCAL_RANK": "1", "LOCAL_WORLD_SIZE": "2"}, ["RANK", "LOCAL_RANK and LOCAL_WORLD_SIZE"]),
        ({"FERRO_STORE": "127.0.0.1:1"}, ["RANK is not set", "FERRO_STORE is"]),
        ({"OMPI_COMM_WORLD_RANK": "0"}, ["OMPI_COMM_WORLD_SIZE is not set"]),
        ({"PMI_SIZE": "2"}, ["PMI_RANK is not set"]),
        ({"MPI_LOCALRANKID": "0"}, ["PMI_RANK is not set"]),
        ({"SLURM_PROCID": "0", "SLURM_STEP_ID": "1"}, ["SLURM_NTASKS is not set"]),
        ({"PET_NPROC_PER_NODE": "1", "PET_NODE_RANK": "1"}, ["PET_NNODES is not set"]),
        # no numbers
        (TORCHRUN | {"RANK": "one"}, ["RANK='one'", "whole number"]),
        (TORCHRUN | {"RANK": ""}, ["RANK=''"]),
        (TORCHRUN | {"WORLD_SIZE": "2.0"}, ["WORLD_SIZE='2.0'"]),
        (TORCHRUN | {"LOCAL_RANK": " 1"}, ["LOCAL_RANK=' 1'"]),
        (MPICH | {"PMI_RANK": "٣"}, ["PMI_RANK="]),
        (MPICH | {"PMI_SIZE": "9" * 5000}, ["PMI_SIZE="]),
        (SLURM | {"SLURM_STEP_TASKS_PER_NODE": "2(x"}, ["SLURM_STEP_TASKS_PER_NODE='2(x'"]),
        (SLURM | {"SLURM_NODEID": "9"}, ["SLURM_STEP_TASKS_PER_NODE", "SLURM_NODEID=9"]),
        # out of range
        (TORCHRUN | {"RANK": "8"}, ["RANK=8", "WORLD_SIZE=8", "0 to 7"]),
        (TORCHRUN | {"RANK": "-1"}, ["RANK=-1"]),
        (TORCHRUN | {"WORLD_SIZE": "0"}, ["WORLD_SIZE=0", "at least one"]),
        (TORCHRUN | {"LOCAL_RANK": "4"}, ["LOCAL_RANK=4", "LOCAL_WORLD_SIZE=4"]),
        (TORCHRUN | {"LOCAL_WORLD_SIZE": "0"}, ["LOCAL_WORLD_SIZE=0"]),
        # families that disagree
        (TORCHRUN | OPENMPI, ["RANK=5", "OMPI_COMM_WORLD_RANK=3", "unset"]),
        (MPICH | OPENMPI, ["OMPI_COMM_WORLD_RANK=3", "PMI_RANK=1"]),
        (MPICH | {"RANK": "1", "WORLD_SIZE": "3"}, ["WORLD_SIZE=3", "PMI_SIZE=2"]),
        (MPICH | SLURM | {"SLURM_NODEID": "0"}, ["PMI_RANK=1", "SLURM_PROCID=6"]),
        ({"RANK": "0", "WORLD_SIZE": "9"} | KUBEFLOW, ["RANK=0", "PET_NODE_RANK=2"]),
        # addresses
        ({"RANK": "0", "WORLD_SIZE": "2", "MASTER_ADDR": "n01"}, ["MASTER_PORT is not", "n01"]),
        ({"RANK": "0", "WORLD_SIZE": "2", "MASTER_PORT": "29500"}, ["MASTER_ADDR is not", "29500"]),
        (TORCHRUN | {"MASTER_PORT": "70000"}, ["MASTER_PORT=70000"]),
        (TORCHRUN | {"MASTER_PORT": "http"}, ["MASTER_PORT='http'"]),
        (KUBEFLOW | {"PET_MASTER_PORT": ""}, ["PET_MASTER_PORT"]),
        (FERRO | {"FERRO_STORE": "127.0.0.1"}, ["FERRO_STORE='127.0.0.1'", "host:port"]),
        (FERRO | {"FERRO_STORE": "::1:80"}, ["FERRO_STORE='::1:80'", "brackets"]),
        (FERRO | {"FERRO_STORE": "h:0"}, ["FERRO_STORE='h:0'"]),
    ],
)  # fmt: skip
def test_bad_environment_is_named(environ: dict[str, str], words: list[str]) -> None:
    with pytest.raises(UsageError) as caught:
        resolve(environ)
    for word in words:
        assert word in str(caught.value)


class TestArguments:
    def test_they_replace_the_environment_and_its_local_ranks(self) -> None:
        info = resolve(TORCHRUN, rank=2, world_size=3)
        assert place(info) == ("arguments", 2, 3, 0, 1)
        assert info.describe().startswith("rank 2 of 3 (from rank=, world_size=)")

    def test_repeating_the_environment_changes_nothing(self) -> None:
        assert place(resolve(OPENMPI, rank=3, world_size=8)) == place(resolve(OPENMPI))

    def test_each_beats_the_environment_by_itself(self) -> None:
        assert place(resolve(MPICH, rank=0))[:3] == ("arguments", 0, 2)
        assert place(resolve({"RANK": "1"}, world_size=4))[:3] == ("arguments", 1, 4)

    def test_they_settle_a_conflict_and_replace_bad_values(self) -> None:
        assert resolve(TORCHRUN | MPICH, rank=1, world_size=2).rank == 1
        assert resolve(TORCHRUN | {"RANK": "x"}, rank=1, world_size=2).world_size == 2

    def test_without_launcher_all_ranks_are_here(self) -> None:
        info = resolve({}, rank=1, world_size=3, rendezvous="[::1]:5000")
        assert place(info) == ("arguments", 1, 3, 1, 3)
        assert info.master == ("::1", 5000)

    @pytest.mark.parametrize(("rank", "world_size"), [(1, None), (None, 3)])
    def test_one_alone_is_not_enough(self, rank: int | None, world_size: int | None) -> None:
        with pytest.raises(UsageError, match="ferro run"):
            resolve({}, rank=rank, world_size=world_size)

    def test_out_of_range(self) -> None:
        with pytest.raises(UsageError, match=r"rank=3 is out of range.*world_size=3"):
            resolve({}, rank=3, world_size=3)

    def test_rendezvous_beats_store_and_master(self) -> None:
        info = resolve(FERRO | {"MASTER_ADDR": "n01"}, rendezvous="n09:77")
        assert (info.store, info.master) == (None, ("n09", 77))

    def test_malformed_rendezvous(self) -> None:
        with pytest.raises(UsageError, match=r"rendezvous='n09'"):
            resolve({}, rendezvous="n09")


class TestStoreMasterSecret:
    def test_master_comes_from_the_pair(self) -> None:
        assert resolve(TORCHRUN).master == ("n01", 29500)
        assert resolve(KUBEFLOW).master == ("trainer-0", 29400)
        assert resolve(MPICH).master is None

    def test_agent_store_takes_the_port_unless_ferro_has_its_own(self) -> None:
        agent = TORCHRUN | {"TORCHELASTIC_USE_AGENT_STORE": "True"}
        assert resolve(agent).master_port_taken
        assert not resolve(TORCHRUN).master_port_taken
        own = resolve(agent | {"FERRO_MASTER_PORT": "4000"})
        assert (own.master, own.master_port_taken) == (("n01", 4000), False)

    def test_half_an_address_does_not_matter_where_none_is_needed(self) -> None:
        assert resolve({"MASTER_ADDR": "n01"}).master is None
        assert resolve(FERRO | {"MASTER_PORT": "29500"}).store == ("127.0.0.1", 4711)

    def test_secret_is_read_and_never_shown(self) -> None:
        info = resolve(FERRO | {"FERRO_SECRET": "ab" * 32})
        assert info.secret == b"\xab" * 32
        assert "ab" * 32 not in repr(info)
        assert repr(info.secret) not in repr(info)

    @pytest.mark.parametrize("text", ["", "abcd", "xy" * 32, "a" * 33, "ab " * 32])
    def test_malformed_secret_is_refused_without_showing_it(self, text: str) -> None:
        with pytest.raises(UsageError, match="FERRO_SECRET") as caught:
            read_secret({"FERRO_SECRET": text})
        assert not text or text not in str(caught.value)

    @pytest.mark.parametrize("address", [("127.0.0.1", 1), ("n01.cluster", 65535), ("fe80::1%eth0", 29500)])
    def test_addresses_round_trip(self, address: tuple[str, int]) -> None:
        assert parse_address(format_address(address), source="test") == address


class TestJob:
    def test_named_by_the_launcher(self) -> None:
        assert resolve(TORCHRUN).job == "torchrun:run-7:n01:29500:2"
        assert resolve(OPENMPI).job == "openmpi:prterun-n01-77@1"
        assert resolve(SLURM).job == "slurm:99.0"
        assert resolve(FERRO | {"FERRO_RESTART": "1"}).job == "ferro:127.0.0.1:4711:1"

    def test_other_ranks_have_the_same(self) -> None:
        for env, name in ((TORCHRUN, "RANK"), (OPENMPI, "OMPI_COMM_WORLD_RANK"),
                          (MPICH, "PMI_RANK"), (SLURM, "SLURM_PROCID")):  # fmt: skip
            assert resolve(env | {name: "0"}).job == resolve(env).job

    def test_differs_between_restarts_and_runs(self) -> None:
        assert resolve(TORCHRUN | {"TORCHELASTIC_RESTART_COUNT": "3"}).job != resolve(TORCHRUN).job
        assert resolve(TORCHRUN | {"TORCHELASTIC_RUN_ID": "b"}).job != resolve(TORCHRUN).job


def test_provenance_names_the_variables() -> None:
    assert resolve(OPENMPI).describe() == (
        "rank 3 of 8 (from OMPI_COMM_WORLD_RANK, OMPI_COMM_WORLD_SIZE), local rank 1 of 2 "
        "(from OMPI_COMM_WORLD_LOCAL_RANK, OMPI_COMM_WORLD_LOCAL_SIZE)"
    )
    assert dict(resolve(FERRO).provenance)["store"] == "FERRO_STORE"
    assert dict(resolve(TORCHRUN).provenance)["master"] == "MASTER_ADDR, MASTER_PORT"
    assert "assumed" in resolve({"RANK": "1", "WORLD_SIZE": "2"}).describe()
    assert "world of one" in resolve({}).describe()


def test_the_process_environment_is_the_default(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in [n for n in os.environ if n.startswith(("OMPI_", "PMI_", "SLURM_", "PET_"))]:
        monkeypatch.delenv(name)
    for name, value in FERRO.items():
        monkeypatch.setenv(name, value)
    assert place(resolve()) == ("ferro", 1, 4, 1, 4)


class TestOptions:
    def test_nothing_set(self) -> None:
        found = options({})
        assert (found.trace, found.gpu_fallback, found.timeout_s) == (None, False, None)
        assert found.host_id == ""

    def test_host_id(self) -> None:
        assert options({"FERRO_HOST_ID": "rack 7"}).host_id == "rack 7"

    def test_all_set(self) -> None:
        found = options({"FERRO_TRACE": "parts", "FERRO_ENABLE_GPU_FALLBACK": "1", "FERRO_TIMEOUT_S": "2.5"})
        assert (found.trace, found.gpu_fallback, found.timeout_s) == ("parts", True, 2.5)

    @pytest.mark.parametrize("text", ["true", "0", "01", " 1", ""])
    def test_gpu_fallback_is_exactly_1(self, text: str) -> None:
        assert not options({"FERRO_ENABLE_GPU_FALLBACK": text}).gpu_fallback

    @pytest.mark.parametrize("text", ["soon", "0", "-1", "nan", "inf"])
    def test_bad_timeout(self, text: str) -> None:
        with pytest.raises(UsageError, match=f"FERRO_TIMEOUT_S='{text}'"):
            options({"FERRO_TIMEOUT_S": text})


class TestNodeDefaults:
    def test_kubeflow(self) -> None:
        found = node_defaults(KUBEFLOW | {"PET_NPROC_PER_NODE": "4"})
        assert (found.nnodes, found.node_rank, found.nproc_per_node) == (3, 2, 4)
        assert found.endpoint == ("trainer-0", 29400)

    def test_absent_and_automatic_say_nothing(self) -> None:
        for environ in ({}, {"PET_NPROC_PER_NODE": "auto"}):
            found = node_defaults(environ)
            assert (found.nnodes, found.nproc_per_node, found.endpoint) == (None, None, None)

    def test_half_an_address(self) -> None:
        with pytest.raises(UsageError, match="PET_MASTER_PORT is not"):
            node_defaults({"PET_MASTER_ADDR": "trainer-0"})


class TestChildEnvironment:
    INFO = LaunchInfo(
        rank=3,
        world_size=8,
        local_rank=1,
        local_world_size=2,
        launcher="ferro",
        store=("::1", 4711),
        master=("n01", 29500),
        secret=b"s" * 32,
    )

    def test_resolve_reads_it_back(self) -> None:
        back = resolve(child_environment(self.INFO, base={}))
        assert place(back) == place(self.INFO)
        assert (back.store, back.master, back.secret) == (self.INFO.store, self.INFO.master, self.INFO.secret)

    @pytest.mark.parametrize("outer", [TORCHRUN, OPENMPI, MPICH, SLURM, KUBEFLOW, FERRO])
    def test_other_launchers_do_not_shine_through(self, outer: dict[str, str]) -> None:
        env = child_environment(self.INFO, base=outer | {"PMI_FD": "9", "HOME": "h"})
        assert place(resolve(env)) == place(self.INFO)
        assert env["HOME"] == "h"
        assert "PMI_FD" not in env

    def test_threads_share_the_cores_unless_the_user_chose(self) -> None:
        shared = child_environment(self.INFO, base={})["OMP_NUM_THREADS"]
        assert shared == str(max(1, usable_cores() // 2))
        chosen = child_environment(self.INFO, base={"OMP_NUM_THREADS": "7"})
        assert chosen["OMP_NUM_THREADS"] == "7"

    def test_settings_of_the_run(self) -> None:
        env = child_environment(self.INFO, restart=2, trace="parts", timeout_s=1.5, base={})
        assert (env["FERRO_RESTART"], env["PYTHONUNBUFFERED"]) == ("2", "1")
        assert options(env).trace == "parts"
        assert options(env).timeout_s == 1.5
        assert "FERRO_TRACE" not in child_environment(self.INFO, base={})


REPORT = """
import json, sys, ferro.runtime.environment as e
i = e.resolve()
place = [i.launcher, i.rank, i.world_size, i.local_rank, i.local_world_size, i.job]
open(f"{sys.argv[1]}/{i.rank}", "w").write(json.dumps(place))
"""


@pytest.mark.skipif(shutil.which("mpiexec", path=str(Path(sys.executable).parent)) is None,
                    reason="needs the mpich wheel's mpiexec")  # fmt: skip
def test_real_mpiexec(tmp_path: Path) -> None:
    # The first rank runs within a shell, as in `mpiexec -n 4 wrapper.sh`: the job is the same.
    program = [sys.executable, "-c", REPORT, str(tmp_path)]
    wrapped = ["sh", "-c", '"$0" "$@"; exit $?', *program]
    mpiexec = str(Path(sys.executable).parent / "mpiexec")
    jobs = []
    for _ in range(2):
        command = [mpiexec, "-n", "1", *wrapped, ":", "-n", "1", *program]
        subprocess.run(command, timeout=30, check=True)
        first, second = (json.loads((tmp_path / rank).read_text()) for rank in "01")
        assert first[:5] == ["mpich", 0, 2, 0, 2]
        assert second[:5] == ["mpich", 1, 2, 1, 2]
        assert first[5] == second[5]
        jobs.append(first[5])
    assert jobs[0] != jobs[1]
