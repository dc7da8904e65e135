"""Two hosts, each a network namespace: ranks advertise the address that reaches the store."""

from __future__ import annotations

import os
import secrets
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

FERRO = Path(sys.executable).parent / "ferro"
PROGRAM = """
import socket, ferro
with ferro.init(timeout_s=20) as group:
    total = float(group.all_reduce(group.rank + 1.0))
    print(f"rank {group.rank} of {group.world_size}: {total}")
"""
LIMIT_S = 60


@pytest.fixture
def hosts():
    """Make two namespaces joined by a cable; yield their names and the first one's address."""
    if os.geteuid() != 0 or shutil.which("ip") is None:
        pytest.skip("making network namespaces needs root and iproute2")
    mark = f"{os.getpid() % 100_000}"
    names, ends = [f"fa{mark}", f"fb{mark}"], [f"va{mark}", f"vb{mark}"]

    def ip(*words):
        subprocess.run(["ip", *words], check=True, capture_output=True, timeout=10)

    made = []
    try:
        for name in names:
            ip("netns", "add", name)
            made.append(name)
        ip("link", "add", ends[0], "type", "veth", "peer", "name", ends[1])
        for number, (name, end) in enumerate(zip(names, ends, strict=True), 1):
            ip("link", "set", end, "netns", name)
            ip("-n", name, "addr", "add", f"10.77.0.{number}/24", "dev", end)
            ip("-n", name, "link", "set", end, "up")
            ip("-n", name, "link", "set", "lo", "up")
    except subprocess.CalledProcessError as error:
        for name in made:
            ip("netns", "del", name)
        pytest.skip(f"this machine makes no network namespaces: {error.stderr!r}")
    yield names, "10.77.0.1"
    for name in made:
        ip("netns", "del", name)


def run_on(hosts, commands, variables):
    """Run one command on each host; return what they printed together."""
    started = [
        subprocess.Popen(
            ["ip", "netns", "exec", host, *map(str, command)],
            env={**os.environ, **extra},
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
        )
        for host, command, extra in zip(hosts, commands, variables, strict=True)
    ]
    try:
        outputs = [process.communicate(timeout=LIMIT_S)[0] for process in started]
    finally:
        for process in started:
            process.kill()
    assert [process.returncode for process in started] == [0, 0], outputs
    return "".join(outputs)


def test_ferro_run_on_two_hosts(hosts, tmp_path):
    names, address = hosts
    program = tmp_path / "program.py"
    program.write_text(PROGRAM)
    run = [FERRO, "run", "-n", "2", "--nnodes", "2", "--rdzv-endpoint", f"{address}:29411"]
    commands = [[*run, "--node-rank", str(node), program] for node in range(2)]
    secret = {"FERRO_SECRET": secrets.token_hex(32)}
    output = run_on(names, commands, [secret, secret])
    for rank in range(4):
        assert f"rank {rank} of 4: 10.0" in output


def test_ranks_of_another_launcher_on_two_hosts(hosts, tmp_path):
    names, address = hosts
    program = tmp_path / "program.py"
    program.write_text(PROGRAM)
    shared = {"WORLD_SIZE": "2", "LOCAL_RANK": "0", "LOCAL_WORLD_SIZE": "1", "HOME": str(tmp_path)}
    shared |= {"MASTER_ADDR": address, "MASTER_PORT": "29500"}
    variables = [{**shared, "RANK": str(rank)} for rank in range(2)]
    output = run_on(names, [[sys.executable, program]] * 2, variables)
    for rank in range(2):
        assert f"rank {rank} of 2: 3.0" in output
