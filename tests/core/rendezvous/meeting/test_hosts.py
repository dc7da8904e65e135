"""Ranks of two hosts (network namespaces) meet, whatever the meeting place is called there."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

from ....namespaces import Hosts

PROGRAM = """
import ferro
with ferro.init("gloo", timeout_s=50) as group:
    print(f"rank {group.rank} sum {group.all_reduce(1)}")
"""
LIMIT_S = 100.0


@pytest.fixture
def start(hosts: Hosts, tmp_path):
    """Run ranks 0 and 1 by hand, or two nodes under `ferro run`, each host with names of its own."""
    (tmp_path / "program.py").write_text(PROGRAM)
    secret = {"FERRO_SECRET": "ab" * 32}

    def run(names: tuple[str, str], addresses: tuple[str, str], *, nodes: bool = False) -> str:
        commands, variables = [], []
        for host, (text, address) in enumerate(zip(names, addresses, strict=True)):
            path = tmp_path / f"hosts{host}"
            path.write_text(f"127.0.0.1 localhost\n{text}\n")
            inner = ["sh", "-c", 'mount --bind "$0" /etc/hosts && exec "$@"', path]
            program = [sys.executable, tmp_path / "program.py"]
            place = {"RANK": host, "WORLD_SIZE": 2, "LOCAL_RANK": 0, "LOCAL_WORLD_SIZE": 1}
            place |= {"MASTER_ADDR": address, "MASTER_PORT": 29511}
            if nodes:
                node = ["--nnodes", 2, "--node-rank", host, "--rdzv-endpoint", f"{address}:29511"]
                program, place = [Path(sys.executable).with_name("ferro"), "run", "-n", 1, *node, program[1]], {}
            commands.append(["unshare", "-m", *inner, *program])
            settings = {"FERRO_HOST_ID": f"host{host}", **place}
            variables.append(secret | {name: str(value) for name, value in settings.items()})
        return hosts.run(commands, variables, LIMIT_S)

    return run


@pytest.mark.parametrize("nodes", [False, True], ids=["by hand", "ferro run"])
def test_the_hosts_own_name_may_mean_loopback_there(start, hosts, nodes):
    names = ("127.0.1.1 node-a", f"{hosts.addresses[0]} node-a")
    said = start(names, ("node-a", "node-a"), nodes=nodes)
    assert "rank 0 sum 2" in said
    assert "rank 1 sum 2" in said


def test_rank_zero_may_know_itself_as_localhost_only(start, hosts):
    assert "rank 1 sum 2" in start(("", ""), ("localhost", hosts.addresses[0]))


def test_link_local_addresses_with_the_interface_of_each_host(start, hosts):
    for number, (name, end) in enumerate(zip(hosts.names, hosts.ends, strict=True)):
        command = ["ip", "-n", name, "addr", "add", f"fe80::91:{number}/64", "dev", end, "nodad"]
        subprocess.run(command, check=True, timeout=20)
    said = start(("", ""), (f"fe80::91:0%{hosts.ends[0]}", f"fe80::91:0%{hosts.ends[1]}"))
    assert "rank 1 sum 2" in said
