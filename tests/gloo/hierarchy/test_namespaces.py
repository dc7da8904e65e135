"""gloo between two hosts that are network namespaces, over a link of a given rate."""

from __future__ import annotations

import secrets
import sys

import pytest

from ...namespaces import CannotMakeHosts, Hosts

PROGRAM = """
import numpy as np, ferro

def same(found, wanted):
    assert found.dtype == wanted.dtype and found.shape == wanted.shape, (found, wanted)
    assert (found == wanted).all(), (found, wanted)

with ferro.init("gloo", timeout_s=40) as group:
    n, me = group.world_size, group.rank
    for count in (1, 1000, 150_000):
        x = [np.arange(count * n, dtype=np.int64) % 97 + rank for rank in range(n)]
        for memory in (np.empty, group.empty):
            mine = memory(x[me].shape, x[me].dtype)
            mine[...] = x[me]
            same(group.all_reduce(mine), sum(x))
            same(group.reduce_scatter(mine), np.split(sum(x), n)[me])
            same(group.all_gather(mine), np.concatenate(x))
            same(group.all_to_all(mine), np.concatenate([np.split(each, n)[me] for each in x]))
            for root in range(n):
                same(group.broadcast(mine, root), x[root])
                reduced, whole = group.reduce(mine, root), group.gather(mine, root)
                part = group.scatter(mine if me == root else None, root)
                same(part, np.split(x[root], n)[me])
                if me == root:
                    same(reduced, sum(x))
                    same(whole, np.concatenate(x))
        half = group.all_reduce(np.full(count, 0.5, np.float16), "mean")
        same(half, np.full(count, 0.5, np.float16))
        group.barrier()
    print(f"rank {me}: {type(group._backend._collectives).__name__}, all right")
"""

KILLED = """
import os, signal, sys, threading
import numpy as np, ferro

try:
    with ferro.init("gloo", timeout_s=40) as group:
        group.barrier()
        if group.rank == 3:
            threading.Timer(0.2, os.kill, (os.getpid(), signal.SIGKILL)).start()
        while True:
            group.all_reduce(np.ones(300_000))
except ferro.PeerLost as error:
    print(f"rank {error.rank} lost {error.peer}")
"""


def run(hosts: Hosts, folder):
    """Run the program on two ranks of each host; return what is printed."""
    program = folder / "program.py"
    program.write_text(PROGRAM)
    endpoint = f"{hosts.addresses[0]}:29411"  # in a namespace that is this test's alone
    run = [sys.executable, "-m", "ferro", "run", "-n", "2", "--nnodes", "2"]
    commands = [[*run, "--rdzv-endpoint", endpoint, "--node-rank", str(node), program] for node in range(2)]
    # The namespaces share /dev/shm, so they must say that they are not one host.
    secret = secrets.token_hex(32)
    return hosts.run(commands, [{"FERRO_SECRET": secret, "FERRO_HOST_ID": name} for name in hosts.names])


def test_all_collectives_between_two_hosts_over_a_shaped_link(hosts, tmp_path):
    try:
        hosts.shape(mbit=1000)
    except CannotMakeHosts as error:
        pytest.skip(str(error))
    output = run(hosts, tmp_path)
    for rank in range(4):
        assert f"rank {rank}: HierarchicalBackend, all right" in output


def test_a_killed_process_is_named_on_both_hosts(hosts):
    shared = {"WORLD_SIZE": "4", "LOCAL_WORLD_SIZE": "2", "FERRO_SECRET": secrets.token_hex(32)}
    shared |= {"MASTER_ADDR": hosts.addresses[0], "MASTER_PORT": "29500"}
    started = []
    for rank in range(4):
        own = {"RANK": str(rank), "LOCAL_RANK": str(rank % 2)}
        own |= {"FERRO_HOST_ID": hosts.names[rank // 2]}
        started.append(hosts.start(rank // 2, [sys.executable, "-c", KILLED], shared | own))
    try:
        outputs = [process.communicate(timeout=60)[0] for process in started]
    finally:
        for process in started:
            process.kill()
            process.communicate()
    assert outputs[:3] == [f"rank {rank} lost 3\n" for rank in range(3)], outputs
    assert started[3].returncode != 0
