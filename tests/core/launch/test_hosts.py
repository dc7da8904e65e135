"""Two hosts, each a network namespace: ranks advertise the address that reaches the store."""

from __future__ import annotations

import secrets
import sys
from pathlib import Path

FERRO = Path(sys.executable).parent / "ferro"
PROGRAM = """
import socket, ferro
with ferro.init(timeout_s=20) as group:
    total = float(group.all_reduce(group.rank + 1.0))
    print(f"rank {group.rank} of {group.world_size}: {total}")
"""


def test_ferro_run_on_two_hosts(hosts, tmp_path):
    program = tmp_path / "program.py"
    program.write_text(PROGRAM)
    run = [FERRO, "run", "-n", "2", "--nnodes", "2", "--rdzv-endpoint", f"{hosts.addresses[0]}:29411"]
    commands = [[*run, "--node-rank", str(node), program] for node in range(2)]
    secret = {"FERRO_SECRET": secrets.token_hex(32)}
    output = hosts.run(commands, [secret, secret])
    for rank in range(4):
        assert f"rank {rank} of 4: 10.0" in output


def test_ranks_of_another_launcher_on_two_hosts(hosts, tmp_path):
    program = tmp_path / "program.py"
    program.write_text(PROGRAM)
    shared = {"WORLD_SIZE": "2", "LOCAL_RANK": "0", "LOCAL_WORLD_SIZE": "1", "HOME": str(tmp_path)}
    shared |= {"MASTER_ADDR": hosts.addresses[0], "MASTER_PORT": "29500"}
    variables = [{**shared, "RANK": str(rank)} for rank in range(2)]
    output = hosts.run([[sys.executable, program]] * 2, variables)
    for rank in range(2):
        assert f"rank {rank} of 2: 3.0" in output
